"""What a plan keeps beside a run: a damaged byte of it never changes a window."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from emu3_megatron.data import Mixture, Plan, Source
from emu3_megatron.data.block import Block, BlockCache

DRAWS = 1 << 14
"""Documents of a block whose arrays are longer than what is read ahead of a member's end."""

HEADER_BYTES = 300
"""From the beginning of a member: the zip's header, the array's, and some of its values."""


def plan_of(folder: Path, cache: Path) -> Plan:
    mixture = Mixture([Source(path=str(folder))])
    return Plan(mixture, seed=1, context_length=128, block_draws=DRAWS, cache=cache)


def kept_block(folder: Path, cache: Path) -> tuple[Path, BlockCache, Block]:
    plan = plan_of(folder, cache)
    truth = plan.block(0)
    (path,) = cache.rglob("block-*.npz")
    return path, BlockCache(cache, plan.fingerprint), truth


def places_of_headers(path: Path) -> list[int]:
    """Bytes of the members' beginnings, and of the zip's directory at the end."""
    with zipfile.ZipFile(path) as archive:
        begins = [member.header_offset for member in archive.infolist()]
        directory = archive.start_dir
    first = {place for begin in begins for place in range(begin, min(begin + HEADER_BYTES, directory))}
    return sorted(first | set(range(directory, path.stat().st_size)))


def equal(left: Block, right: Block) -> bool:
    return all(np.array_equal(values, right.arrays()[name]) for name, values in left.arrays().items())


def flipped(path: Path, bits: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Every one of these bits (byte, number), flipped in the file while it is looked at."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        for place, bit in bits:
            (byte,) = os.pread(descriptor, 1, place)
            os.pwrite(descriptor, bytes([byte ^ 1 << bit]), place)
            yield place, bit
            os.pwrite(descriptor, bytes([byte]), place)
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("sample", [600, pytest.param(0, marks=pytest.mark.slow)])
def test_a_flipped_bit_of_a_kept_block_is_found(make_dataset, tmp_path: Path, sample: int) -> None:
    """The block as it was, where the bit says nothing of it, or none; never another one, nor an error."""
    path, cache, truth = kept_block(make_dataset("a", "ptc", 60), tmp_path / "cache")
    bits = [(place, bit) for place in places_of_headers(path) for bit in range(8)]
    if sample:
        chosen = np.random.default_rng(0).choice(len(bits), sample, replace=False)
        bits = [bits[number] for number in sorted(chosen.tolist())]
    lost = 0
    for where in flipped(path, bits):
        block = cache.load(0, truth.num_windows)
        lost += block is None
        assert block is None or equal(block, truth), where
    assert lost > len(bits) // 2


def test_lengths_of_headers_cannot_shift_an_array(make_dataset, tmp_path: Path) -> None:
    """Of each array, the bits of the two bytes that say how long its header is; the block is built again."""
    folder = make_dataset("a", "ptc", 60)
    path, cache, truth = kept_block(folder, tmp_path / "cache")
    data = path.read_bytes()
    lengths = [place + 8 for place in range(len(data)) if data.startswith(b"\x93NUMPY\x01\x00", place)]
    assert len(lengths) == len(truth.arrays())
    bits = [(place + byte, bit) for place in lengths for byte in (0, 1) for bit in range(8)]
    for where in flipped(path, bits):
        assert cache.load(0, truth.num_windows) is None, where
    windows = [plan_of(folder, tmp_path / "other").window(index).tokens for index in range(8)]
    for place in lengths:
        path.write_bytes(data[:place] + bytes([data[place] ^ 1 << 4]) + data[place + 1 :])
        again = plan_of(folder, tmp_path / "cache")
        assert all(np.array_equal(again.window(i).tokens, windows[i]) for i in range(8)), place
        assert path.read_bytes() == data


def test_a_flipped_bit_of_a_kept_mean_is_found(make_dataset, tmp_path: Path) -> None:
    """The mean decides how often a source is drawn, and stands in no fingerprint."""
    folder = make_dataset("a", "pt", 20)
    mixture = Mixture([Source(path=str(folder))])
    truth = mixture.sources[0].mean_tokens(capacity=128, cache=tmp_path)
    (path,) = tmp_path.glob("mean-*.json")
    data = path.read_bytes()
    for place in range(data.index(b"mean_tokens"), len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        assert mixture.sources[0].mean_tokens(capacity=128, cache=tmp_path) == truth, place
