"""Colour matrices between YCbCr and RGB, and the correction for a decoder that knows only BT.601.

Every matrix is fixed by the weights of red and blue in luma (ITU-R BT.601-7, BT.709-6,
BT.2020-2; SMPTE 240M).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

LUMA_WEIGHTS = {
    "bt601": (0.299, 0.114),
    "bt709": (0.2126, 0.0722),
    "bt2020": (0.2627, 0.0593),
    "smpte240m": (0.212, 0.087),
    "fcc": (0.30, 0.11),
}
"""Weights of red and blue in luma."""

FFMPEG_MATRICES = {1: "bt709", 4: "fcc", 7: "smpte240m", 9: "bt2020", 10: "bt2020"}
"""FFmpeg's AVColorSpace numbers; the rest, unspecified included, is BT.601, as in FFmpeg's own converter."""


def matrix_name(colorspace: int, pixel_format: str) -> str:
    """Name of a frame's matrix from FFmpeg's AVColorSpace number and pixel format."""
    if colorspace == 0 or pixel_format.startswith(("rgb", "bgr", "gbr", "pal8", "argb", "abgr")):
        return "rgb"
    return FFMPEG_MATRICES.get(colorspace, "bt601")


def rgb_from_ycbcr(name: str) -> npt.NDArray[np.float64]:
    """The 3x3 matrix from (Y, Cb, Cr), all full range and centred at 0, to (R, G, B)."""
    red, blue = LUMA_WEIGHTS[name]
    green = 1 - red - blue
    cr_red, cb_blue = 2 * (1 - red), 2 * (1 - blue)
    return np.array(
        [[1, 0, cr_red], [1, -blue * cb_blue / green, -red * cr_red / green], [1, cb_blue, 0]],
        dtype=np.float64,
    )


def correct_matrix(frames: npt.NDArray[np.uint8], name: str) -> npt.NDArray[np.uint8]:
    """Take frames that were converted to RGB with BT.601 to what the stream's matrix gives.

    Args:
        frames: RGB, uint8 ``[..., 3]``.
        name: the stream's matrix, as `matrix_name` gives it.

    Returns:
        RGB, uint8, same shape; `frames` itself where nothing is to be done. Colours that BT.601 pushed out of
        0..255 were clipped by the decoder and stay slightly off.
    """
    if name not in LUMA_WEIGHTS or name == "bt601":
        return frames
    matrix = rgb_from_ycbcr(name) @ np.linalg.inv(rgb_from_ycbcr("bt601"))
    corrected = frames.astype(np.float32) @ matrix.T.astype(np.float32)
    return np.clip(np.rint(corrected), 0, 255).astype(np.uint8)
