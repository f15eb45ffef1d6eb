"""The dialects, as data.

Every dialect writes a span as ``BOI meta IMG body EOI``. What differs is which numbers stand in the meta text
and which breaks stand between the vision tokens; a `SpanRule` says both. `DIALECTS` is the table of the known
ones; ``docs/grammar.md`` has the same rules as EBNF.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple


class Field(Enum):
    """One number of the meta text."""

    FRAMES = "frames"
    """Latent frames (not frames of the clip): T."""
    HEIGHT = "height"
    """Rows of vision tokens (not pixels): H."""
    WIDTH = "width"
    """Vision tokens in a row (not pixels): W."""
    FPS = "fps"
    """Frames per second of the clip, a decimal."""
    SECONDS = "seconds"
    """Duration of the clip in seconds, a decimal."""

    @property
    def is_decimal(self) -> bool:
        """Whether the field may have a fraction; the others are positive integers."""
        return self in (Field.FPS, Field.SECONDS)


class RowBreak(Enum):
    """Where EOL stands."""

    NEVER = "never"
    AFTER_EACH = "after each row"
    BETWEEN = "between the rows of a frame"


@dataclass(frozen=True, kw_only=True)
class SpanRule:
    """How one kind of span is written. Raises `ValueError` where the numbers cannot give the layout."""

    fields: tuple[Field, ...]
    """Numbers of the meta text, in order, joined by ``*``."""
    row_break: RowBreak
    """Where EOL stands."""
    frame_break: bool
    """Whether EOF stands after each frame (an image is one frame)."""

    def __post_init__(self) -> None:
        """Height and width must be stated, and no number twice."""
        if len(set(self.fields)) != len(self.fields) or not {Field.HEIGHT, Field.WIDTH} <= set(self.fields):
            raise ValueError(
                f"span rule: fields {[f.value for f in self.fields]} must hold height and width, none twice"
            )


@dataclass(frozen=True, kw_only=True)
class DialectRules:
    """How images and videos are written. Raises `ValueError` where a meta text would be ambiguous."""

    image: SpanRule
    """Images: the rule must not state frames."""
    video: SpanRule | None
    """Videos; None where the dialect has none. The rule must state frames."""

    def __post_init__(self) -> None:
        """The number of fields tells an image from a video."""
        if Field.FRAMES in self.image.fields:
            raise ValueError("dialect rules: an image must not state a number of frames")
        if self.video is None:
            return
        if Field.FRAMES not in self.video.fields:
            raise ValueError("dialect rules: a video must state its number of frames")
        if len(self.image.fields) == len(self.video.fields):
            raise ValueError(
                f"dialect rules: images and videos must differ in their number of fields, "
                f"both have {len(self.image.fields)}"
            )

    def of(self, layout: Layout) -> SpanRule:
        """The rule that gave `layout`."""
        return self.video if layout.is_video and self.video is not None else self.image


class Layout(NamedTuple):
    """Where the breaks stand among the vision tokens of one span; small and hashable."""

    is_video: bool
    frames: int
    """T; 1 for an image."""
    height: int
    """H, rows of a frame."""
    width: int
    """W, vision tokens of a row."""
    row_length: int
    """Ids from one row's start to the next row's: W, or W+1 with EOL."""
    frame_length: int
    """Ids of one frame, breaks included."""
    ends_rows: bool
    """Whether EOL stands at index W of a row (unless the frame is over)."""
    ends_frames: bool
    """Whether EOF is the last id of a frame."""

    @property
    def length(self) -> int:
        """Ids between IMG and EOI."""
        return self.frames * self.frame_length

    @classmethod
    def build(cls, rule: SpanRule, *, is_video: bool, frames: int, height: int, width: int) -> Layout:
        """The layout of ``[T, H, W]`` vision tokens under `rule`."""
        breaks = {RowBreak.NEVER: 0, RowBreak.AFTER_EACH: height, RowBreak.BETWEEN: height - 1}
        ends_rows = rule.row_break is not RowBreak.NEVER
        return cls(
            is_video=is_video,
            frames=frames,
            height=height,
            width=width,
            row_length=width + ends_rows,
            frame_length=height * width + breaks[rule.row_break] + rule.frame_break,
            ends_rows=ends_rows,
            ends_frames=rule.frame_break,
        )


_RELEASED_IMAGE = SpanRule(
    fields=(Field.HEIGHT, Field.WIDTH), row_break=RowBreak.AFTER_EACH, frame_break=True
)

DIALECTS: dict[str, DialectRules] = {
    # Images: github.com/baaivision/Emu3, processing_emu3.py. Videos: the paper (arXiv 2409.18869) says that
    # resolution, frame rate and duration are stated and that EOL and EOF stand; the exact string is ours.
    "emu3": DialectRules(
        image=_RELEASED_IMAGE,
        video=SpanRule(
            fields=(Field.FRAMES, Field.HEIGHT, Field.WIDTH, Field.FPS, Field.SECONDS),
            row_break=RowBreak.AFTER_EACH,
            frame_break=True,
        ),
    ),
    # Videos: github.com/baaivision/UniVLA, the one published program that writes Emu3 videos.
    "emu3-frames": DialectRules(
        image=_RELEASED_IMAGE,
        video=SpanRule(
            fields=(Field.FRAMES, Field.HEIGHT, Field.WIDTH), row_break=RowBreak.NEVER, frame_break=True
        ),
    ),
    # github.com/baaivision/Emu3.5: frames of a video are tokenized one by one, as images.
    "emu3.5": DialectRules(
        image=SpanRule(fields=(Field.HEIGHT, Field.WIDTH), row_break=RowBreak.BETWEEN, frame_break=False),
        video=None,
    ),
}
"""The known dialects by name."""
