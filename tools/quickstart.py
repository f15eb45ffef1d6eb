"""From raw media to a trained model, generated samples and a report: the whole path at small scale.

Finished stages are kept: run it again after an interruption and it goes on.
"""

from __future__ import annotations

import json
from dataclasses import fields

from jsonargparse import ArgumentParser

from emu3_megatron.errors import run_main
from emu3_megatron.samples.quickstart.config import QuickstartConfig
from emu3_megatron.samples.quickstart.pipeline import run_quickstart


def main() -> None:
    """Parse the command line, run, and print the accuracies."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--config", action="config", help="YAML file of settings")
    parser.add_class_arguments(QuickstartConfig)
    values = parser.instantiate(parser.parse_args())
    config = QuickstartConfig(**{field.name: values[field.name] for field in fields(QuickstartConfig)})
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
