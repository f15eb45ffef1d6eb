"""Defects found in a well-known data path, each with a test that this one does not share them.

Short reads that become tokens are in test_faults.py (`test_file_truncated_while_open_is_an_error`), asserts
on input and a held GIL in test_packing.py, a dead worker in the tests of tokenization.
"""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from emu3_megatron.data import Mixture, MultimodalDataset, Plan, ShardWriter, Source
from emu3_megatron.data.mixture import MAX_SOURCES, OpenSource
from emu3_megatron.data.plan import SHARE_BITS
from emu3_megatron.errors import UserError
from tests.data.builders import VOCABULARY


def test_modes_of_many_sequences_can_be_read(make_dataset) -> None:
    """There: an assert on the truth of an array."""
    dataset = MultimodalDataset.open(make_dataset("a", "i", 12, num_shards=1))
    kinds = dataset.describe(np.arange(12))[2]
    assert kinds.tolist() == [2] * 12
    assert [mode for _, mode in dataset.document(3)] == [0, 1, 0, 1]


def test_draws_are_counted_exactly_far_into_a_run(make_dataset) -> None:
    """There: sample counts in 32-bit floats, wrong from 2^23 on."""
    folders = make_dataset("a", "p", 30), make_dataset("b", "t", 20, text=60)
    plan = Plan(
        Mixture([Source(path=str(folders[0]), weight=3), Source(path=str(folders[1]))]),
        seed=1, context_length=128, block_draws=64,
    )  # fmt: skip
    far = 10**12 + 7
    shares = [Fraction(share, 2**SHARE_BITS) for share in plan._shares]
    counted = [len(each.document) for each in plan._draw(far)]
    exact = [int(share * 64 * (far + 1)) - int(share * 64 * far) for share in shares]
    assert counted == exact
    assert abs(sum(counted) - 64) <= 1


def test_more_sources_than_their_number_can_say_are_refused() -> None:
    """There: the 16-bit number of a dataset wraps round to negative ones."""
    with pytest.raises(UserError, match=f"1 to {MAX_SOURCES} sources, got {MAX_SOURCES + 1}"):
        Mixture([Source(path="nowhere")] * (MAX_SOURCES + 1))


def test_a_block_asks_every_source_once(make_dataset, monkeypatch) -> None:
    """There: building the blend takes time in samples times datasets."""
    folders = [make_dataset(name, "p", 12) for name in "abc"]
    plan = Plan(Mixture([Source(path=str(folder)) for folder in folders]), seed=1, context_length=128)
    calls = []
    draw = OpenSource.draw
    monkeypatch.setattr(
        OpenSource, "draw", lambda self, *a, **k: calls.append(self.name) or draw(self, *a, **k)
    )
    plan.block(5)
    assert calls == ["a", "b", "c"]


def test_lengths_cannot_disagree_with_tokens(make_dataset, tmp_path: Path) -> None:
    """There: lengths are given beside the tokens and never added up, and sizes are never compared."""
    with ShardWriter(tmp_path / "x", "x", vocabulary=VOCABULARY) as writer:
        writer.add_document([(np.arange(7), 0), (np.arange(5), 0)], "s")
    assert (tmp_path / "x/x-00000-of-00001.bin").stat().st_size == 4 * 12
    folder = make_dataset("a", "p", 6, num_shards=1)
    with open(folder / "a-00000-of-00001.bin", "ab") as stream:
        stream.write(b"\0" * 4)
    with pytest.raises(UserError, match=r"a-00000-of-00001\.bin: .* were written"):
        MultimodalDataset.open(folder)


def test_shards_beyond_the_limit_of_open_files(make_dataset) -> None:
    """There: a blend of many shards holds every file open, and runs out of descriptors."""
    dataset = MultimodalDataset.open(make_dataset("a", "p", 120, num_shards=60), open_files=4)
    before = len(os.listdir("/proc/self/fd"))
    dataset.describe(np.arange(120))
    for number in range(120):
        dataset.document(number)
    assert len(os.listdir("/proc/self/fd")) <= before + 4
