"""Writing the clips that are parts of videos into files of their own."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from emu3_megatron.curation.frames import SOURCE, Picture, open_video
from emu3_megatron.curation.pool import Handler
from emu3_megatron.curation.progress import listening, lively
from emu3_megatron.curation.scoring import Announce, Key
from emu3_megatron.curation.units import Score, Unit
from emu3_megatron.errors import one_line
from emu3_megatron.media import MediaError, OpenVideo, write_mp4


@dataclass(frozen=True)
class ClipTask:
    """One clip to write."""

    id: str
    """Of the unit."""
    source: Path
    """The video."""
    frames: tuple[int, int]
    """First frame, and the one after the last."""
    target: Path
    """The file to write."""


def is_part(unit: Unit, frame_count: int) -> bool:
    """Whether a unit is less than its whole file."""
    return unit.frames is not None and unit.frames != (0, frame_count)


def clip_name(unit: Unit) -> str:
    """File name of a clip, the same in every run: the readable part of its id, and a digest of all of it."""
    readable = re.sub(r"[^A-Za-z0-9@._-]+", "_", unit.id)[-80:].lstrip(".")
    digest = hashlib.sha256(unit.id.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{readable}-{digest}.mp4"


class ClipWriter(Handler):
    """Writes clips. Answers what is wrong with the video, or nothing."""

    def __call__(self, task: ClipTask, announce: Announce, failures: Mapping[Key, Score]) -> str | None:
        """Write one clip unless it is there."""
        key = ("clip", task.id)
        announce(key)
        problem: Any = failures[key]["error"] if key in failures else None
        if problem is None and not task.target.exists():
            with listening(lambda: announce(key)):
                problem = _write(task)
        announce(None)
        return None if problem is None else str(problem)


def _write(task: ClipTask) -> str | None:
    """Write one clip; a fault that may pass is tried again by running the job again."""
    try:
        with open_video(task.source) as video:
            write_mp4(task.target, steady_frames(video, *task.frames), video.info.fps)
    except MediaError as error:
        return one_line(error)
    return None


def steady_frames(video: OpenVideo, first: int, stop: int) -> Iterator[Picture]:
    """Frames of a clip at the stream's average rate: what is on display at each instant, with square pixels.

    A stream with a constant rate gives each frame once.
    """
    info = video.info
    rows, columns = info.upright_size
    size = None if info.pixel_aspect == 1.0 else (rows, max(1, round(columns * info.pixel_aspect)))
    times = info.timestamps[first:stop] - info.timestamps[first]
    count = max(1, round((float(times[-1]) + 1 / info.fps) * info.fps))
    instants = np.arange(count) / info.fps + 0.5 / info.fps
    shown = np.maximum(np.searchsorted(times, instants, side="right") - 1, 0)
    wanted = iter([*shown.tolist(), -1])
    following = next(wanted)
    for place, picture in enumerate(lively(SOURCE.stream(video, first=first, stop=stop, size=size))):
        while following == place:
            yield picture
            following = next(wanted)
