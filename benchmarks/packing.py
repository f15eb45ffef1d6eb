"""Packer speed, fill and memory side by side: ``python benchmarks/packing.py [--documents N] [--repeats 5]``.

Lengths as pre-training data has them: 40% text (log-normal, mean about 700), 50% images (4,300 +- 400), 10%
video (log-uniform, 4k to 60k). Images and videos longer than the window are left out beforehand, so that
every packer gets the same documents; ours cuts longer texts, for the others they are cut beforehand. Every
case runs in a process of its own. Printed: documents per CPU second (medians of the repeats, which take turns
over the cases) from an int32 array of lengths to the arrays of the plan, and of the same calls the fill, the
bound it stands against (Martello-Toth), and the peak of memory over that of the input. The first call in a
process also waits for its memory; a plan, which packs block after block, sees the speed of the later ones.

Public packers run where they are installed (``pip install lightbinpack trl pyarrow axolotl``, a folder of
``--peers`` is searched too); the missing ones are named. Those whose time grows with the square of the
documents get fewer, which flatters their speed. Figures and where they were measured are in docs/packing.md.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from emu3_megatron.data.bounds import least_windows, least_windows_with_cuts
from emu3_megatron.data.packing import pack

Pack = Callable[[np.ndarray, np.ndarray, int], int]
"""From lengths, which may be split, and the window to a number of windows."""


class Case(NamedTuple):
    """One packer."""

    name: str
    run: Pack
    needs: str = ""
    """Module that a public packer is in."""
    limit: int = 2**31
    """It gets the first so many documents."""
    warm: bool = False
    """Whether a small call comes first, to compile."""


IMAGE = 1
LATER_CALLS = 3
"""In one process, after the first."""


def draw(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Lengths int32 [count] and what they are: 0 a text, which may be split, 1 an image, 2 a video."""
    rng = np.random.default_rng(seed)
    kind = rng.choice(3, count, p=[0.4, 0.5, 0.1])
    text = np.exp(rng.normal(np.log(700) - 0.5, 1, count))
    video = np.exp(rng.uniform(np.log(4000), np.log(60000), count))
    lengths = np.choose(kind, [text, rng.normal(4300, 400, count), video])
    return np.maximum(1, lengths.round()).astype(np.int32), kind


def cut(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """The same with texts longer than a window cut into windows and a rest."""
    whole, rest = np.divmod(lengths, capacity)
    pieces = np.concatenate([rest[rest > 0], np.full(int(whole.sum()), capacity, dtype=lengths.dtype)])
    return np.random.default_rng(0).permutation(pieces) if whole.any() else lengths


def image_spread(lengths: np.ndarray, kind: np.ndarray, capacity: int, **options: Any) -> float:
    """Standard deviation over windows of the share of their tokens that images have."""
    packed = pack(lengths, capacity, splittable=kind == 0, **options)
    tokens = packed.length.astype(np.int64)
    images = np.where(kind[packed.document] == IMAGE, tokens, 0)
    borders = packed.window_offsets[:-1]
    return float(np.std(np.add.reduceat(images, borders) / np.add.reduceat(tokens, borders)))


def ours(**options: Any) -> Callable[[np.ndarray, np.ndarray, int], int]:
    """Our packer with some options; like all below, it takes lengths, what may be cut, and capacity."""
    return lambda lengths, splittable, capacity: (
        pack(lengths, capacity, splittable=splittable, **options).num_windows
    )


def lightbinpack(lengths: np.ndarray, _: np.ndarray, capacity: int) -> int:
    """lightbinpack's best fit of documents as ordered by length."""
    from lightbinpack import pack as pack_theirs

    return len(pack_theirs(lengths.tolist(), capacity, strategy="obfd"))


def trl(lengths: np.ndarray, _: np.ndarray, capacity: int) -> int:
    """TRL packs Arrow tables of tokens; bytes stand for tokens here."""
    import pyarrow
    from trl.data_utils import _pack_bfd

    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    column = pyarrow.LargeListArray.from_arrays(offsets, np.zeros(offsets[-1], dtype=np.int8))
    return len(_pack_bfd(pyarrow.table({"input_ids": column}), capacity))


def axolotl(lengths: np.ndarray, _: np.ndarray, capacity: int) -> int:
    """axolotl's multipack over all documents as one group."""
    from axolotl.utils.samplers.multipack import pack_group

    count = len(lengths)
    return len(pack_group(lengths.astype(np.int64), 0, capacity, count, count, False))


def greedy_knapsack(lengths: np.ndarray, _: np.ndarray, capacity: int) -> int:
    """Window by window, the longest document that still fits: the loop of many training programs."""
    from bisect import bisect_right

    left = np.sort(lengths).tolist()
    windows = 0
    while left:
        room = capacity
        while (place := bisect_right(left, room)) > 0:
            room -= left.pop(place - 1)
        windows += 1
    return windows


CASES = (
    Case("ours, online, 64 open", ours(policy="online", open_windows=64)),
    Case("ours, online, 1,024 open", ours(policy="online")),
    Case("ours, online, fill", ours(policy="online", fill=True)),
    Case("ours, offline", ours(policy="offline")),
    Case("ours, offline, fill", ours(policy="offline", fill=True)),
    Case("lightbinpack, obfd", lightbinpack, "lightbinpack", 1_000_000),
    Case("TRL, bfd", trl, "trl", 10_000),
    Case("axolotl, multipack", axolotl, "axolotl", 30_000, True),
    Case("greedy knapsack", greedy_knapsack, "bisect", 30_000),
)


def resident(field: str) -> int:
    """``VmRSS`` (now) or ``VmHWM`` (the most since it was reset) of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def measure(queue: Any, case: int, peers: list[str], folder: str, capacity: int) -> None:
    """In a process of its own: CPU seconds of the first and of later calls, windows, fill, documents, memory.

    Memory is the peak of the first call, in bytes above what was there before.
    """
    sys.path.extend(peers)
    name, run, needs, limit, warm = CASES[case]
    lengths = np.load(Path(folder) / ("pieces.npy" if needs else "lengths.npy"))[:limit]
    splittable = np.load(Path(folder) / "splittable.npy")
    try:
        run(lengths[:10], splittable[:10], capacity)
        if warm:
            run(lengths[:1000], splittable[:1000], capacity)
    except Exception as error:
        queue.put(f"{name}: {type(error).__name__}: {error}")
        return
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = resident("VmRSS")
    start = time.process_time()
    windows = run(lengths, splittable, capacity)
    first = time.process_time() - start
    memory = resident("VmHWM") - before
    later = []
    for _ in range(LATER_CALLS):
        start = time.process_time()
        run(lengths, splittable, capacity)
        later.append(time.process_time() - start)
    fill = int(lengths.sum(dtype=np.int64)) / windows / capacity
    queue.put((first, statistics.median(later), windows, fill, len(lengths), memory))


def compare(arguments: argparse.Namespace, folder: str, capacity: int) -> None:
    """Print the table for one window."""
    context = multiprocessing.get_context("spawn")  # a fresh heap: freed memory would hide what is taken
    results: dict[str, list[tuple[float, float, int, float, int, float]]] = {}
    missing: set[str] = set()
    for _ in range(arguments.repeats):
        for number, case in enumerate(CASES):
            if arguments.only and not any(word in case.name for word in arguments.only):
                continue
            queue = context.Queue()
            child = context.Process(target=measure, args=(queue, number, arguments.peers, folder, capacity))
            child.start()
            answer = queue.get()
            child.join()
            if isinstance(answer, str):
                missing.add(answer)
            else:
                results.setdefault(case.name, []).append(answer)
    print(
        f"{'packer':26}{'documents':>12}{'M doc/s: first call':>21}{'later':>9}{'fill':>9}{'windows':>11}"
        f"{'bytes/doc':>11}"
    )
    for name, runs in results.items():
        _, _, windows, fill, count, _ = runs[0]
        first, later = (count / statistics.median(run[place] for run in runs) / 1e6 for place in (0, 1))
        memory = statistics.median(run[5] for run in runs) / count
        print(f"{name:26}{count:12,}{first:21.3f}{later:9.3f}{fill:9.5f}{windows:11,}{memory:11.1f}")
    for text in sorted(missing):
        print(f"not run: {text}")


def main() -> None:
    """Measure and print a table for each window."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--documents", type=int, default=1_000_000, help="documents drawn")
    parser.add_argument("--repeats", type=int, default=5, help="calls per case; medians are printed")
    parser.add_argument("--only", nargs="+", default=[], help="words of the names of the packers to run")
    parser.add_argument("--peers", nargs="+", default=[], help="folders with public packers")
    arguments = parser.parse_args()
    for capacity in (5120, 131_072):
        lengths, kind = draw(arguments.documents)
        kept = (lengths <= capacity) | (kind == 0)
        lengths, kind = lengths[kept], kind[kept]
        splittable = kind == 0
        pieces = cut(lengths, capacity)
        tokens = int(lengths.sum(dtype=np.int64))
        whole = least_windows(pieces, capacity)
        cuts = least_windows_with_cuts(
            lengths[~splittable], int(lengths[splittable].sum(dtype=np.int64)), capacity
        )
        print(
            f"window {capacity:,}: {len(lengths):,} documents; fill at most {tokens / whole / capacity:.5f} "
            f"whole, {tokens / cuts / capacity:.5f} with cuts"
        )
        shares = ", ".join(
            f"{name} {image_spread(lengths, kind, capacity, **options):.4f}"
            for name, options in (
                ("in the order given", {"open_windows": 1}),
                ("online", {}),
                ("offline", {"policy": "offline"}),
            )
        )
        print(f"standard deviation of the image share of windows: {shares}")
        with tempfile.TemporaryDirectory() as folder:
            for name, array in (("lengths", lengths), ("splittable", splittable), ("pieces", pieces)):
                np.save(Path(folder) / f"{name}.npy", array)
            compare(arguments, folder, capacity)


if __name__ == "__main__":
    main()
