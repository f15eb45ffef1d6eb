"""GenEval's rules: whether the objects found in a picture are those of the prompt.

The rules and thresholds are those of github.com/djghosh13/geneval (evaluation/evaluate_images.py): enough
objects of each class, their colours and relative positions, and none too many; only the surest count.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
"""Colours that prompts name."""

CLASS_NAMES = {"mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard"}
"""Names of COCO's classes that prompts state otherwise."""

LEAST_SCORE = 0.3
COUNTING_SCORE = 0.9
"""From which score on an object is there, in prompts that count."""
MOST_OBJECTS = 16
"""Of one class."""
NEAR = 0.1
"""Two objects are beside each other when their centres are further apart than this share of their sizes."""


@dataclass(frozen=True)
class Found:
    """An object that a detector sees."""

    name: str
    box: tuple[float, float, float, float]
    """Left, top, right, bottom in pixels."""
    score: float
    mask: npt.NDArray[np.bool_] | None = None
    """Its pixels, ``[H, W]``."""


ColoursOf = Callable[[Sequence[Found], str], Sequence[str]]
"""The colour of each object of a class."""


def objects_by_class(found: Sequence[Found], *, counting: bool) -> dict[str, list[Found]]:
    """The objects that count, surest first."""
    least = COUNTING_SCORE if counting else LEAST_SCORE
    classes: dict[str, list[Found]] = {}
    for each in sorted(found, key=lambda each: -each.score):
        own = classes.setdefault(each.name, [])
        if each.score > least and len(own) < MOST_OBJECTS:
            own.append(each)
    return {name: own for name, own in classes.items() if own}


def relations(one: Found, other: Found) -> set[str]:
    """Where `one` is, seen from `other`: ``left of``, ``right of``, ``above``, ``below``; none if near."""
    boxes = np.array([one.box, other.box]).reshape(2, 2, 2)
    centres, sizes = boxes.mean(axis=1), np.abs(boxes[:, 1] - boxes[:, 0])
    offset = centres[0] - centres[1]
    beyond = np.maximum(np.abs(offset) - NEAR * sizes.sum(axis=0), 0) * np.sign(offset)
    if np.all(np.abs(beyond) < 1e-3):
        return set()
    across, down = beyond / np.linalg.norm(offset)
    holds = {"left of": across < -0.5, "right of": across > 0.5, "above": down < -0.5, "below": down > 0.5}
    return {name for name, true in holds.items() if true}


def check(
    about: Mapping[str, Any], objects: Mapping[str, Sequence[Found]], colours_of: ColoursOf
) -> tuple[bool, str]:
    """Whether `objects` are what the prompt's record asks for, and what is missing, a line each."""
    reasons: list[str] = []
    groups: list[Sequence[Found] | None] = []
    for wanted in about.get("include", []):
        name, count = wanted["class"], int(wanted["count"])
        own = list(objects.get(name, []))[:count]
        reason = ""
        if len(own) < count:
            reason = f"expected {name}>={count}, found {len(own)}"
        elif "color" in wanted:
            colours = list(colours_of(own, name))
            if colours.count(wanted["color"]) < count:
                reason = f"expected {wanted['color']} {name}>={count}, found {', '.join(colours)}"
        if not reason and "position" in wanted:
            relation, target = wanted["position"]
            reason = _misplaced(name, own, relation, target, groups)
        groups.append(None if reason else own)
        if reason:
            reasons.append(reason)
    for unwanted in about.get("exclude", []):
        name, count = unwanted["class"], int(unwanted["count"])
        if (seen := len(objects.get(name, []))) >= count:
            reasons.append(f"expected {name}<{count}, found {seen}")
    return not reasons, "\n".join(reasons)


def _misplaced(
    name: str, own: Sequence[Found], relation: str, target: int, groups: Sequence[Sequence[Found] | None]
) -> str:
    """What is wrong with the place of objects, relative to those of an earlier clause; empty if nothing."""
    others = groups[target]
    if others is None:
        return f"no target for {name} to be {relation}"
    for one in own:
        for other in others:
            if relation not in (seen := relations(one, other)):
                return f"expected {name} {relation} target, found {' and '.join(sorted(seen)) or 'neither'}"
    return ""


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """GenEval's scores from its result lines: the share of right pictures a tag; ``overall``: their mean."""
    marks: dict[str, list[bool]] = {}
    for row in rows:
        marks.setdefault(str(row["tag"]), []).append(bool(row["correct"]))
    scores = {tag: float(np.mean(own)) for tag, own in marks.items()}
    return {"overall": float(np.mean(list(scores.values()))), **scores} if scores else {}
