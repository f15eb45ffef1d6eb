"""Datasets on disk: what is written is read, by us and by megatron-core; a kill leaves nothing half done."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from emu3_megatron.data import (
    DatasetWriter,
    Manifest,
    Mixture,
    MultimodalDataset,
    Plan,
    ShardWriter,
    Source,
    read_shard_record,
    write_manifest,
)
from emu3_megatron.errors import UserError
from emu3_megatron.vocabulary import Vocabulary
from tests.data.builders import VOCABULARY, make_span, make_text


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def documents_of(rng: np.random.Generator, count: int) -> list[list[tuple[np.ndarray, int]]]:
    return [
        [(make_text(rng, 1 + number % 7), 0), (make_span(rng, 3 + number % 11), 1)] for number in range(count)
    ]


def test_what_is_written_is_read(tmp_path: Path) -> None:
    documents = documents_of(np.random.default_rng(1), 25)
    with DatasetWriter(tmp_path, "a", vocabulary=VOCABULARY, num_shards=3) as writer:
        for number, document in enumerate(documents):
            writer.add_document(document, f"s{number}", task="t2i")
    dataset = MultimodalDataset.open(tmp_path, vocabulary=VOCABULARY, open_files=2)
    assert len(dataset) == 25
    read = {dataset.sample_id(number): dataset.document(number) for number in range(25)}
    for number, document in enumerate(documents):
        for (ids, mode), (expected, expected_mode) in zip(read[f"s{number}"], document, strict=True):
            assert mode == expected_mode
            assert ids.dtype == np.int32
            np.testing.assert_array_equal(ids, expected)
    assert dataset.name(0) == {"id": "s0", "task": "t2i"}
    assert dataset.manifest.num_tokens == sum(len(ids) for each in documents for ids, _ in each)


def test_texts_together_are_written_as_one_by_one(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    texts = [
        make_text(rng, 1 + number % 7).astype(np.uint16 if number % 2 else np.int64) for number in range(25)
    ]
    names = [f"名 {number}" for number in range(25)]
    span = make_span(rng, 3)
    for folder in ("one", "all"):
        with ShardWriter(tmp_path / folder, "a", vocabulary=VOCABULARY) as writer:
            writer.add_document([(span, 1)], "first")
            if folder == "all":
                writer.add_texts(texts[:20], names[:20])
                writer.add_texts([], [])
                writer.add_texts(texts[20:], names[20:])
            else:
                for ids, name in zip(texts, names, strict=True):
                    writer.add_document([(ids, 0)], name)
            for bad, name in ((texts[0][:0], "x"), (texts[0], ""), (np.array([VOCABULARY.size]), "x")):
                with pytest.raises(UserError, match="document"):
                    writer.add_texts([texts[1], bad], ["y", name])
            writer.add_document([(span, 1)], "last")
    assert digests(tmp_path / "one") == digests(tmp_path / "all")


def test_stock_megatron_reads_the_same_tokens_and_modes(make_dataset) -> None:
    from megatron.core.datasets import indexed_dataset as indexed

    folder = make_dataset("a", "ptic", 31, num_shards=2)
    ours = MultimodalDataset.open(folder)
    for shard in ours.shards:
        stem = str(shard.path(""))
        theirs = indexed.IndexedDataset(stem, multimodal=True, mmap=True)
        assert len(theirs.document_indices) == len(shard) + 1
        sequence = 0
        for number in range(len(shard)):
            assert theirs.document_indices[number] == sequence
            for ids, mode in shard.document(number):
                their_ids, their_mode = theirs[sequence]
                np.testing.assert_array_equal(their_ids, ids)
                assert their_mode == mode
                sequence += 1
        assert sequence == len(theirs)


def test_stock_megatron_text_is_a_source(make_dataset, tmp_path: Path) -> None:
    """Written by megatron-core's builder: the same tokens through a mixture's windows; sizes are checked."""
    import torch
    from megatron.core.datasets import indexed_dataset as indexed

    rng = np.random.default_rng(0)
    documents = [rng.integers(0, VOCABULARY.text_size, 5 + 3 * number) for number in range(20)]
    prefix = tmp_path / "corpus_text_document"
    builder = indexed.IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for ids in documents:
        builder.add_document(torch.from_numpy(ids), [2, len(ids) - 2])
    builder.finalize(f"{prefix}.idx")
    mixture = Mixture([Source(path=str(prefix)), Source(path=str(make_dataset("a", "p", 10)))])
    text = pickle.loads(pickle.dumps(mixture.sources[0].dataset))
    assert [np.concatenate([ids for ids, _ in text.document(n)]).tolist() for n in range(20)] == [
        ids.tolist() for ids in documents
    ]
    assert text.sample_id(3) == "corpus_text_document:3"
    plan = Plan(mixture, seed=1, context_length=128, block_draws=64)
    for index in range(20):
        window = plan.window(index)
        for place in np.flatnonzero(window.source == 0).tolist():
            here = window.cu_seqlens[place] + np.arange(window.length[place])
            rendered = [VOCABULARY.bos, *documents[int(window.document[place])], VOCABULARY.eos]
            start = int(window.start[place])
            assert window.tokens[here].tolist() == rendered[start : start + len(here)]
    with pytest.raises(UserError, match="do not say what their ids mean"):
        Mixture([Source(path=str(prefix))])
    small = Vocabulary.build("small", text_size=20, codebook_size=4)
    other = Mixture([Source(path=str(prefix))], vocabulary=small).sources[0].dataset
    with pytest.raises(UserError, match=r"document 0 has ids .* made with another tokenizer"):
        other.document(0)
    with open(f"{prefix}.bin", "r+b") as stream:
        stream.truncate(40)
    with pytest.raises(UserError, match=r"corpus_text_document\.bin: 40 bytes, but"):
        Mixture([Source(path=str(prefix))], vocabulary=VOCABULARY)


def test_the_reader_in_the_documentation_reads_the_same(make_dataset) -> None:
    """docs/data-format.md holds a reader that needs numpy alone; it is run as printed."""
    text = (Path(__file__).parents[2] / "docs" / "data-format.md").read_text()
    code = text.split('```python title="reader.py"\n', 1)[1].split("```", 1)[0]
    assert len(code.splitlines()) < 60
    scope: dict[str, object] = {}
    exec(code, scope)
    folder = make_dataset("a", "ptic", 20)
    ours = MultimodalDataset.open(folder)
    theirs = list(scope["read_dataset"](folder))  # type: ignore[operator]
    assert len(theirs) == len(ours)
    for number, (name, segments) in enumerate(theirs):
        assert name == ours.sample_id(number)
        for (ids, mode), (expected, expected_mode) in zip(segments, ours.document(number), strict=True):
            np.testing.assert_array_equal(ids, expected)
            assert mode == expected_mode


def test_rerun_gives_identical_bytes(make_dataset) -> None:
    folder = make_dataset("a", "pti", 30)
    before = digests(folder)
    make_dataset("a", "pti", 30)
    assert digests(folder) == before


def test_shards_by_other_processes_give_the_same_dataset(tmp_path: Path) -> None:
    """The order in which shards are written, and by whom, leaves no trace."""
    documents = documents_of(np.random.default_rng(1), 12)
    for folder, order in (("x", (0, 1, 2)), ("y", (2, 0, 1))):
        for shard in order:
            with ShardWriter(
                tmp_path / folder, "a", shard=shard, num_shards=3, vocabulary=VOCABULARY
            ) as writer:
                for number in range(shard, 12, 3):
                    writer.add_document(documents[number], f"s{number}")
        write_manifest(tmp_path / folder, "a", 3, vocabulary=VOCABULARY)
    assert digests(tmp_path / "x") == digests(tmp_path / "y")


def test_exception_leaves_no_trace(tmp_path: Path) -> None:
    def fail() -> None:
        with DatasetWriter(tmp_path, "a", vocabulary=VOCABULARY) as writer:
            writer.add_document([(np.arange(3), 0)], "s")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list(tmp_path.iterdir()) == []


WRITE_FOREVER = """
import sys, numpy as np
from emu3_megatron.data import ShardWriter
from emu3_megatron.vocabulary import Vocabulary
with ShardWriter(sys.argv[1], "a", vocabulary=Vocabulary.preset("tiny")) as writer:
    number = 0
    while True:
        writer.add_document([(np.arange(200), 0)], f"s{number}")
        number += 1
        if number == 5000:
            print("writing", flush=True)
"""


def test_killed_writer_leaves_nothing_that_looks_finished(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", WRITE_FOREVER, str(tmp_path)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert all(path.name.startswith(".") for path in tmp_path.iterdir())
    assert read_shard_record(tmp_path, "a", 0, 1) is None
    with pytest.raises(UserError, match="not finished"):
        write_manifest(tmp_path, "a", 1, vocabulary=VOCABULARY)


def test_record_is_the_sign_of_a_finished_shard(make_dataset) -> None:
    folder = make_dataset("a", "p", 10)
    assert read_shard_record(folder, "a", 1, 2) is not None
    stem = folder / "a-00001-of-00002"
    (folder / (stem.name + ".bin")).write_bytes(b"")
    assert read_shard_record(folder, "a", 1, 2) is None
    with ShardWriter(folder, "a", shard=1, num_shards=2, vocabulary=VOCABULARY) as writer:
        # Rewriting withdraws the record and the manifest before anything else.
        assert not (folder / (stem.name + ".json")).exists()
        assert not (folder / "manifest.json").exists()
        writer.add_document([(np.arange(3), 0)], "s")


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ([], "no segments"),
        ([(np.array([], dtype=np.int64), 0)], "not empty"),
        ([(np.array([0.5]), 0)], "integer"),
        ([(np.array([[1]]), 0)], "one-dimensional"),
        ([(np.array([VOCABULARY.size]), 0)], "do not fit vocabulary 'tiny'"),
        ([(np.array([-1]), 0)], "do not fit"),
        ([(np.array([1, 2]), 1)], "must begin with BOI"),
        ([(np.array([1, 2]), 3)], "mode 3"),
        ([(np.array([1, 2]), 4)], "mode 4"),
    ],
)
def test_bad_documents_are_refused_and_leave_no_trace(
    tmp_path: Path, segments: list[tuple[np.ndarray, int]], message: str
) -> None:
    with DatasetWriter(tmp_path, "a", vocabulary=VOCABULARY) as writer:
        writer.add_document([(np.arange(3), 0)], "good")
        with pytest.raises(UserError, match=message):
            writer.add_document([(np.arange(5), 0), *segments] if segments else [], "bad")
        with pytest.raises(UserError, match="sample_id"):
            writer.add_document([(np.arange(3), 0)], "")
    dataset = MultimodalDataset.open(tmp_path)
    assert len(dataset) == 1
    assert dataset.manifest.num_tokens == 3


def test_empty_shards_are_shards(tmp_path: Path) -> None:
    with DatasetWriter(tmp_path, "a", vocabulary=VOCABULARY, num_shards=3) as writer:
        writer.add_document([(np.arange(3), 0)], "only")
    dataset = MultimodalDataset.open(tmp_path)
    assert [len(shard) for shard in dataset.shards] == [1, 0, 0]
    np.testing.assert_array_equal(dataset.document(0)[0][0], np.arange(3))


def test_manifest_names_what_a_dataset_is(tmp_path: Path) -> None:
    with DatasetWriter(
        tmp_path, "a", vocabulary=VOCABULARY, dialect_name="emu3", dialect_fingerprint="d",
        text_tokenizer_fingerprint="t", vision_tokenizer_fingerprint="v", provenance={"from": "here"},
    ) as writer:  # fmt: skip
        writer.add_document([(np.arange(3), 0)], "s")
    manifest = Manifest.load(tmp_path)
    assert manifest.vocabulary == VOCABULARY
    assert (manifest.dialect_name, manifest.dialect_fingerprint) == ("emu3", "d")
    assert (manifest.text_tokenizer_fingerprint, manifest.vision_tokenizer_fingerprint) == ("t", "v")
    assert manifest.provenance == {"from": "here"}
    fields = json.loads((tmp_path / "manifest.json").read_text())
    for suffix, entry in fields["shards"][0]["files"].items():
        data = (tmp_path / ("a-00000-of-00001" + suffix)).read_bytes()
        assert entry == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def test_shards_of_another_vocabulary_make_no_dataset(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "a", vocabulary=VOCABULARY) as writer:
        writer.add_document([(np.arange(3), 0)], "s")
    with pytest.raises(UserError, match="another vocabulary"):
        write_manifest(tmp_path, "a", 1, vocabulary=Vocabulary.preset("emu3"))
