"""Packer throughput and fill: ``python benchmarks/packing.py [--documents N] [--repeats 5]``.

Lengths as pre-training data has them: 40% text (log-normal, mean about 700), 50% images (4,300 +- 400),
10% video (log-uniform, 4k to 60k). Prints, for each policy, the median over the repeats of CPU seconds per
million documents given, from an int32 array of lengths to the arrays of the plan, and the fill of the same
call. Figures and where they were measured are in docs/packing.md.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import numpy as np

from emu3_megatron.data.packing import pack

CASES: dict[str, dict[str, Any]] = {
    "online, 64 open windows": {"policy": "online", "open_windows": 64},
    "online, 1,024 open windows": {"policy": "online"},
    "online, 1,024, fill": {"policy": "online", "fill": True},
    "offline": {"policy": "offline"},
    "offline, fill": {"policy": "offline", "fill": True},
}


def draw(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Lengths int32 [count] and which of them may be split."""
    rng = np.random.default_rng(seed)
    kind = rng.choice(3, count, p=[0.4, 0.5, 0.1])
    text = np.exp(rng.normal(np.log(700) - 0.5, 1, count))
    video = np.exp(rng.uniform(np.log(4000), np.log(60000), count))
    lengths = np.choose(kind, [text, rng.normal(4300, 400, count), video])
    return np.maximum(1, lengths.round()).astype(np.int32), kind == 0


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--documents", type=int, default=1_000_000, help="documents drawn")
    parser.add_argument("--repeats", type=int, default=5, help="calls per case; the median is printed")
    arguments = parser.parse_args()
    lengths, splittable = draw(arguments.documents)
    print(f"{'policy':28}{'window':>9}{'CPU s / 1M':>12}{'M doc/s':>9}{'fill':>9}{'cuts':>9}{'dropped':>9}")
    for capacity in (5120, 131_072):
        for name, options in CASES.items():
            seconds = []
            for _ in range(arguments.repeats):
                start = time.process_time()
                packed = pack(lengths, capacity, splittable=splittable, **options)
                seconds.append(time.process_time() - start)
            per_million = statistics.median(seconds) / arguments.documents * 1e6
            fill = packed.length.sum() / (packed.num_windows * capacity)
            print(
                f"{name:28}{capacity:9,}{per_million:12.4f}{1 / per_million:9.1f}{fill:9.5f}"
                f"{np.count_nonzero(packed.start):9,}{len(packed.dropped):9,}"
            )


if __name__ == "__main__":
    main()
