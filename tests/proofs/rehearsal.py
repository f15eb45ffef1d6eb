"""The rehearsal proof: the whole chain under a SLURM of two nodes, at a scale that learns something.

``make prove NAME=rehearsal`` starts SLURM on this machine and sends it ``examples/slurm/rehearsal.sh`` with
``--scale small`` (``ARGS="--scale tiny"`` for the size of the tests). Exit code 0 only if everything that the
jobs should leave is there.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def main() -> int:
    """Run it; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scale", choices=("tiny", "small"), default="small", help="how much of everything")
    parser.add_argument("--run", type=Path, default=ROOT / "runs/rehearsal", help="folder of this proof")
    asked = parser.parse_args()
    script = ROOT / "examples/slurm/rehearsal.sh"
    command = [
        sys.executable,
        "-m",
        "tests.slurm.cluster",
        script,
        asked.run.resolve(),
        "--scale",
        asked.scale,
    ]
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "EMU3_PYTHON": sys.executable}
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
