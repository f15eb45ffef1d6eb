"""What a document is: ordered text segments, images and videos, before they become tokens."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

Codes = npt.NDArray[np.int64]


class Modality(IntEnum):
    """The class of one token; loss weights and metrics are kept per class."""

    TEXT = 0
    """Captions, prose, turns."""
    VISION = 1
    """Vision codes."""
    META = 2
    """The text between BOI and IMG that states a span's size (and, for video, rate and duration)."""
    BREAK = 3
    """EOL and EOF inside a span."""
    CONTROL = 4
    """BOS, EOS, BOI, IMG, EOI."""
    PADDING = 5
    """Padding: never a target."""
    PROMPT = 6
    """Text that is given to the model, not asked of it: instructions and questions of a conversation."""
    END = 7
    """EOS, where a loss weighs it apart from other control tokens; nothing stores this class."""


@dataclass(frozen=True)
class Text:
    """A text segment.

    `ids` is for texts that did not come out of the text tokenizer's own encoding: a model may spell a word
    in pieces that the tokenizer would have merged, or stop inside a character. `Dialect.parse` then keeps the
    ids, so that encoding the parsed document gives the same sequence; everywhere else `ids` is None, and the
    tokenizer decides.
    """

    text: str
    ids: tuple[int, ...] | None = None


@dataclass(frozen=True, eq=False)
class Image:
    """An image as vision codes, int64 ``[H, W]`` (rows, columns of tokens, not pixels)."""

    codes: Codes

    def __eq__(self, other: object) -> bool:
        """Equal codes of equal shape."""
        return isinstance(other, Image) and np.array_equal(self.codes, other.codes)

    def __hash__(self) -> int:
        """Hash of shape and codes."""
        return hash((self.codes.shape, self.codes.tobytes()))


@dataclass(frozen=True, eq=False)
class Video:
    """A video as vision codes, int64 ``[T, H, W]`` (latent frames, rows, columns).

    `fps` is the frame rate of the clip in frames per second and `seconds` its duration; both stand in the
    meta text of the dialects that state them (paper: "resolution, frame rate and duration").
    """

    codes: Codes
    fps: float | None = None
    seconds: float | None = None

    def __eq__(self, other: object) -> bool:
        """Equal codes, rate and duration."""
        return (
            isinstance(other, Video)
            and np.array_equal(self.codes, other.codes)
            and (self.fps, self.seconds) == (other.fps, other.seconds)
        )

    def __hash__(self) -> int:
        """Hash of shape, codes, rate and duration."""
        return hash((self.codes.shape, self.codes.tobytes(), self.fps, self.seconds))


Segment = Text | Image | Video


@dataclass(frozen=True)
class Document:
    """Ordered segments; what stands between BOS and EOS.

    A document has one form: empty texts are left out, and neighbouring texts are joined into one, because
    they are tokenized as one. Raises `ValueError` where a text that carries ids stands beside another text
    (joined, their ids would have to be chosen anew: join the texts or the ids first).
    """

    segments: tuple[Segment, ...]

    def __post_init__(self) -> None:
        """Bring the segments to their one form."""
        joined: list[Segment] = []
        for segment in self.segments:
            if isinstance(segment, Text):
                if not segment.text and not segment.ids:
                    continue
                if joined and isinstance(last := joined[-1], Text):
                    if last.ids is not None or segment.ids is not None:
                        raise ValueError(
                            "a text with ids cannot stand beside another text; join their ids, or give both "
                            f"without ids: {last.text!r}, {segment.text!r}"
                        )
                    joined[-1] = Text(last.text + segment.text)
                    continue
            elif not isinstance(segment, (Image, Video)):
                raise ValueError(f"a segment must be a Text, Image or Video, got {type(segment).__name__}")
            joined.append(segment)
        object.__setattr__(self, "segments", tuple(joined))
