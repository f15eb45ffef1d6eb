"""The proof of constrained generation: every sequence of 1,000 random models parses under its grammar.

``make prove NAME=generated-grammar``: models of random shapes and weights write images, clips and documents
of random sizes, prompts, seeds and sampler settings in every dialect, several at a time. Exit code 0 only if
the grammar takes all of them. ``--first`` and ``--models`` run a part.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.inference import worlds

SHOW_EVERY = 50


def main() -> None:
    """Run, and print what does not parse."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--first", type=int, default=0, help="seed of the first model")
    parser.add_argument("--models", type=int, default=1000)
    arguments = parser.parse_args()
    found: list[str] = []
    with worlds.one_process():
        from tests.inference.random_models import REQUESTS, faults

        for number, seed in enumerate(range(arguments.first, arguments.first + arguments.models), start=1):
            found += faults(seed)
            if number % SHOW_EVERY == 0 or number == arguments.models:
                print(f"{number} models, {number * REQUESTS} sequences, {len(found)} faults", flush=True)
    print("\n".join(found))
    if found:
        sys.exit(1)


if __name__ == "__main__":
    main()
