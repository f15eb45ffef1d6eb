"""Blocks built and windows read per second: ``python benchmarks/plan.py [--documents N] [--blocks N]``.

1. Blocks of a plan, end to end, from the index files of sources of N short documents to published windows:
   documents per CPU second.
2. Windows read at random against plain ``pread`` of the same bytes, by turns: pictures of about 3,600 tokens
   and texts of about 700, in windows of 5,120 and 131,072. ``warm``: from the page cache. ``cold``: the
   kernel was asked to forget them before each turn (``posix_fadvise``; wall time, it waits for the disk).
   A window read is decoded, verified and laid out with its labels and classes, 17 bytes for every 4 on disk.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

import numpy as np

from emu3_megatron.data import DatasetWriter, Mixture, Plan, Source, Template
from emu3_megatron.vocabulary import Vocabulary

VOCABULARY = Vocabulary.preset("tiny")
REPEATS = 5
Ranges = list[tuple[int, int, int]]
"""Descriptor, first byte, bytes."""


def write(folder: Path, name: str, documents: int, text: int, codes: int) -> None:
    """Texts of up to `text` tokens, each before a span of up to `codes` codes where that is not 0."""
    rng = np.random.default_rng(0)
    v = VOCABULARY
    with DatasetWriter(folder, name, vocabulary=v, num_shards=8) as writer:
        for number in range(documents):
            segments = [(np.zeros(int(rng.integers(5, text)), dtype=np.int32), 0)]
            if codes:
                body = np.full(int(rng.integers(codes // 2, codes)), v.vision_offset)
                segments.append((np.concatenate([[v.boi, 49, v.img], body, [v.eoi]]), 1))
            writer.add_document(segments, f"{name}-{number}")


def measure_blocks(folder: Path, documents: int, blocks: int) -> None:
    """Print documents per CPU second of building, publishing included."""
    for source, codes in (("images", 60), ("videos", 600), ("texts", 0)):
        write(folder / source, source, documents, 80, codes)
    sources = [Source(path=str(folder / each)) for each in ("images", "videos", "texts")]
    template = Template(caption_after_probability=0.25, caption_dropout=0.1)
    mixture = Mixture(sources, template=template)
    plan = Plan(mixture, seed=1, context_length=5120, fill=True, cache=folder / "cache")
    plan.block(0)
    seconds = []
    for number in range(1, blocks + 1):
        start = time.process_time()
        plan.block(number)
        seconds.append(time.process_time() - start)
    speeds = [plan.block_draws / each / 1e6 for each in seconds]
    print(
        f"blocks: {statistics.median(speeds):.2f} M documents per CPU second (median of {blocks}; best "
        f"{max(speeds):.2f})"
    )


def ranges_of(plan: Plan, indices: list[int], descriptors: dict[str, int]) -> Ranges:
    """The stored bytes of the documents of windows, in the order of the windows."""
    ranges: Ranges = []
    for index in indices:
        number, local = plan._store.locate(index)
        block = plan.block(number)
        for piece in range(int(block.window_offsets[local]), int(block.window_offsets[local + 1])):
            dataset = plan.mixture.sources[int(block.source[piece])].dataset
            found = dataset._table.locate(block.document[piece : piece + 1])
            path = dataset._indexed[int(found.shard[0])].bin_path
            if path not in descriptors:
                descriptors[path] = os.open(path, os.O_RDONLY)
            ranges.append((descriptors[path], int(found.byte[0]), 4 * int(found.lengths.sum())))
    return ranges


def medians(
    calls: tuple[Callable[[], object], ...], before: Callable[[], object], clock: Callable[[], float]
) -> list[float]:
    """Median seconds of calls that take turns, `before` ahead of each."""
    seconds: list[list[float]] = [[] for _ in calls]
    for _ in range(REPEATS):
        for place, call in enumerate(calls):
            before()
            start = clock()
            call()
            seconds[place].append(clock() - start)
    return [statistics.median(each) for each in seconds]


def measure_windows(folder: Path, documents: int) -> None:
    """Print rates of reading windows, and of pread."""
    write(folder / "pictures", "pictures", documents // 10, 40, 4800)
    write(folder / "prose", "prose", documents // 10, 1400, 0)
    mixture = Mixture([Source(path=str(folder / each)) for each in ("pictures", "prose")])
    for size, count in ((5120, 800), (131_072, 40)):
        plan = Plan(mixture, seed=1, context_length=size, fill=True, block_draws=4 * documents)
        indices = np.random.default_rng(0).integers(0, plan.windows_before(1), count).tolist()
        descriptors: dict[str, int] = {}
        ranges = ranges_of(plan, indices, descriptors)
        total = sum(size for *_, size in ranges)

        def windows(plan: Plan = plan, indices: list[int] = indices) -> None:
            deque(plan.windows(indices), maxlen=0)

        def raw(ranges: Ranges = ranges) -> None:
            for descriptor, first, size in ranges:
                os.pread(descriptor, size, first)

        def forget(descriptors: dict[str, int] = descriptors) -> None:
            for descriptor in descriptors.values():
                os.fdatasync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

        windows()
        for state, before, clock in (
            ("warm", lambda: None, time.process_time),
            ("cold", forget, time.perf_counter),
        ):
            ours, theirs = medians((windows, raw), before, clock)
            print(
                f"windows of {size:,}, {state}: {total / ours / 1e6:.0f} MB/s ({ours / count * 1e6:.0f} us a "
                f"window); pread {total / theirs / 1e6:.0f} MB/s; {theirs / ours:.0%}"
            )
        for descriptor in descriptors.values():
            os.close(descriptor)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--documents", type=int, default=50_000, help="documents of each source")
    parser.add_argument("--blocks", type=int, default=25, help="blocks built")
    parser.add_argument("--folder", help="where to write; a temporary folder by default")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        measure_blocks(Path(name), arguments.documents, arguments.blocks)
        measure_windows(Path(name), arguments.documents)


if __name__ == "__main__":
    main()
