"""Decoded frames to RGB: FFmpeg's converter, and a kernel of ours that gives the same bytes in less time.

FFmpeg's accurate path has no vector code for interleaved RGB and takes longer than many decoders. The kernel
computes in its arithmetic. It needs to know where the stream's chroma samples lie, which PyAV does not tell;
so it is tried in every way on a part of the first frame and used in the one way that gives FFmpeg's bytes;
where there is none, FFmpeg goes on.
"""

from __future__ import annotations

import threading
from fractions import Fraction
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from av.filter import Graph
from av.video.reformatter import VideoReformatter

from emu3_megatron import _kernels
from emu3_megatron.media.color import LUMA_WEIGHTS, matrix_name

BILINEAR, FULL_CHR_H_INT, FULL_CHR_H_INP, ACCURATE_RND = 0x2, 0x2000, 0x4000, 0x40000
"""FFmpeg's SWS_* numbers; PyAV names the last three from version 18 on."""

CONVERTER_FLAGS = BILINEAR | FULL_CHR_H_INT | FULL_CHR_H_INP | ACCURATE_RND
"""Flags of FFmpeg's colour converter, the same as in DALI; the default flags are up to twice as far off."""

SITINGS = tuple((left, vertical) for left in (True, False) for vertical in (0, -1, 1))
"""Places of chroma samples: in the left column or between; between the rows, in the upper or in the lower."""

STRIPE_ROWS = 32
"""Rows on which the places of chroma are tried."""

KERNEL_FORMATS = ("yuv420p", "yuvj420p")
"""Pixel formats that the kernel converts."""

Picture = npt.NDArray[np.uint8]


@lru_cache
def kernel_coefficients(matrix: str, full_range: bool) -> tuple[int, int, int, int, int, int]:
    """FFmpeg's fixed-point numbers (13 bits) of a matrix of `LUMA_WEIGHTS`.

    Returns:
        Offset and scale of luma; red and green from Cr; green and blue from Cb.
    """
    red, blue = LUMA_WEIGHTS[matrix]
    green = 1 - red - blue
    from_cr, from_cb = 2 * (1 - red), 2 * (1 - blue)
    exact = (from_cr, -from_cr * red / green, -from_cb * blue / green, from_cb)
    scaled = [round(value * 255 / 224 * 65536) for value in exact]  # FFmpeg's tables are of limited range
    luma, offset = 65536, 0
    if full_range:
        scaled = [abs(value) * 224 // 255 * (1 if value > 0 else -1) for value in scaled]
    else:
        luma, offset = 65536 * 255 // 219, 16 << 9
    luma_13, *chroma = ((value * 8192 + 32768) >> 16 for value in (luma, *scaled))
    return (offset, luma_13, chroma[0], chroma[1], chroma[2], chroma[3])


class FFmpegConverter(threading.local):
    """FFmpeg's conversion for any streams; every thread keeps its tables from one to the next."""

    def __init__(self) -> None:
        self._scaler = VideoReformatter()
        self._kind: tuple[Any, ...] = ()
        self._graph = Graph()

    def __call__(self, frame: Any, rgb: Picture) -> None:
        """Fill `rgb`, uint8 ``[H, W, 3]`` of any size, with a PyAV frame."""
        converted: Any = self._scaler.reformat(
            frame,
            format="rgb24",
            width=rgb.shape[1],
            height=rgb.shape[0],
            interpolation=CONVERTER_FLAGS,
            threads=1,
        )
        rgb[...] = converted.to_ndarray()

    def stripe(self, frame: Any, first: int, rgb: Picture) -> None:
        """Fill `rgb` with as many rows of a frame as it has, converted as if there were no others."""
        kind = (frame.format.name, frame.width, frame.height, first, len(rgb))
        if kind != self._kind:
            self._kind, self._graph = kind, _cropping(frame, first, len(rgb))
        self._graph.push(frame)
        self(self._graph.pull(), rgb)  # a frame that shares the other's pixels and all that is known of it


class RGBConverter:
    """Converts the frames of one stream, in any order. Not for several threads."""

    def __init__(self, ffmpeg: FFmpegConverter) -> None:
        """`ffmpeg` may serve other streams too."""
        self._ffmpeg = ffmpeg
        self._kind: tuple[Any, ...] = ()
        self._sitings: tuple[tuple[bool, int], ...] = ()

    @property
    def uses_kernel(self) -> bool:
        """Whether the next frame of the same kind goes through the kernel alone."""
        return len(self._sitings) == 1

    def __call__(self, frame: Any, rgb: Picture) -> None:
        """Fill `rgb` with a PyAV frame as FFmpeg converts it with `CONVERTER_FLAGS`.

        Args:
            frame: the frame.
            rgb: uint8 ``[H, W, 3]``, contiguous. Where its size is not the frame's, the frame is scaled as it
                is converted, averaging over what falls away.
        """
        if rgb.shape[:2] != (frame.height, frame.width):
            self._ffmpeg(frame, rgb)
            return
        kind = (frame.format.name, frame.width, frame.height, frame.colorspace, frame.color_range)
        if kind != self._kind:
            self._kind, self._sitings = kind, SITINGS if _suits_kernel(frame) else ()
        if len(self._sitings) > 1:
            # A flat picture is alike in several ways; the next one decides.
            self._sitings = self._alike(frame)
        if self.uses_kernel:
            _by_kernel(_planes(frame, 0, frame.height), self._sitings[0], rgb)
        else:
            self._ffmpeg(frame, rgb)

    def _alike(self, frame: Any) -> tuple[tuple[bool, int], ...]:
        """The places of chroma with which the kernel gives FFmpeg's bytes, in a stripe at mid-height."""
        rows = min(STRIPE_ROWS, frame.height)
        first = (frame.height - rows) // 4 * 2
        expected = np.empty((rows, frame.width, 3), np.uint8)
        self._ffmpeg.stripe(frame, first, expected)
        planes, found, alike = _planes(frame, first, rows), np.empty_like(expected), []
        for siting in self._sitings:
            _by_kernel(planes, siting, found)
            if np.array_equal(found, expected):
                alike.append(siting)
        return tuple(alike)


def _suits_kernel(frame: Any) -> bool:
    """Whether the kernel knows such frames."""
    even = not (frame.width % 2 or frame.height % 2)
    matrix = matrix_name(int(frame.colorspace), frame.format.name)
    return even and frame.format.name in KERNEL_FORMATS and matrix in LUMA_WEIGHTS


def _cropping(frame: Any, first: int, rows: int) -> Graph:
    """FFmpeg's filter that cuts these rows out of frames like this one."""
    graph = Graph()
    source = graph.add_buffer(
        width=frame.width, height=frame.height, format=frame.format, time_base=Fraction(1, 1000)
    )
    crop = graph.add("crop", f"{frame.width}:{rows}:0:{first}")
    source.link_to(crop)
    crop.link_to(graph.add("buffersink"))
    graph.configure()
    return graph


class _Planes(NamedTuple):
    """Some rows of a frame as the kernel takes them."""

    luma: Picture
    cb: Picture
    cr: Picture
    coefficients: tuple[int, int, int, int, int, int]


def _planes(frame: Any, first: int, rows: int) -> _Planes:
    """Rows from an even one on, an even number of them."""
    width, name = frame.width, frame.format.name
    luma, cb, cr = (
        np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[
            first // factor : (first + rows) // factor, : width // factor
        ]
        for plane, factor in zip(frame.planes, (1, 2, 2), strict=True)
    )
    full_range = int(frame.color_range) == 2 or name.startswith("yuvj")
    return _Planes(luma, cb, cr, kernel_coefficients(matrix_name(int(frame.colorspace), name), full_range))


def _by_kernel(planes: _Planes, siting: tuple[bool, int], rgb: Picture) -> None:
    """Fill `rgb` by the kernel."""
    left, vertical = siting
    _kernels.convert_420(*planes[:3], rgb, coefficients=planes.coefficients, left=left, vertical=vertical)
