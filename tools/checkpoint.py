"""Look into checkpoints of a run: what one is, whether every byte is sound, how two differ.

A path may be a checkpoint folder, or a run: then its newest checkpoint is meant (`verify`: all of them).
"""

from __future__ import annotations

import argparse
import sys

from emu3_megatron.errors import run_main


def main() -> None:
    """Parse the command line and run one subcommand."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    info = commands.add_parser("info", help="progress, model, tensors, size")
    info.add_argument("checkpoint")
    verify = commands.add_parser("verify", help="read every byte; exit code 1 if anything is damaged")
    verify.add_argument("checkpoint")
    diff = commands.add_parser("diff", help="records and tensors that differ; exit code 1 if any does")
    diff.add_argument("first")
    diff.add_argument("second")
    arguments = parser.parse_args()
    # Slow to import, and not needed for --help.
    from emu3_megatron.training import inspection

    if arguments.command == "info":
        print("\n".join(inspection.describe(arguments.checkpoint)))
        return
    if arguments.command == "verify":
        lines, good = inspection.verify(arguments.checkpoint), f"{arguments.checkpoint}: sound"
    else:
        lines, good = list(inspection.compare(arguments.first, arguments.second)), "equal"
    print("\n".join(lines) or good)
    sys.exit(1 if lines else 0)


if __name__ == "__main__":
    run_main(main)
