"""Look into datasets: what one holds, whether every byte is sound, and single documents."""

from __future__ import annotations

import argparse
import sys

from emu3_megatron.data.verify import describe, show, verify
from emu3_megatron.errors import run_main


def main() -> None:
    """Parse the command line and run one subcommand."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("info", "counts, sizes, fingerprints, lengths, provenance"),
        ("verify", "read every byte; exit code 1 if anything is damaged"),
        ("show", "print a document's name and segments"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("dataset", help="folder with manifest.json")
        if name == "show":
            command.add_argument("document", help="number from 0, or sample id")
            command.add_argument("--limit", type=int, default=16, help="ids shown of each end of a segment")
    arguments = parser.parse_args()
    if arguments.command == "verify":
        sys.exit(_verify(arguments.dataset))
    lines = (
        describe(arguments.dataset)
        if arguments.command == "info"
        else show(arguments.dataset, arguments.document, arguments.limit)
    )
    for line in lines:
        print(line)


def _verify(folder: str) -> int:
    faults = verify(folder, progress=lambda shard: print(f"reading {shard}", file=sys.stderr))
    for fault in faults:
        print(fault)
    print(f"{folder}: {len(faults)} faults" if faults else f"{folder}: sound")
    return 1 if faults else 0


if __name__ == "__main__":
    run_main(main)
