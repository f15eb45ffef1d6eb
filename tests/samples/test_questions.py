"""Questions about the world have balanced answers, and the answers are true."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from emu3_megatron.data import DatasetWriter, MultimodalDataset
from emu3_megatron.inference.engine import Completion, Request
from emu3_megatron.posttraining.conversation_files import ConversationInputs
from emu3_megatron.posttraining.conversations import Conversation, Turn
from emu3_megatron.samples.captions import caption
from emu3_megatron.samples.definitions import COLOURS, SHAPES
from emu3_megatron.samples.questions import (
    KINDS,
    as_turns,
    follow_ups,
    judge_answers,
    pose,
    read_prompts,
    write_conversations,
)
from emu3_megatron.samples.world import Scene, World, WorldConfig
from emu3_megatron.vocabulary import Vocabulary

WORLD = World(WorldConfig.preset("quickstart"))
ASKED = 1200


@pytest.mark.parametrize(
    ("kind", "answers"),
    [("colour", tuple(COLOURS)), ("shape", tuple(SHAPES)), ("yes or no", ("yes", "no")), ("count", "0123")],
)
def test_one_answer_is_as_likely_as_another(kind: str, answers: tuple[str, ...]) -> None:
    rng = np.random.default_rng(1)
    counts = Counter(pose(kind, WORLD, "held-out", rng).answer.split()[-1] for _ in range(ASKED))
    assert set(counts) == set(answers)
    expected = ASKED / len(answers)
    assert all(abs(count - expected) < 5 * np.sqrt(expected) for count in counts.values())


def truth(text: str, scenes: Sequence[Scene]) -> str:
    """The answer to a question, from its words and what is to be seen."""
    words = text.rstrip("?").split()
    if words[0] == "How":
        shape, count, said = words[4].rstrip("?"), 0, []
        for each in scenes:
            count += each.shape == shape
            said.append(f"{each.shape} {count}")
        return ", ".join(said)
    (scene,) = scenes
    if words[0] == "Is":
        return "yes" if words[-1] == scene.colour else "no"
    known = {"Describe": caption(scene), "What": scene.colour, "Which": scene.shape}
    return known[words[0]]


def test_answers_are_true_of_pictures_that_training_never_shows() -> None:
    rng = np.random.default_rng(2)
    held_out = set(WORLD.combinations("image", "held-out"))
    for kind in KINDS:
        for _ in range(50):
            question = pose(kind, WORLD, "held-out", rng)
            assert {each.combination for each in question.scenes} <= held_out
            assert question.answer == truth(question.text, question.scenes)


def test_further_answers_are_true_and_not_given_away() -> None:
    rng = np.random.default_rng(4)
    for kind in KINDS:
        for _ in range(50):
            question = pose(kind, WORLD, "train", rng)
            more = follow_ups(question)
            assert not any(each.scenes for each in more)
            # A count names all that is to be seen; of one picture there is more to say.
            assert len(more) == (1 if len(question.scenes) == 1 else 0)
            for each in more:
                assert each.answer == truth(each.text, question.scenes)


def test_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="known kinds"):
        pose("weight", WORLD, "train", np.random.default_rng(0))


def test_turns_number_their_pictures_on() -> None:
    rng = np.random.default_rng(3)
    first, second = pose("count", WORLD, "train", rng), pose("colour", WORLD, "train", rng)
    assert as_turns([first, second]) == (
        Turn((0, 1, 2, first.text), first.answer),
        Turn((3, second.text), second.answer),
    )


def test_turns_after_the_first_show_nothing(tmp_path: Path) -> None:
    path = write_conversations(tmp_path, WORLD, split="train", count=8, seed=0, further=True)
    for record in json.loads(path.read_text()):
        said = [each["value"] for each in record["conversations"] if each["from"] == "human"]
        assert [words.count("<image>") for words in said] == [len(record["image"])] + [0] * (len(said) - 1)
        assert len(said) == (2 if len(record["image"]) == 1 else 1)


def test_files_are_conversations(tmp_path: Path) -> None:
    path = write_conversations(tmp_path / "talk", WORLD, split="train", count=8, seed=0)
    again = write_conversations(tmp_path / "again", WORLD, split="train", count=8, seed=0)
    assert path.read_bytes() == again.read_bytes()
    entries = list(ConversationInputs([path], None).entries(0, 8))
    assert all(isinstance(entry, Conversation) for entry in entries)
    records = json.loads(path.read_text())
    assert [record["id"].partition("/")[0] for record in records] == [*KINDS, *KINDS]
    for entry in entries:
        assert isinstance(entry, Conversation)
        assert all(Path(str(each.media)).is_file() for each in entry.media)


class Parrot:
    """Answers everything as the first question asks for."""

    def __init__(self, answer: tuple[int, ...]) -> None:
        self._answer = np.array(answer)

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        return [Completion(self._answer[: each.max_new_tokens], True, 1) for each in requests]


def test_stored_conversations_become_prompts_and_are_judged(tmp_path: Path) -> None:
    vocabulary = Vocabulary.preset("tiny")
    with DatasetWriter(tmp_path / "talk", "talk", vocabulary=vocabulary) as writer:
        for number, answer in enumerate(([7], [8, 9], [7])):
            ids = [np.array([1, 2, number]), np.array(answer)]
            writer.add_document([(ids[0], 2), (ids[1], 0)], f"{'count' if number else 'colour'}/{number}")
    prompts = read_prompts(MultimodalDataset.open(tmp_path / "talk"))
    assert [prompt.ids.tolist() for prompt in prompts] == [[vocabulary.bos, 1, 2, n] for n in range(3)]
    assert [prompt.answer for prompt in prompts] == [(*a, vocabulary.eos) for a in ([7], [8, 9], [7])]
    assert judge_answers(Parrot(prompts[0].answer), prompts) == {"colour": [True], "count": [False, True]}
    # Counting aloud, a wrong name on the way to the right number does no harm.
    assert judge_answers(Parrot((5, 9, vocabulary.eos)), prompts)["count"] == [True, False]
