"""Windows: what C++ reads and lays out is what the template says, and damage never becomes a token."""

from __future__ import annotations

import pickle
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from emu3_megatron import _kernels
from emu3_megatron.data import (
    DatasetWriter,
    Mixture,
    MultimodalDataset,
    Plan,
    Source,
    Template,
    Window,
    reader,
)
from emu3_megatron.data import plan as plan_module
from emu3_megatron.data.format import PROMPT_MODE, SPAN_MODE, TEXT_MODE, crc32c
from emu3_megatron.data.index import ShardIndex
from emu3_megatron.data.permutation import uniform
from emu3_megatron.data.reader import FileCache
from emu3_megatron.data.window import Canvas
from emu3_megatron.errors import UserError
from tests.data.builders import VOCABULARY, make_span, make_text
from tests.data.keyed_reference import uniform_reference

CONTEXT_LENGTH = 1024


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pairs, texts (some longer than a window), interleaved documents, conversations; two-page indices."""
    rng = np.random.default_rng(0)
    with DatasetWriter(tmp_path / "all", "all", vocabulary=VOCABULARY, num_shards=2) as writer:
        for number in range(4000):
            text, span = make_text(rng, int(rng.integers(1, 40))), make_span(rng, int(rng.integers(4, 30)))
            end = np.array([VOCABULARY.eos])
            documents = [
                [(text, TEXT_MODE), (span, SPAN_MODE)],
                [(make_text(rng, 3000 if number % 100 == 1 else 9), TEXT_MODE)],
                [(span, SPAN_MODE), (text, TEXT_MODE), (span, SPAN_MODE)],
                [
                    (text, PROMPT_MODE),
                    (np.concatenate([text, end]), TEXT_MODE),
                    (span, PROMPT_MODE),
                    (text, 0),
                ],
            ]
            writer.add_document(documents[number % 4], f"all-{number}")
    return tmp_path / "all"


def plan_of(folder: Path, **options: object) -> Plan:
    template = Template(caption_after_probability=0.5, caption_dropout=0.3, bos=False)
    mixture = Mixture([Source(path=str(folder), template=template), Source(path=str(folder), name="again")])
    return Plan(mixture, seed=1, context_length=CONTEXT_LENGTH, block_draws=2048, **options)  # type: ignore[arg-type]


def reference(plan: Plan, window: Window) -> Canvas:
    """The window's arrays from its documents, rendered one by one in numpy."""
    number, local = plan._store.locate(window.index)
    block = plan.block(number)
    first = int(block.window_offsets[local])
    canvas = Canvas(CONTEXT_LENGTH, VOCABULARY.pad)
    for place in np.flatnonzero(window.source >= 0).tolist():
        source = plan.mixture.sources[window.source[place]]
        ids, modality = source.template.assemble(
            source.dataset.document(int(window.document[place])),
            VOCABULARY,
            caption_after=bool(block.caption_after[first + place]),
            caption_tokens=int(block.caption_tokens[first + place]),
        )
        start, length = int(window.start[place]), int(window.length[place])
        canvas.write(ids, modality, start=start, length=length, at=int(window.cu_seqlens[place]))
    return canvas


@pytest.mark.parametrize("alignment", [1, 8])
def test_windows_equal_the_reference(folder: Path, alignment: int) -> None:
    plan = plan_of(folder, alignment=alignment, fill=True)
    splits = 0
    for index in range(0, 120, 3):
        window = plan.window(index)
        expected = reference(plan, window)
        for name in ("tokens", "labels", "modality"):
            assert np.array_equal(getattr(window, name), getattr(expected, name)), (index, name)
        splits += int(np.count_nonzero(window.start))
    assert splits > 0


@pytest.mark.parametrize("together", [1, 3, 1000])
def test_windows_read_together_are_those_read_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch, together: int
) -> None:
    """In any order, twice, from several blocks, with and without padding at their ends."""
    monkeypatch.setattr(plan_module, "GROUP_TOKENS", together * CONTEXT_LENGTH)
    plan = plan_of(folder, alignment=8)
    indices = np.random.default_rng(0).integers(0, plan.windows_before(3), 60).tolist()
    windows = list(plan.windows(indices))
    assert [window.index for window in windows] == indices
    assert {int(window.source[-1]) for window in windows} >= {-1, 0}
    for index, window in zip(indices, windows, strict=True):
        alone = plan.window(index)
        for field in fields(Window):
            values, expected = getattr(window, field.name), getattr(alone, field.name)
            assert np.array_equal(values, expected), (index, field.name)
            assert np.asarray(values).dtype == np.asarray(expected).dtype, field.name
    assert list(plan.windows([])) == []


def test_windows_of_more_files_than_may_be_open(folder: Path) -> None:
    plan, narrow = plan_of(folder), plan_of(folder)
    for source in narrow.mixture.sources:
        source.dataset._files = FileCache(1)
    for index in range(20):
        assert np.array_equal(plan.window(index).tokens, narrow.window(index).tokens)
        assert len(narrow.mixture.sources[0].dataset._files) <= 1


def test_a_damaged_document_is_named_and_gives_no_window(folder: Path) -> None:
    """Flipped while the plan is open, and then cut off."""
    plan = plan_of(folder)
    truth = plan.window(0)
    path = folder / "all-00001-of-00002.bin"
    sound = path.read_bytes()
    damaged = np.frombuffer(sound, dtype=np.uint8) ^ np.uint8(16)
    path.write_bytes(damaged.tobytes())
    with pytest.raises(
        UserError, match=r"all-00001-of-00002\.bin: sequence \d+ .* does not match its checksum"
    ):
        plan.window(0)
    path.write_bytes(sound[:100])
    with pytest.raises(UserError, match=r"all-00001-of-00002\.bin: has no byte"):
        plan.window(0)
    path.write_bytes(sound)
    assert np.array_equal(plan.window(0).tokens, truth.tokens)


def test_a_file_that_cannot_be_read_is_an_error_of_the_system(folder: Path) -> None:
    """Told apart from a truncated one; a folder in the file's place can be opened, but not read."""
    plan = plan_of(folder)
    path = folder / "all-00001-of-00002.bin"
    path.unlink()
    path.mkdir()
    with pytest.raises(IsADirectoryError, match=r"all-00001-of-00002\.bin"):
        plan.window(0)


def write_pieces(tmp_path: Path, ids: list[int], **changed: Any) -> tuple[int, int, int]:
    """What a writer says about one document of a single span, with some of its columns changed."""
    stored = np.array(ids, dtype="<i4").tobytes()
    (tmp_path / "document").write_bytes(stored)
    columns: dict[str, Any] = {
        "bytes": np.zeros(1, dtype=np.int64),
        "segments": np.array([0, 1]),
        "lengths": np.array([len(ids)], dtype=np.int32),
        "modes": np.array([SPAN_MODE], dtype=np.int8),
        "checksums": np.array([crc32c(stored)], dtype=np.uint32),
        "caption_after": np.zeros(1, dtype=bool),
        "caption_tokens": np.zeros(1, dtype=np.int32),
        "start": np.zeros(1, dtype=np.int32),
        "length": np.array([len(ids)], dtype=np.int32),
        "at": np.zeros(1, dtype=np.int64),
    }
    writer = Canvas(CONTEXT_LENGTH, VOCABULARY.pad).writer(VOCABULARY)
    with open(tmp_path / "document", "rb") as stream:
        files = np.array([stream.fileno()], dtype=np.int32)
        return writer.add(**{**columns, "files": files, **changed}, bos=True, eos=True)


@pytest.mark.parametrize("unknown", [-1, -7, VOCABULARY.size])
def test_an_id_outside_the_vocabulary_is_reported_with_its_value(tmp_path: Path, unknown: int) -> None:
    assert write_pieces(tmp_path, [VOCABULARY.boi, unknown, VOCABULARY.eoi])[1:] == (4, unknown)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"lengths": np.array([-3], dtype=np.int32)}, "lengths of segments .* got -3"),
        ({"caption_tokens": np.array([-1], dtype=np.int32)}, "caption_tokens .* got -1"),
        (
            {
                "files": np.zeros(2, dtype=np.int32),
                "segments": np.array([0, 2, 1]),
                "caption_after": np.zeros(2, dtype=bool),
                "caption_tokens": np.zeros(2, dtype=np.int32),
                "start": np.zeros(2, dtype=np.int32),
                "length": np.ones(2, dtype=np.int32),
                "at": np.zeros(2, dtype=np.int64),
            },
            "ascend",
        ),
    ],
)
def test_columns_that_no_document_has_are_refused(
    tmp_path: Path, changed: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        write_pieces(tmp_path, [VOCABULARY.boi, VOCABULARY.eoi], **changed)


@pytest.mark.parametrize("name", ["tokens", "labels", "modality"])
def test_arrays_that_may_not_be_written_are_refused(name: str) -> None:
    canvas = Canvas(8, VOCABULARY.pad)
    getattr(canvas, name).flags.writeable = False
    with pytest.raises(ValueError, match="not writeable"):
        canvas.writer(VOCABULARY)


def test_threads_that_open_the_same_index_share_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening takes long enough for all to ask meanwhile."""
    begun: list[object] = []

    class Slow(ShardIndex):
        def __init__(self, *arguments: object) -> None:
            begun.append(self)
            time.sleep(0.05)
            super().__init__(*arguments)  # type: ignore[arg-type]

    expected = MultimodalDataset.open(folder).describe(np.arange(4000))
    monkeypatch.setattr(reader, "ShardIndex", Slow)
    dataset = MultimodalDataset.open(folder)
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(dataset.describe, [np.arange(4000)] * 8, timeout=30))
    assert len(begun) == len(dataset.shards)
    for answer in answers:
        for found, truth in zip(answer, expected, strict=True):
            assert np.array_equal(found, truth)
    again = pickle.loads(pickle.dumps(dataset))
    assert np.array_equal(again.describe(np.arange(4000))[0], expected[0])


def test_a_shard_keeps_the_index_that_it_was_given_first(folder: Path) -> None:
    """Another thread may be reading from it."""
    record = MultimodalDataset.open(folder).manifest.shards[0]
    table = _kernels.ShardIndices(np.array([0, record.documents]))
    stem = folder / record.shard

    def opened() -> ShardIndex:
        return ShardIndex(stem.with_name(f"{stem.name}.idx"), stem.with_name(f"{stem.name}.crc"), record)

    first, second = opened(), opened()
    first.add_to(table, 0)
    for page in range(2):
        first.verify_page(page)
    second.add_to(table, 0)
    missing = table.describe(np.arange(record.documents))[-1]
    assert missing == []


def test_every_page_of_an_index_is_verified_before_it_is_used(folder: Path) -> None:
    path = folder / "all-00001-of-00002.idx"
    truth = MultimodalDataset.open(folder).describe(np.arange(4000))
    data = bytearray(path.read_bytes())
    assert len(data) > 1 << 16
    data[-1] ^= 1  # the mode of the last sequence
    path.write_bytes(data)
    dataset = MultimodalDataset.open(folder)
    first = int(dataset._starts[1])
    for whole, part in zip(truth, dataset.describe(np.arange(first)), strict=True):
        assert np.array_equal(whole[:first], part)
    with pytest.raises(UserError, match=r"all-00001-of-00002\.idx: page 1 "):
        dataset.describe(np.array([3999]))
    with pytest.raises(UserError, match=r"all-00001-of-00002\.idx: page 1 "):
        dataset._table.locate(np.array([3999]))


def test_uniform_equals_the_reference() -> None:
    positions = np.random.default_rng(0).integers(0, 2**62, 1000)
    for key in (0, 7, 2**64 - 1):
        assert np.array_equal(uniform(key, positions), uniform_reference(key, positions))
