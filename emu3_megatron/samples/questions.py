"""Questions about pictures of the sample world, and their answers: colour, shape, yes or no, counting.

Of every kind, one answer is as likely as another, so that no answer is right more often than chance. Counting
is done aloud, "ring 0, cross 1, cross 2", and its last number is the answer. Asked for that alone, a small
model learns nothing (27% right where chance gives 25%) while it names 97% of the same shapes. Pictures of the
split ``held-out`` show combinations that training never does.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from emu3_megatron.data import MultimodalDataset
from emu3_megatron.files import atomic_write
from emu3_megatron.inference.engine import Completion, Request
from emu3_megatron.inference.sampling import Sampling
from emu3_megatron.media import write_png
from emu3_megatron.posttraining.conversations import Part, Turn
from emu3_megatron.samples.captions import caption
from emu3_megatron.samples.definitions import COLOURS, SHAPES
from emu3_megatron.samples.world import Scene, World

KINDS = ("colour", "shape", "yes or no", "count")
"""What is asked."""

PICTURES_COUNTED = 3
"""Pictures of a question that asks how many."""

LONGER_NAMES = 16
"""Ids by which wrong names in a count may be longer than the right ones."""


@dataclass(frozen=True)
class Question:
    """A question about one or several pictures."""

    scenes: tuple[Scene, ...]
    text: str
    answer: str


def pose(kind: str, world: World, split: str, rng: np.random.Generator) -> Question:
    """Draw pictures and ask about them.

    Args:
        kind: One of `KINDS`.
        world: Where the pictures are from.
        split: ``train`` or ``held-out``.
        rng: Decides everything.

    Raises:
        ValueError: for another kind.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind of question {kind!r}; known kinds: {', '.join(KINDS)}")
    scene = world.sample(rng, "image", split)
    if kind != "count":
        return Question((scene,), *_ask(kind, scene, rng))
    shape = list(SHAPES)[int(rng.integers(len(SHAPES)))]
    count = int(rng.integers(PICTURES_COUNTED + 1))
    scenes: list[Scene] = []
    for place in rng.permutation(PICTURES_COUNTED).tolist():
        while (scene.shape == shape) != (place < count):
            scene = world.sample(rng, "image", split)
        scenes.append(scene)
        scene = world.sample(rng, "image", split)
    return Question(tuple(scenes), *_how_many(shape, scenes))


def follow_ups(question: Question) -> list[Question]:
    """What else training asks about the same picture, which is not shown again: its description.

    What was said before gives no answer away, so that all are learnt from the pictures; of several pictures
    nothing is left to ask, since the answer to how many names them all.

    Args:
        question: What was asked first.
    """
    if len(question.scenes) > 1:
        return []
    return [Question((), "Describe the picture.", caption(question.scenes[0]))]


def _ask(kind: str, scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    """A question about one picture, and its answer."""
    if kind == "colour":
        return f"What colour is the {scene.shape}?", scene.colour
    if kind == "shape":
        return f"Which shape is {scene.colour}?", scene.shape
    is_so = bool(rng.integers(2))
    others = [colour for colour in COLOURS if colour != scene.colour]
    named = scene.colour if is_so else others[int(rng.integers(len(others)))]
    return f"Is the {scene.shape} {named}?", "yes" if is_so else "no"


def _how_many(shape: str, scenes: Sequence[Scene]) -> tuple[str, str]:
    """A question about several pictures, and its answer."""
    counts = accumulate(scene.shape == shape for scene in scenes)
    aloud = (f"{scene.shape} {int(count)}" for scene, count in zip(scenes, counts, strict=True))
    return f"How many are a {shape}? Count aloud.", ", ".join(aloud)


def as_turns(questions: Sequence[Question]) -> tuple[Turn, ...]:
    """One turn for each question, which shows its pictures first; they are numbered on from turn to turn."""
    turns = []
    shown = 0
    for question in questions:
        media: list[Part] = list(range(shown, shown + len(question.scenes)))
        shown += len(question.scenes)
        turns.append(Turn((*media, question.text), question.answer))
    return tuple(turns)


def write_conversations(
    folder: Path, world: World, *, split: str, count: int, seed: int, further: bool = False
) -> Path:
    """Pictures as PNG files, and questions about them as a LLaVA file.

    Args:
        folder: Where they go; made if missing.
        world: Where the pictures are from.
        split: ``train`` or ``held-out``.
        count: Conversations; the kinds of their first questions alternate, and the ids begin with the kind.
        seed: Of the questions.
        further: Whether `follow_ups` come after each question.

    Returns:
        ``folder/conversations.json``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([seed, *split.encode()])
    records = []
    for number in range(count):
        kind = KINDS[number % len(KINDS)]
        question = pose(kind, world, split, rng)
        names = [f"{number:06d}-{place}.png" for place in range(len(question.scenes))]
        for name, scene in zip(names, question.scenes, strict=True):
            write_png(folder / name, world.render(scene))
        asked = [question, *(follow_ups(question) if further else [])]
        said = [
            {"from": speaker, "value": words}
            for each in asked
            for speaker, words in (
                ("human", f"{'<image>' * len(each.scenes)}\n{each.text}".strip()),
                ("gpt", each.answer),
            )
        ]
        records.append({"id": f"{kind}/{number:06d}", "image": names, "conversations": said})
    path = folder / "conversations.json"
    with atomic_write(path) as stream:
        stream.write(json.dumps(records, indent=1).encode())
    return path


@dataclass(frozen=True)
class Prompt:
    """A stored conversation, cut before its last answer, for a model to continue."""

    kind: str
    """First part of the sample id."""
    ids: npt.NDArray[np.int64]
    """From BOS to where the answer begins."""
    answer: tuple[int, ...]
    """The answer's ids, EOS last."""


def read_prompts(dataset: MultimodalDataset) -> list[Prompt]:
    """The questions of a dataset of conversations and what is to be answered."""
    vocabulary = dataset.vocabulary
    prompts = []
    for number in range(len(dataset)):
        *before, (answer, _) = dataset.document(number)
        prompts.append(
            Prompt(
                kind=dataset.sample_id(number).partition("/")[0],
                ids=np.concatenate([[vocabulary.bos], *(ids for ids, _ in before)]).astype(np.int64),
                answer=(*answer.tolist(), vocabulary.eos),
            )
        )
    return prompts


class Answerer(Protocol):
    """What continues prompts: `Engine`."""

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion for each request, in order."""
        ...


def judge_answers(model: Answerer, prompts: Sequence[Prompt]) -> dict[str, list[bool]]:
    """Of each prompt, in order, whether its answer is the expected one to the last id; by kind.

    Of a count only the last number is judged, which is an id before EOS.
    """
    requests = [
        Request(
            prompt=each.ids,
            sampling=Sampling(temperature=0.0),
            max_new_tokens=len(each.answer) + (LONGER_NAMES if each.kind == "count" else 0),
        )
        for each in prompts
    ]
    marks: dict[str, list[bool]] = {}
    for prompt, completion in zip(prompts, model.generate(requests), strict=True):
        judged = slice(-2 if prompt.kind == "count" else 0, None)
        right = tuple(completion.ids.tolist()[judged]) == prompt.answer[judged]
        marks.setdefault(prompt.kind, []).append(right)
    return marks
