"""Writing PNG and MP4 files from pixels."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable
from fractions import Fraction
from typing import Any

import av
import numpy as np
import numpy.typing as npt
from av.video.reformatter import ColorRange, Colorspace
from PIL import Image

from emu3_megatron.files import atomic_write

VIDEO_ENCODERS = ("libx264", "libopenh264", "libvpx-vp9", "mpeg4")
"""Encoders in order of preference: H.264, which every player knows, then codecs that need no licence."""

BT601 = 6
"""FFmpeg's number (AVCOL_SPC_SMPTE170M) for the matrix that all decoders, DALI included, take by default."""


def write_png(path: str | os.PathLike[str], picture: npt.NDArray[np.uint8]) -> None:
    """Write an RGB picture, uint8 ``[H, W, 3]``, atomically. The same picture gives the same bytes.

    Raises:
        ValueError: another shape or type.
    """
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[-1] != 3:
        raise ValueError(f"write_png takes uint8 [H, W, 3]; got {picture.dtype} {list(picture.shape)}")
    with atomic_write(path) as stream:
        Image.fromarray(picture).save(stream, format="PNG")


def write_mp4(
    path: str | os.PathLike[str],
    frames: npt.NDArray[np.uint8] | Iterable[npt.NDArray[np.uint8]],
    fps: float,
    *,
    encoder: str | None = None,
    quality: int = 18,
) -> None:
    """Write a clip atomically; on one machine the same frames give the same bytes.

    Args:
        path: the file; its container is MP4 whatever its name.
        frames: RGB, uint8 ``[T, H, W, 3]``, or pictures ``[H, W, 3]`` as they come, which are not kept. Odd
            sizes are written without chroma subsampling.
        fps: frames per second.
        encoder: FFmpeg's name; the first of `VIDEO_ENCODERS` that these libraries have, where None.
        quality: constant rate factor, 0 (best) to 51; ignored by encoders without one.

    Raises:
        ValueError: another shape or type, a rate that is not positive, or an encoder that is not there.
    """
    if not fps > 0:
        raise ValueError(f"write_mp4: frame rate {fps} must be positive")
    pictures = iter(frames)
    first = next(pictures, None)
    if first is None or first.dtype != np.uint8 or first.ndim != 3 or first.shape[-1] != 3:
        found = "no frame" if first is None else f"frames of {first.dtype} {list(first.shape)}"
        raise ValueError(f"write_mp4 takes uint8 [T, H, W, 3], T > 0; got {found}")
    name = encoder or default_encoder()
    height, width, _ = first.shape
    with atomic_write(path) as stream, av.open(stream, "w", format="mp4") as container:
        try:
            video: Any = container.add_stream(name, rate=Fraction(fps).limit_denominator(1001))
        except (av.codec.codec.UnknownCodecError, av.FFmpegError) as error:
            raise ValueError(f"write_mp4: no encoder {name!r} in these FFmpeg libraries") from error
        video.width, video.height = width, height
        video.pix_fmt = "yuv420p" if height % 2 == width % 2 == 0 else "yuv444p"
        context = video.codec_context
        context.colorspace, context.color_range = BT601, int(ColorRange.MPEG)
        context.thread_count = 1  # the bytes depend on it
        context.options = {"crf": str(quality)} if name.startswith("lib") else {}
        if name == "mpeg4":
            context.qmin, context.qmax = 2, 4  # quantiser steps; the default bit rate is poor
        for picture in itertools.chain([first], pictures):
            _mux(container, video, _to_ycbcr(picture, video.pix_fmt))
        _mux(container, video, None)


def default_encoder() -> str:
    """The first of `VIDEO_ENCODERS` that the FFmpeg libraries have."""
    for name in VIDEO_ENCODERS:
        if name in av.codecs_available:
            return name
    raise ValueError(f"these FFmpeg libraries have none of the encoders {', '.join(VIDEO_ENCODERS)}")


def _to_ycbcr(picture: npt.NDArray[np.uint8], pixel_format: str) -> Any:
    """Convert one RGB picture for the encoder."""
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
    return frame.reformat(
        format=pixel_format,
        dst_colorspace=Colorspace.ITU601,
        src_color_range=ColorRange.JPEG,
        dst_color_range=ColorRange.MPEG,
        threads=1,
    )


def _mux(container: Any, video: Any, frame: Any) -> None:
    """Encode one frame (None flushes) and write its packets."""
    for packet in video.encode(frame):
        container.mux(packet)
