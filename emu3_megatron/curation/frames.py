"""Pictures of a unit, decoded once for all the stages that look at it."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from emu3_megatron.curation.units import Unit
from emu3_megatron.media import OpenVideo, VideoInfo, decode_image, probe_video
from emu3_megatron.media.sources import PyAVSource

Picture = npt.NDArray[np.uint8]
"""RGB, uint8 ``[H, W, 3]``, upright."""

SOURCE = PyAVSource()
"""Exact on every container and codec, on any machine."""


@lru_cache(maxsize=1)
def image_of(path: Path) -> Picture:
    """The picture of an image file. Do not write to it. Raises `MediaError` and `OSError`."""
    picture = decode_image(path)
    picture.setflags(write=False)
    return picture


@lru_cache(maxsize=4)
def info_of(path: Path) -> VideoInfo:
    """What a video file holds. Raises `MediaError` and `OSError`."""
    return probe_video(path)


def open_video(path: Path) -> OpenVideo:
    """The file, to take frames from, without another probe. Raises `MediaError` and `OSError`."""
    return OpenVideo(path, info_of(path))


def frame_range(unit: Unit, info: VideoInfo) -> tuple[int, int]:
    """First frame of a clip or video, and the one after the last."""
    return unit.frames if unit.frames is not None else (0, info.frame_count)


def small_size(
    info: VideoInfo, *, shorter_edge: int | None = None, width: int | None = None
) -> tuple[int, int]:
    """Rows and columns, upright, with this shorter edge or width, even; never larger than the frames."""
    rows, columns = info.upright_size
    scale = min(1.0, shorter_edge / min(rows, columns) if shorter_edge else (width or columns) / columns)
    return max(2, round(rows * scale / 2) * 2), max(2, round(columns * scale / 2) * 2)


def clip_frames(unit: Unit, indices: list[int], size: tuple[int, int] | None = None) -> Picture:
    """Frames of a clip by their places in the video, uint8 ``[T, H, W, 3]``."""
    with open_video(unit.file) as video:
        return SOURCE.frames(video, indices, size=size)


def spread(first: int, stop: int, count: int) -> list[int]:
    """`count` places in the middle of equal parts of ``first..stop-1``; fewer where there are fewer."""
    count = min(count, stop - first)
    return [first + (2 * i + 1) * (stop - first) // (2 * count) for i in range(count)]


def pictures_of(unit: Unit, count: int) -> list[Picture]:
    """The picture of an image, or `count` frames of a clip, evenly spread."""
    if unit.kind == "image":
        return [image_of(unit.file)]
    return list(_spread_frames(unit.file, frame_range(unit, info_of(unit.file)), count))


@lru_cache(maxsize=1)
def _spread_frames(path: Path, frames: tuple[int, int], count: int) -> Picture:
    """Frames of a clip; kept, because quality and duplicates look at the same three."""
    with open_video(path) as video:
        return SOURCE.frames(video, spread(*frames, count))


def resize(picture: Picture, *, shorter_edge: int | None = None, longer_edge: int | None = None) -> Picture:
    """The picture with this shorter or longer edge, averaged; as it is where it is smaller."""
    rows, columns = picture.shape[:2]
    scale = shorter_edge / min(rows, columns) if shorter_edge else (longer_edge or 0) / max(rows, columns)
    if scale >= 1:
        return picture
    size = max(1, round(columns * scale)), max(1, round(rows * scale))
    return np.asarray(cv2.resize(picture, size, interpolation=cv2.INTER_AREA), np.uint8)
