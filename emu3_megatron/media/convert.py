"""Decoded frames to RGB: FFmpeg's converter, and a kernel of ours that gives the same bytes in less time.

FFmpeg's accurate path has no vector code for interleaved RGB and takes longer than many decoders. The kernel
computes in its arithmetic. It needs to know where the stream's chroma samples lie, which PyAV does not tell;
so it is tried in every way on a part of the first frame and used in the one way that gives FFmpeg's bytes;
where there is none, FFmpeg goes on.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

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


class RGBConverter:
    """Converts the frames of one stream, in any order. Not for several threads."""

    def __init__(self) -> None:
        self._scaler = VideoReformatter()
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
            self._by_ffmpeg(frame, rgb)
            return
        kind = (frame.format.name, frame.width, frame.height, frame.colorspace, frame.color_range)
        if kind != self._kind:
            self._kind, self._sitings = kind, SITINGS if _suits_kernel(frame) else ()
        if len(self._sitings) > 1:
            # A flat picture is alike in several ways; the next one decides.
            self._sitings = self._alike(frame)
        if self.uses_kernel:
            _by_kernel(frame, self._sitings[0], 0, rgb)
        else:
            self._by_ffmpeg(frame, rgb)

    def _alike(self, frame: Any) -> tuple[tuple[bool, int], ...]:
        """The places of chroma with which the kernel gives FFmpeg's bytes, in a stripe at mid-height."""
        rows = min(STRIPE_ROWS, frame.height)
        first = (frame.height - rows) // 4 * 2
        expected = np.empty((rows, frame.width, 3), np.uint8)
        self._by_ffmpeg(_stripe(frame, first, rows), expected)
        found, alike = np.empty_like(expected), []
        for siting in self._sitings:
            _by_kernel(frame, siting, first, found)
            if np.array_equal(found, expected):
                alike.append(siting)
        return tuple(alike)

    def _by_ffmpeg(self, frame: Any, rgb: Picture) -> None:
        """FFmpeg's conversion."""
        converted: Any = self._scaler.reformat(
            frame,
            format="rgb24",
            width=rgb.shape[1],
            height=rgb.shape[0],
            interpolation=CONVERTER_FLAGS,
            threads=1,
        )
        rgb[...] = converted.to_ndarray()


def _suits_kernel(frame: Any) -> bool:
    """Whether the kernel knows such frames."""
    even = not (frame.width % 2 or frame.height % 2)
    matrix = matrix_name(int(frame.colorspace), frame.format.name)
    return even and frame.format.name in KERNEL_FORMATS and matrix in LUMA_WEIGHTS


def _stripe(frame: Any, first: int, rows: int) -> Any:
    """Some rows of a frame as a frame, which keeps all that FFmpeg knows of it and copies nothing."""
    graph = Graph()
    source = graph.add_buffer(
        width=frame.width, height=frame.height, format=frame.format, time_base=Fraction(1, 1000)
    )
    crop = graph.add("crop", f"{frame.width}:{rows}:0:{first}")
    sink = graph.add("buffersink")
    source.link_to(crop)
    crop.link_to(sink)
    graph.configure()
    graph.push(frame)
    return graph.pull()


def _by_kernel(frame: Any, siting: tuple[bool, int], first: int, rgb: Picture) -> None:
    """The kernel's conversion of as many rows as `rgb` has, an even number, from an even one on."""
    width, name, stop = frame.width, frame.format.name, first + len(rgb)
    luma, cb, cr = (
        np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[
            first // factor : stop // factor, : width // factor
        ]
        for plane, factor in zip(frame.planes, (1, 2, 2), strict=True)
    )
    full_range = int(frame.color_range) == 2 or name.startswith("yuvj")
    coefficients = kernel_coefficients(matrix_name(int(frame.colorspace), name), full_range)
    left, vertical = siting
    _kernels.convert_420(luma, cb, cr, rgb, coefficients=coefficients, left=left, vertical=vertical)
