"""From raw media to a trained model, generated samples and a report: the whole path at small scale.

Finished stages are kept: run it again after an interruption and it goes on.
"""

from __future__ import annotations

import json

from emu3_megatron.errors import run_main
from emu3_megatron.samples.quickstart.config import QuickstartConfig
from emu3_megatron.samples.quickstart.pipeline import run_quickstart
from emu3_megatron.settings import read_settings


def main() -> None:
    """Parse the command line, run, and print the accuracies."""
    config = read_settings(QuickstartConfig, __doc__)
    summary = json.loads(run_quickstart(config).read_text())
    for name, value in summary["accuracy"].items():
        low, high = summary["interval_95"][name]
        print(
            f"{name:16s} {value:6.1%}  95% interval {low:.1%} to {high:.1%}, "
            f"chance {summary['chance'][name]:.1%}"
        )
    print(f"{summary['seconds']['total'] / 60:.1f} minutes")


if __name__ == "__main__":
    run_main(main)
