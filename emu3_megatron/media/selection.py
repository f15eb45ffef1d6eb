"""Which frames of a video make a clip."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from emu3_megatron.media.errors import MediaError
from emu3_megatron.media.probe import VideoInfo

POSITIONS = ("start", "centre")
"""Where a clip may be taken from."""


@dataclass(frozen=True, kw_only=True)
class Clip:
    """Frames chosen from one video."""

    indices: tuple[int, ...]
    """Positions in `VideoInfo.pts`, ascending; one may repeat where the clip's rate exceeds the stream's."""
    fps: float
    """Frames per second of the clip."""

    @property
    def seconds(self) -> float:
        """Duration of the clip."""
        return len(self.indices) / self.fps


@dataclass(frozen=True, kw_only=True)
class ClipRule:
    """How many frames to take, at what rate, from where.

    Raises `ValueError` on construction where a value is out of range.
    """

    frames: int = 8
    """Frames in a clip; a multiple of the vision tokenizer's temporal factor (4 for Emu3)."""
    fps: float | None = None
    """Frames per second of the clip; None keeps the stream's own frames and rate."""
    position: str = "start"
    """``start`` or ``centre`` of the video."""

    def __post_init__(self) -> None:
        """Check the values."""
        if self.frames < 1:
            raise ValueError(f"a clip of {self.frames} frames is empty; ask for at least 1")
        if self.fps is not None and not self.fps > 0:
            raise ValueError(f"clip frame rate {self.fps} must be positive (or None for the stream's own)")
        if self.position not in POSITIONS:
            raise ValueError(f"clip position {self.position!r} is not one of {', '.join(POSITIONS)}")

    def select(self, info: VideoInfo) -> Clip:
        """Choose frames: at a given rate, the frame on display at each instant, by its time stamp.

        Raises:
            MediaError: the video is shorter than the clip.
        """
        if self.fps is None:
            return self._consecutive(info)
        seconds = self.frames / self.fps
        if (self.frames - 1) / self.fps >= info.seconds:
            raise MediaError(
                f"lasts {info.seconds:.2f} s, too short for {self.frames} frames at {self.fps:g} per second "
                f"({seconds:.2f} s)"
            )
        timestamps = info.timestamps
        start = max(info.seconds - seconds, 0.0) / 2 if self.position == "centre" else 0.0
        instants = start + np.arange(self.frames) / self.fps
        # Containers round time stamps to ticks: a frame stamped up to one tick late is on display.
        tolerance = min(float(info.time_base), 0.25 / info.fps)
        shown = np.searchsorted(timestamps, instants + tolerance, side="right") - 1
        return Clip(indices=tuple(int(i) for i in shown), fps=self.fps)

    def _consecutive(self, info: VideoInfo) -> Clip:
        """Take neighbouring frames, whatever their times."""
        if info.frame_count < self.frames:
            raise MediaError(f"has {info.frame_count} frames, too few for a clip of {self.frames}")
        first = (info.frame_count - self.frames) // 2 if self.position == "centre" else 0
        return Clip(indices=tuple(range(first, first + self.frames)), fps=round(info.fps, 3))
