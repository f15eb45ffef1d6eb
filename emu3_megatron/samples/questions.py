"""Questions about pictures of the sample world, and their answers: colour, shape, yes or no, counting."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from emu3_megatron.posttraining.conversations import Part, Turn
from emu3_megatron.samples.definitions import COLOURS, SHAPES
from emu3_megatron.samples.world import Scene

KINDS = ("colour", "shape", "yes or no", "count")
"""What is asked; answers of each kind are as often one as another, as far as the pictures allow."""

PICTURES_COUNTED = 3
"""Pictures that a question about their number is about."""


def pictures_of(kind: str) -> int:
    """How many pictures a question of this kind is about."""
    return PICTURES_COUNTED if kind == "count" else 1


def ask(kind: str, scenes: Sequence[Scene], rng: np.random.Generator) -> tuple[str, str]:
    """A question about `pictures_of` (kind) scenes, and its answer.

    Raises:
        ValueError: for another kind.
    """
    scene = scenes[0]
    if kind == "colour":
        return f"What colour is the {scene.shape}?", scene.colour
    if kind == "shape":
        return f"Which shape is {scene.colour}?", scene.shape
    if kind == "yes or no":
        is_so = bool(rng.integers(2))
        others = [colour for colour in COLOURS if colour != scene.colour]
        named = scene.colour if is_so else others[int(rng.integers(len(others)))]
        return f"Is the {scene.shape} {named}?", "yes" if is_so else "no"
    if kind == "count":
        # Half of the questions are about a shape that is there, so that zero is not the usual answer.
        shapes = sorted({each.shape for each in scenes}) if rng.integers(2) else list(SHAPES)
        shape = shapes[int(rng.integers(len(shapes)))]
        return f"How many pictures show a {shape}?", str(sum(each.shape == shape for each in scenes))
    raise ValueError(f"unknown kind of question {kind!r}; known kinds: {', '.join(KINDS)}")


def conversation_turns(
    groups: Sequence[tuple[str, Sequence[Scene]]], rng: np.random.Generator
) -> tuple[Turn, ...]:
    """One turn for each (kind, scenes); a turn shows its pictures, numbered on from those before."""
    turns = []
    shown = 0
    for kind, scenes in groups:
        question, answer = ask(kind, scenes, rng)
        media: list[Part] = list(range(shown, shown + len(scenes)))
        shown += len(scenes)
        turns.append(Turn((*media, question), answer))
    return tuple(turns)
