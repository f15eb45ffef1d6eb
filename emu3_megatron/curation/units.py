"""What flows through the stages, and what a stage is."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

Score = Mapping[str, Any]
"""What a stage found out about a unit, as JSON holds it."""


@dataclass(frozen=True, kw_only=True)
class Unit:
    """An image, a video, a clip of a video, or a text."""

    id: str
    """Name of the entry; of a clip, ``ENTRY@FIRST-LAST``, its frames."""
    kind: str
    """``image``, ``video`` or ``text``."""
    record: Mapping[str, Any]
    """The manifest's object."""
    path: Path | None
    """The media file; None for text."""
    frames: tuple[int, int] | None = None
    """First frame and the one after the last, for a clip."""
    interval: tuple[float, float] | None = None
    """Seconds from the video's start to the clip's first frame and to its end."""

    @property
    def file(self) -> Path:
        """`path` of a unit that has media. Raises `ValueError` for a text."""
        if self.path is None:
            raise ValueError(f"{self.id} is a {self.kind}: it has no media file")
        return self.path

    @property
    def entry(self) -> str:
        """Name of the entry that the unit is, or is a clip of."""
        return self.id if self.frames is None else self.id[: self.id.rindex("@")]

    def clip(self, frames: tuple[int, int], interval: tuple[float, float]) -> Unit:
        """The clip of `frames` and seconds `interval`, both counted from the start of the file."""
        name = f"{self.entry}@{frames[0]}-{frames[1]}"
        return replace(self, id=name, frames=frames, interval=(round(interval[0], 6), round(interval[1], 6)))

    @property
    def text(self) -> str:
        """The document, or the captions, a line each; empty without one."""
        return "\n".join(self.texts)

    @property
    def texts(self) -> list[str]:
        """The document, or each of the captions."""
        if self.kind == "text":
            values = [self.record.get("text")]
        else:
            several = self.record.get("captions")
            values = [self.record.get("caption"), *(several if isinstance(several, list) else [])]
        return [value for value in values if isinstance(value, str)]


@dataclass(frozen=True)
class Decision:
    """What a stage decided."""

    keep: bool = True
    """Whether the unit goes on."""
    reason: str = ""
    """Why not, in a few words that many units share."""
    detail: str = ""
    """The same for this unit."""
    flags: frozenset[str] = field(default=frozenset())
    """Marks for later stages."""


KEEP = Decision()


def drop(reason: str, detail: str = "") -> Decision:
    """A decision against a unit."""
    return Decision(keep=False, reason=reason, detail=detail)


class Stage(ABC):
    """Scores units one at a time, and decides from a score alone."""

    name: ClassVar[str]
    """As in the configuration."""

    def settings(self) -> Mapping[str, Any]:
        """What the scores depend on, as JSON holds it; weights by their checksums."""
        return {}

    @abstractmethod
    def score(self, unit: Unit) -> Score:
        """Look at a unit.

        Raises:
            MediaError: the file cannot be used.
            OSError: a fault that may pass.
        """

    @abstractmethod
    def decide(self, unit: Unit, score: Score) -> Decision:
        """Apply the thresholds. Cheap, and without looking at the file."""

    def applies(self, flags: frozenset[str]) -> bool:
        """Whether a unit with these marks comes before this stage."""
        return True

    def summary(self, score: Score) -> Score:
        """The part of a score that is worth showing beside its decision."""
        return score

    @property
    def key(self) -> str:
        """Name of the scores that this stage makes: its own, and a digest of its settings."""
        settings = json.dumps(self.settings(), sort_keys=True, default=str)
        return f"{self.name}:{hashlib.sha256(settings.encode()).hexdigest()[:12]}"


class SplittingStage(Stage):
    """A stage that turns one unit into several."""

    @abstractmethod
    def split(self, unit: Unit, score: Score) -> Sequence[tuple[Unit, Decision]]:
        """The parts, each with a decision."""


class ComparingStage(Stage):
    """A stage whose decision about a unit depends on other units."""

    @abstractmethod
    def comparer(self) -> Comparer:
        """A new memory of units."""

    def decide(self, unit: Unit, score: Score) -> Decision:
        """Nothing to decide about a unit alone."""
        return KEEP


class Comparer(ABC):
    """The memory of a `ComparingStage`. It sees every unit once before it decides about the first."""

    def look_ahead(self, unit: Unit, score: Score, quality: float | None) -> None:  # noqa: B027
        """See a unit that reaches the stage, in the manifest's order; nothing to note by default.

        Args:
            unit: the unit.
            score: the stage's score of it.
            quality: its quality, where a stage before has scored it.
        """

    @abstractmethod
    def decide(self, unit: Unit, score: Score) -> Decision:
        """Compare with the units kept so far; remember this one where it is kept."""
