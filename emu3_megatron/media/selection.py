"""Which frames of a video make a clip."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from emu3_megatron.media.errors import MediaError
from emu3_megatron.media.probe import VideoInfo

POSITIONS = ("start", "centre")
"""Where a clip may be taken from."""


Interval = tuple[float, "float | None"]
"""Seconds from a video's first frame to the start and to the end of a part; None: the video's end."""


def frame_range(info: VideoInfo, interval: Interval) -> tuple[int, int]:
    """First frame of a part of a video, and the one after its last: those with ``start <= time < end``.

    They are the frames of a file that is cut there. The range is empty where no frame has such a time.
    """
    start, end = interval
    first = _frames_before(info, start)
    return first, info.frame_count if end is None else max(first, _frames_before(info, end))


def _frames_before(info: VideoInfo, second: float) -> int:
    """Number of frames that appear before an instant."""
    return int(np.searchsorted(info.timestamps, second - _tolerance(info), side="left"))


def _tolerance(info: VideoInfo) -> float:
    """Seconds that a frame's time stamp may be off: containers round them to ticks."""
    return min(float(info.time_base), 0.25 / info.fps)


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

    def select(self, info: VideoInfo, interval: Interval | None = None) -> Clip:
        """Choose frames: at a given rate, the frame on display at each instant, by its time stamp.

        Args:
            info: the video.
            interval: take the clip from this part, as if the file were cut there; the whole video where None.

        Raises:
            MediaError: the video, or the part, is shorter than the clip.
        """
        if interval is None:
            return self._select(info)
        first, stop = frame_range(info, interval)
        if stop == first:
            end = "its end" if interval[1] is None else f"{interval[1]:g} s"
            raise MediaError(f"lasts {info.seconds:.2f} s and has no frame from {interval[0]:g} s to {end}")
        clip = self._select(replace(info, pts=info.pts[first:stop]))
        return replace(clip, indices=tuple(first + index for index in clip.indices))

    def _select(self, info: VideoInfo) -> Clip:
        """Choose among all frames of `info`."""
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
        # A frame stamped up to one tick late is on display.
        shown = np.searchsorted(timestamps, instants + _tolerance(info), side="right") - 1
        return Clip(indices=tuple(int(i) for i in shown), fps=self.fps)

    def _consecutive(self, info: VideoInfo) -> Clip:
        """Take neighbouring frames, whatever their times."""
        if info.frame_count < self.frames:
            raise MediaError(f"has {info.frame_count} frames, too few for a clip of {self.frames}")
        first = (info.frame_count - self.frames) // 2 if self.position == "centre" else 0
        return Clip(indices=tuple(range(first, first + self.frames)), fps=round(info.fps, 3))
