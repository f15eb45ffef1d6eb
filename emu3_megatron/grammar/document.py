"""What a document is: ordered text segments, images and videos, before they become tokens."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Union

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


@dataclass(frozen=True)
class Text:
    """A text segment."""

    text: str


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


Segment = Union[Text, Image, Video]


@dataclass(frozen=True)
class Document:
    """Ordered segments; what stands between BOS and EOS."""

    segments: tuple[Segment, ...]
