"""Build a run's plan ahead and describe it: windows, fill, padding by cause, sources, advice.

::

    python -m tools.plan --config examples/configs/tiny.yaml [--windows N] [--sample N] [options of training]

The blocks lie in the run's folder afterwards, where training finds them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from emu3_megatron.data.report import SAMPLED_WINDOWS, report
from emu3_megatron.errors import UserError, run_main
from emu3_megatron.posttraining.runs import describe_run
from emu3_megatron.training.consumed import ConsumedWindows


def main() -> None:
    """Parse the command line, build, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--windows", type=int, help="windows to build; by default those of the whole run")
    parser.add_argument(
        "--sample", type=int, default=SAMPLED_WINDOWS, help="windows read to count modalities"
    )
    own, others = parser.parse_known_args()
    run = describe_run(others)
    trainer = run.config.trainer
    consumed = ConsumedWindows(Path(run.config.run), trainer)
    windows = consumed.up_to(consumed.last_step) if own.windows is None else own.windows
    if windows < 1 or own.sample < 1:
        raise UserError(f"--windows {windows} and --sample {own.sample} must be at least 1")
    for line in report(run.open_plan(), windows, sampled=own.sample):
        print(line)
        sys.stdout.flush()


if __name__ == "__main__":
    run_main(main)
