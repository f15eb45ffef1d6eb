"""Small functions over the parts: files in, tensors out, for training and evaluating the vision tokenizer."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from emu3_megatron.media.errors import MediaError
from emu3_megatron.media.files import Media
from emu3_megatron.media.geometry import Geometry, fixed_geometry
from emu3_megatron.media.images import decode_images
from emu3_megatron.media.preprocess import Preprocessor
from emu3_megatron.media.selection import ClipRule
from emu3_megatron.media.sources import FrameSource, frame_source
from emu3_megatron.media.video import OpenVideo


def load_stills(
    paths: Sequence[Media], size: tuple[int, int], *, preprocessor: Preprocessor | None = None
) -> torch.Tensor:
    """Load images at one size.

    Args:
        paths: image files, any formats and sizes.
        size: rows and columns in pixels; each image covers them, cropped at the centre.
        preprocessor: to reuse between calls; one is built where none is given.

    Returns:
        float32 ``[N, 3, rows, columns]`` in [-1, 1].

    Raises:
        MediaError: an image cannot be used; the message names it.
    """
    pictures = decode_images(paths)
    arrays = []
    for path, picture in zip(paths, pictures, strict=True):
        if isinstance(picture, MediaError):
            raise MediaError(f"{_name(path)}: {picture}") from picture
        arrays.append(picture[None])
    geometries = [
        _covering(path, a.shape[1], a.shape[2], size) for path, a in zip(paths, arrays, strict=True)
    ]
    if not arrays:
        return torch.empty(0, 3, *size)
    return torch.cat((preprocessor or Preprocessor())(arrays, geometries))


def load_clip(
    path: Media,
    frames: int,
    size: tuple[int, int],
    *,
    fps: float | None = None,
    position: str = "start",
    source: FrameSource | None = None,
    preprocessor: Preprocessor | None = None,
) -> torch.Tensor:
    """Load one clip of a video at one size.

    Args:
        path: a video file.
        frames: how many frames.
        size: rows and columns in pixels; the frames cover them, cropped at the centre.
        fps: frames per second of the clip; None keeps the stream's own frames.
        position: ``start`` or ``centre`` of the video.
        source: where frames come from; ``frame_source("auto")`` where none is given.
        preprocessor: to reuse between calls.

    Returns:
        float32 ``[frames, 3, rows, columns]`` in [-1, 1].

    Raises:
        MediaError: the video cannot be used; the message names it.
    """
    rule = ClipRule(frames=frames, fps=fps, position=position)
    try:
        with OpenVideo(path) as video:
            info = video.info
            geometry = fixed_geometry(*info.upright_size, size, pixel_aspect=info.pixel_aspect)
            pictures = (source or frame_source()).frames(video, rule.select(info).indices)
    except MediaError as error:
        raise MediaError(f"{_name(path)}: {error}") from error
    (clip,) = (preprocessor or Preprocessor(batch_size=1))([pictures], [geometry])
    return clip


def _covering(media: Media, height: int, width: int, size: tuple[int, int]) -> Geometry:
    """`fixed_geometry`, whose error names the file."""
    try:
        return fixed_geometry(height, width, size)
    except MediaError as error:
        raise MediaError(f"{_name(media)}: {error}") from error


def _name(media: Media) -> str:
    """How an error calls `media`."""
    return f"{len(media)} bytes" if isinstance(media, bytes) else str(media)
