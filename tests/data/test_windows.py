"""Windows: what C++ reads and lays out is what the template says, and damage never becomes a token."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from emu3_megatron.data import DatasetWriter, Mixture, MultimodalDataset, Plan, Source, Template, Window
from emu3_megatron.data.format import PROMPT_MODE, SPAN_MODE, TEXT_MODE
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
