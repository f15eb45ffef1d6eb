"""Names of documents: the same by number and in order, and none kept in memory."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from emu3_megatron.data import DatasetWriter, MultimodalDataset, ShardWriter, write_manifest
from emu3_megatron.data.names import LINES_BETWEEN
from emu3_megatron.errors import UserError
from tests.data.builders import VOCABULARY


def write(folder: Path, names: list[str], num_shards: int = 1) -> MultimodalDataset:
    with DatasetWriter(folder, "n", vocabulary=VOCABULARY, num_shards=num_shards) as writer:
        for number, name in enumerate(names):
            writer.add_document([(np.array([1]), 0)], name, task=f"t{number}" if number % 2 else None)
    return MultimodalDataset.open(folder)


@pytest.mark.parametrize("documents", [0, 1, LINES_BETWEEN - 1, LINES_BETWEEN, 2 * LINES_BETWEEN, 700])
def test_names_by_number_and_in_order_are_those_written(tmp_path: Path, documents: int) -> None:
    """Ids of every length, and of what JSON has to escape."""
    names = ['ü\u2028\n"' * (number % 5) + str(number) for number in range(documents)]
    dataset = write(tmp_path, names)
    expected = [
        {"id": name, "task": f"t{number}" if number % 2 else None} for number, name in enumerate(names)
    ]
    assert list(dataset.names()) == expected
    assert [dataset.name(number) for number in reversed(range(documents))] == expected[::-1]
    assert list(dataset.find(set(names[::3]))) == list(enumerate(names))[::3]


def test_files_longer_than_what_is_read_at_a_time(tmp_path: Path, monkeypatch) -> None:
    names = [f"{number}" * (number % 7 + 1) for number in range(3 * LINES_BETWEEN + 5)]
    monkeypatch.setattr("emu3_megatron.data.names.READ_BYTES", 101)
    dataset = write(tmp_path, names)
    assert [dataset.sample_id(number) for number in range(len(names))] == names
    assert [name["id"] for name in dataset.names()] == names


def test_names_of_all_documents_are_not_kept(tmp_path: Path) -> None:
    """A page of one step touches documents of every shard; a dict for each line was kept before."""
    documents, shards = 4000, 3
    dataset = write(tmp_path, [f"a/long/path/of/a/picture/{number}" for number in range(documents)], shards)
    dataset.name(0)
    tracemalloc.start()
    try:
        for number in range(0, documents, 50):
            dataset.name(number)
        list_of_one = list(dataset.find({"a/long/path/of/a/picture/9"}))
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(list_of_one) == 1
    assert kept < 10 * documents


def test_names_of_another_writer_are_looked_at(tmp_path: Path, monkeypatch) -> None:
    """A checksum only says that a file is the one that was written."""
    monkeypatch.setattr("emu3_megatron.data.writer._NAMES.encode", lambda _: '"a"')
    with ShardWriter(tmp_path, "n", vocabulary=VOCABULARY) as writer:
        writer.add_document([(np.array([1]), 0)], "x")
    write_manifest(tmp_path, "n", 1, vocabulary=VOCABULARY)
    with pytest.raises(UserError, match=r"n-00000-of-00001\.jsonl: 'a' names no document"):
        MultimodalDataset.open(tmp_path).name(0)
