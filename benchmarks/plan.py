"""Blocks built and windows read per second: ``python benchmarks/plan.py [--documents N] [--blocks N]``.

Writes sources of N short documents each to a temporary folder, then measures (1) building plan blocks end to
end, from index files to published windows, in documents per CPU second, and (2) reading windows at random
against plain ``pread`` of the same bytes, page cache warm.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from emu3_megatron.data import DatasetWriter, Mixture, Plan, Source, Template
from emu3_megatron.vocabulary import Vocabulary

VOCABULARY = Vocabulary.preset("tiny")


def write(folder: Path, name: str, documents: int, codes: int) -> None:
    """Pairs whose spans have up to `codes` codes, or texts where `codes` is 0."""
    rng = np.random.default_rng(0)
    v = VOCABULARY
    with DatasetWriter(folder, name, vocabulary=v, num_shards=8) as writer:
        for number in range(documents):
            segments = [(np.zeros(int(rng.integers(5, 80)), dtype=np.int32), 0)]
            if codes:
                body = np.full(int(rng.integers(codes // 2, codes)), v.vision_offset)
                segments.append((np.concatenate([[v.boi, 49, v.img], body, [v.eoi]]), 1))
            writer.add_document(segments, f"{name}-{number}")


def read_raw(plan: Plan, indices: list[int]) -> int:
    """Bytes of the documents of windows, by pread alone."""
    total = 0
    descriptors: dict[str, int] = {}
    for index in indices:
        number, local = plan._store.locate(index)
        block = plan.block(number)
        for piece in range(int(block.window_offsets[local]), int(block.window_offsets[local + 1])):
            dataset = plan.mixture.sources[int(block.source[piece])].dataset
            shard, document = dataset._locate(int(block.document[piece]))
            _, start, lengths, _ = shard._index.document(document)
            descriptor = descriptors.setdefault(shard._bin, os.open(shard._bin, os.O_RDONLY))
            total += len(os.pread(descriptor, 4 * sum(lengths), start))
    for descriptor in descriptors.values():
        os.close(descriptor)
    return total


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--documents", type=int, default=50_000, help="documents of each source")
    parser.add_argument("--blocks", type=int, default=9, help="blocks built")
    parser.add_argument("--windows", type=int, default=100, help="windows read")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for source, codes in (("images", 60), ("videos", 600), ("texts", 0)):
            write(folder / source, source, arguments.documents, codes)
        sources = [Source(path=str(folder / each)) for each in ("images", "videos", "texts")]
        template = Template(caption_after_probability=0.25, caption_dropout=0.1)
        plan = Plan(
            Mixture(sources, template=template),
            seed=1,
            context_length=5120,
            fill=True,
            cache=folder / "cache",
        )
        plan.block(0)
        seconds = []
        for number in range(1, arguments.blocks + 1):
            start = time.process_time()
            plan.block(number)
            seconds.append(time.process_time() - start)
        speed = plan.block_draws / statistics.median(seconds) / 1e6
        print(f"blocks: {speed:.2f} M documents per CPU second (median of {arguments.blocks})")
        indices = np.random.default_rng(0).integers(0, plan.windows_before(1), arguments.windows).tolist()
        for index in indices:
            plan.window(index)
        start = time.process_time()
        for index in indices:
            plan.window(index)
        ours = time.process_time() - start
        start = time.process_time()
        total = read_raw(plan, indices)
        raw = time.process_time() - start
        print(
            f"windows: {total / ours / 1e6:.0f} MB/s; the same bytes by pread: {total / raw / 1e6:.0f} MB/s"
        )


if __name__ == "__main__":
    main()
