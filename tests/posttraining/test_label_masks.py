"""Which token is trained, token by token, for every template. Run with ``-s`` to see the tables.

Classes: T text, V vision, M meta, B break, C control, P prompt, E end, ``.`` none. Weights: ``1``, ``h`` for
a half, ``0``.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from emu3_megatron.data import Mixture, Plan, Source, Template
from emu3_megatron.data.loader import Batch
from emu3_megatron.data.window import WindowBuilder
from emu3_megatron.errors import UserError
from emu3_megatron.grammar import Modality
from emu3_megatron.training.config import LossConfig
from emu3_megatron.training.metrics import cells_of
from emu3_megatron.training.objective import NextToken
from tests.posttraining.documents import (
    VOCABULARY,
    Segments,
    conversation,
    shown,
    span,
    text,
    write_dataset,
)
from tests.posttraining.recipes import CODES_ONLY, PRETRAINING, TEXT_ONLY

LETTERS = {Modality.PADDING: ".", Modality.META: "M"} | {
    modality: modality.name[0] for modality in Modality if modality.name not in ("PADDING", "META")
}
DIGITS = {1.0: "1", 0.5: "h", 0.0: "0"}
CPU = torch.device("cpu")

OPENING = "You are a helpful assistant. USER: "
PICTURE, PICTURE_CLASSES = "[1*2|vv/$]", "CMMMCVVBBC"


def objective(*losses: LossConfig) -> NextToken:
    return NextToken(losses, end_token=VOCABULARY.eos, device=CPU)


def window_of(segments: Segments, template: Template, *, after: bool, kept: int | None) -> Batch:
    ids, modality = template.assemble(segments, VOCABULARY, caption_after=after, caption_tokens=kept)
    builder = WindowBuilder(0, len(ids) + 2, alignment=1, pad=VOCABULARY.pad)
    builder.add(ids, modality, source=0, document=0, start=0, length=len(ids))
    return Batch.collate([builder.finish()])


def table(
    segments: Segments, loss: LossConfig, *, after: bool = False, kept: int | None = None
) -> tuple[str, str, str]:
    """Labels, their classes and weights, for every place of the document but padding."""
    batch = window_of(segments, Template(), after=after, kept=kept)
    asked = objective(loss)
    classes = asked.classes(batch)
    weights = asked.weights_SC.reshape(-1)[cells_of(batch, classes)].reshape(-1).tolist()
    length = int(batch.cu_seqlens[1])
    labels = [-1 if c == Modality.PADDING else t for t, c in zip(batch.labels[0], classes[0], strict=True)]
    columns = (
        "".join("." if label < 0 else shown([int(label)]) for label in labels),
        "".join(LETTERS[Modality(int(c))] for c in classes[0]),
        "".join(DIGITS[weight] for weight in weights),
    )
    names, letters, digits = (column[:length] for column in columns)
    print(f"\n{names}\n{letters}\n{digits}")
    total = asked.denominators([batch])
    assert total.item() == sum(weights)
    return names, letters, digits


@pytest.mark.parametrize(
    ("loss", "weights"),
    [(PRETRAINING, "111" + "1111" + "hhhh" + "11" + "0"), (CODES_ONLY, "0" * 7 + "11" + "00000")],
    ids=["pre-training", "quality"],
)
def test_a_caption_before_its_picture(loss: LossConfig, weights: str) -> None:
    names, classes, digits = table([text("hi"), span()], loss)
    assert names == f"hi{PICTURE}!."
    assert classes == f"TT{PICTURE_CLASSES}C."
    assert digits == weights


def test_a_dropped_caption_leaves_the_picture_its_loss() -> None:
    names, classes, digits = table([text("hi"), span()], CODES_ONLY, kept=0)
    assert (names, classes) == (f"{PICTURE}!.", f"{PICTURE_CLASSES}C.")
    assert digits == "0000011" + "0000" + "0"


def test_a_picture_without_a_caption() -> None:
    assert table([span()], CODES_ONLY)[2] == "0000011" + "0000" + "0"
    names, classes, digits = table([span()], TEXT_ONLY, after=True)
    assert (names, classes) == (f"{PICTURE}!.", f"{PICTURE_CLASSES}E.")
    assert digits == "0" * 10 + "1" + "0"


def test_understanding_learns_the_caption_and_its_end() -> None:
    names, classes, digits = table([text("hi"), span()], TEXT_ONLY, after=True)
    assert names == f"{PICTURE}hi!."
    assert classes == f"{PICTURE_CLASSES}TTE."
    assert digits == "0" * 10 + "111" + "0"


def test_plain_text() -> None:
    assert table([text("hi")], TEXT_ONLY) == ("hi!.", "TTE.", "1110")
    assert table([text("hi")], PRETRAINING) == ("hi!.", "TTC.", "1110")


def test_several_pictures_of_a_document_keep_their_order() -> None:
    names, classes, digits = table([text("a"), span(), text("b"), span()], TEXT_ONLY)
    assert names == f"a{PICTURE}b{PICTURE}!."
    assert classes == f"T{PICTURE_CLASSES}T{PICTURE_CLASSES}E."
    assert digits == "1" + "0" * 10 + "1" + "0" * 10 + "1" + "0"


CONVERSATIONS = {
    "one picture": ([((0, "q"), "a")], [(OPENING, PICTURE, "q. ASSISTANT:", " a")]),
    "no picture": ([(("q",), "a")], [(OPENING, "", "q. ASSISTANT:", " a")]),
    "several pictures": (
        [((0, 1, "q"), "a")],
        [(OPENING, PICTURE * 2, "q. ASSISTANT:", " a")],
    ),
    "a picture after the words goes first": ([(("q", 0), "a")], [(OPENING, PICTURE, "q. ASSISTANT:", " a")]),
    "many turns": (
        [((0, "q"), "a"), (("r",), "bc"), ((1,), "d")],
        [
            (OPENING, PICTURE, "q. ASSISTANT:", " a"),
            ("USER: ", "", "r. ASSISTANT:", " bc"),
            ("USER: ", PICTURE, ". ASSISTANT:", " d"),
        ],
    ),
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_of_a_conversation_only_answers_and_their_ends_are_learnt(name: str) -> None:
    turns, written = CONVERSATIONS[name]
    names, classes, digits = table(conversation(*turns), TEXT_ONLY)
    expected = expected_classes = expected_weights = ""
    for before, pictures, after, answer in written:
        inside = PICTURE_CLASSES * (len(pictures) // len(PICTURE))
        expected += f"{before}{pictures}{after}{answer}!"
        expected_classes += f"{'P' * len(before)}{inside}{'P' * len(after)}{'T' * len(answer)}E"
        expected_weights += "0" * len(before + pictures + after) + "1" * (len(answer) + 1)
    assert names == f"{expected}."
    assert classes == f"{expected_classes}."
    assert digits == f"{expected_weights}0"


def test_pictures_inside_a_question_stay_there() -> None:
    names, classes, _ = table(conversation((("x ", 0, " y ", 1), "a")), TEXT_ONLY)
    assert names == f"{OPENING}x {PICTURE} y {PICTURE}. ASSISTANT: a!."
    assert classes.count("P") == len(f"{OPENING}x  y . ASSISTANT:")


def test_a_system_message_takes_the_opening_s_place() -> None:
    names, _, _ = table(conversation((("q",), "a"), system="Be brief."), TEXT_ONLY)
    assert names == "Be brief. USER: q. ASSISTANT: a!."


def test_the_first_stage_s_template() -> None:
    names, classes, digits = table(conversation(((0, "q"), "a"), template="emu3-stage1"), TEXT_ONLY)
    assert names == f"{PICTURE}q a!."
    assert classes == f"{PICTURE_CLASSES}PTTE."
    assert digits == "0" * 11 + "111" + "0"


def test_pre_training_weighs_answers_as_text_and_no_prompt() -> None:
    _, classes, digits = table(conversation((("q",), "a"), (("r",), "b")), PRETRAINING)
    assert "E" not in classes
    assert [d for c, d in zip(classes, digits, strict=True) if c == "C"] == ["1", "1"]
    assert {d for c, d in zip(classes, digits, strict=True) if c == "P"} == {"0"}


def test_sources_have_weights_of_their_own(tmp_path: Path) -> None:
    paths = [
        write_dataset(tmp_path / "pictures", [[text("hi"), span()]]),
        write_dataset(tmp_path / "talk", [conversation(((0, "q"), "a"))]),
    ]
    mixture = Mixture([Source(path=str(path)) for path in paths])
    plan = Plan(mixture, seed=1, context_length=256, block_draws=16)
    asked = objective(CODES_ONLY, TEXT_ONLY)
    batch = Batch.collate([plan.window(index) for index in range(2)])
    cells = cells_of(batch, asked.classes(batch))[0]
    for source, label, weight in zip(
        batch.source_of_tokens[0].tolist(),
        batch.labels[0].tolist(),
        asked.weights_SC.reshape(-1)[cells].tolist(),
        strict=True,
    ):
        assert source != 0 or weight == float(label >= VOCABULARY.vision_offset)
        assert source != 1 or weight == 0 or label < VOCABULARY.text_size or label == VOCABULARY.eos


def test_a_conversation_that_is_too_long_is_dropped_and_never_cut(tmp_path: Path) -> None:
    short, long = conversation((("q",), "a")), conversation((("q",), "a" * 300))
    path = write_dataset(tmp_path / "talk", [short, long])
    plan = Plan(Mixture([Source(path=str(path))]), seed=1, context_length=128, fill=True, block_draws=16)
    block = plan.block(0)
    assert {plan.mixture.sources[0].dataset.sample_id(int(n)) for n in block.dropped_document} == {"talk-1"}
    whole = sum(len(ids) for ids, _ in short) + 2
    for index in range(block.num_windows):
        window = plan.window(index)
        here = window.document >= 0
        assert set(window.document[here].tolist()) <= {0}
        np.testing.assert_array_equal(window.length[here], whole)
        assert not window.start.any()


def test_a_document_may_not_end_with_a_prompt(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="ends with a prompt"):
        write_dataset(tmp_path / "bad", [conversation((("q",), "a"))[:-1]])
