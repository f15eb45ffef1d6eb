"""A conversion holds a few tensors, not a model: the small form of `tests/proofs/conversion_8b.py`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_memory_is_bounded_by_the_largest_tensor(tmp_path: Path) -> None:
    """Import, export and comparison of 0.5 GB in shards of 0.2 GB; the proof judges the peaks."""
    command = [sys.executable, str(ROOT / "tests" / "proofs" / "conversion_8b.py"), "--no-rate"]
    command += ["--folder", str(tmp_path), "--hidden", "512", "--layers", "16", "--shard-bytes", "200000000"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr[-2000:]
    assert "all holds" in result.stdout
