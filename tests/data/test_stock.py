"""Plain text in Megatron's format: no checksums, so its parts are held against each other."""

from __future__ import annotations

import pickle
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emu3_megatron.data import Mixture, Plan, Source, Template
from emu3_megatron.data.format import INDEX_HEADER
from emu3_megatron.data.reader import MultimodalDataset
from emu3_megatron.data.stock import open_stock
from emu3_megatron.errors import UserError
from tests.data.builders import VOCABULARY, write_stock

DOCUMENTS = [[[1, 2, 3]], [[4], [5, 6]], [[7] * 9], [[8, 9]], [[10]], [[11, 12], [13]]]


def texts(dataset: MultimodalDataset) -> list[list[int]]:
    return [np.concatenate([ids for ids, _ in dataset.document(n)]).tolist() for n in range(len(dataset))]


def test_a_flipped_bit_of_an_index_never_changes_a_token(tmp_path: Path) -> None:
    """Every bit of it; a pointer off by one byte gave other ids without a word, a border an IndexError."""
    prefix = tmp_path / "web"
    write_stock(prefix, DOCUMENTS)
    truth = texts(open_stock(prefix, VOCABULARY))
    assert truth == [[*chain(*document)] for document in DOCUMENTS]
    path = Path(f"{prefix}.idx")
    data = path.read_bytes()
    borders = INDEX_HEADER.size + 12 * sum(map(len, DOCUMENTS))
    for place in range(len(data)):
        for bit in range(8):
            path.write_bytes(data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :])
            try:
                read = texts(open_stock(prefix, VOCABULARY))
            except UserError:
                continue
            # A border that stays between its neighbours is as good as another, where nothing has a checksum.
            assert read == truth or place >= borders
            assert [*chain(*read)] == [*chain(*truth)], (place, bit)


@pytest.mark.parametrize("slice_", [1, 2, 3, 1 << 20])
def test_documents_without_tokens_are_passed_over(tmp_path: Path, monkeypatch, slice_: int) -> None:
    """No sequence, or empty ones; whatever the number of entries that are looked at together."""
    monkeypatch.setattr("emu3_megatron.data.stock.SLICE", slice_)
    documents = [[[]], [[1]], [], [[], [2, 3], []], [[4], []], [[], []], [[5] * 7], []]
    prefix = tmp_path / "web"
    write_stock(prefix, documents)
    dataset = pickle.loads(pickle.dumps(open_stock(prefix, VOCABULARY)))
    assert texts(dataset) == [[1], [2, 3], [4], [5] * 7]
    assert dataset.describe(np.arange(4)).length.tolist() == [1, 2, 1, 7]
    (record,) = dataset.manifest.shards
    assert (record.documents, record.tokens, record.longest_document) == (4, 11, 7)
    template = Template(bos=False, eos=False)
    mixture = Mixture([Source(path=str(prefix), template=template)], vocabulary=VOCABULARY)
    window = Plan(mixture, seed=1, context_length=11, block_draws=4).window(0)
    assert sorted(window.tokens.tolist()) == [1, 2, 3, 4, *[5] * 7]
    write_stock(prefix, [[[]], [], [[], []]])
    with pytest.raises(UserError, match="no documents"):
        Mixture([Source(path=str(prefix))], vocabulary=VOCABULARY)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.lists(st.integers(0, 255), max_size=4), max_size=3), min_size=1, max_size=12))
def test_what_is_written_is_read(tmp_path_factory, documents: list[list[list[int]]]) -> None:
    prefix = tmp_path_factory.mktemp("stock") / "web"
    write_stock(prefix, documents)
    expected = [[*chain(*document)] for document in documents]
    dataset = open_stock(prefix, VOCABULARY)
    assert texts(dataset) == [tokens for tokens in expected if tokens]
    lengths = dataset.describe(np.arange(len(dataset))).length
    assert lengths.tolist() == [len(tokens) for tokens in expected if tokens]
    assert dataset.manifest.shards[0].longest_document == max(map(len, expected))
