"""Show candidates on a page of this machine and take the votes of several people."""

from __future__ import annotations

import argparse
from pathlib import Path

from emu3_megatron.errors import run_main


def main() -> None:
    """Parse the command line and serve until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--candidates", type=Path, required=True, help="folder of tools/make_preferences.py sample"
    )
    parser.add_argument("--port", type=int, default=8765, help="on 127.0.0.1 (default: 8765; 0: a free one)")
    arguments = parser.parse_args()

    from emu3_megatron.posttraining.preferences.voting import serve

    serve(arguments.candidates, arguments.port)


if __name__ == "__main__":
    run_main(main)
