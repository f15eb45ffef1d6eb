"""What the words of the sample world mean: its palette, shapes, positions and directions.

These definitions are public: the renderer draws by them and the checker reads by them. Neither needs
anything else of the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]

COLOURS: Mapping[str, tuple[int, int, int]] = MappingProxyType(
    {
        "red": (225, 25, 25),
        "green": (20, 165, 50),
        "blue": (30, 60, 230),
        "yellow": (245, 225, 30),
        "purple": (130, 30, 170),
        "orange": (250, 135, 10),
        "cyan": (20, 215, 225),
        "pink": (255, 125, 195),
    }
)
"""sRGB of each object colour, 0..255."""

BACKGROUNDS: Mapping[str, tuple[int, int, int]] = MappingProxyType(
    {"white": (255, 255, 255), "black": (0, 0, 0), "gray": (128, 128, 128), "brown": (105, 70, 40)}
)
"""sRGB of each background, 0..255; no name or value is shared with `COLOURS`."""

SIZES = ("small", "medium", "large")
"""Names of the three sizes; their radii in pixels belong to a world's configuration."""

POSITIONS: Mapping[str, tuple[float, float]] = MappingProxyType(
    {
        "top left": (0.25, 0.25),
        "top": (0.5, 0.25),
        "top right": (0.75, 0.25),
        "left": (0.25, 0.5),
        "center": (0.5, 0.5),
        "right": (0.75, 0.5),
        "bottom left": (0.25, 0.75),
        "bottom": (0.5, 0.75),
        "bottom right": (0.75, 0.75),
    }
)
"""Centre (x, y) that each position names, as fractions of the picture's sides."""

DIRECTIONS: Mapping[str, tuple[int, int]] = MappingProxyType(
    {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
)
"""Unit step (x, y) of each direction of motion; y grows downwards."""


REACH = 1.03
"""No shape reaches further from its centre than this many radii along an axis."""


def _circle(x: FloatArray, y: FloatArray, r: np.float32) -> FloatArray:
    return np.hypot(x, y) - r


def _square(x: FloatArray, y: FloatArray, r: np.float32) -> FloatArray:
    return np.maximum(np.abs(x), np.abs(y)) - np.float32(0.94) * r


def _triangle(x: FloatArray, y: FloatArray, r: np.float32) -> FloatArray:
    side = (np.float32(1.9) * np.abs(x) - (y + r)) / np.float32(np.hypot(1.9, 1.0))
    return np.maximum(side, y - np.float32(0.9) * r)


def _ring(x: FloatArray, y: FloatArray, r: np.float32) -> FloatArray:
    return np.abs(np.hypot(x, y) - np.float32(0.77) * r) - np.float32(0.23) * r


def _cross(x: FloatArray, y: FloatArray, r: np.float32) -> FloatArray:
    arm = np.float32(0.33) * r
    a, b = np.abs(x), np.abs(y)
    return np.minimum(np.maximum(a - arm, b - r), np.maximum(b - arm, a - r))


def _diamond(x: FloatArray, y: FloatArray, r: np.float32) -> FloatArray:
    return (np.abs(x) + np.abs(y) - np.float32(REACH) * r) / np.float32(np.sqrt(2.0))


SHAPES: Mapping[str, Callable[[FloatArray, FloatArray, np.float32], FloatArray]] = MappingProxyType(
    {
        "circle": _circle,
        "square": _square,
        "triangle": _triangle,
        "ring": _ring,
        "cross": _cross,
        "diamond": _diamond,
    }
)
"""Signed distance in pixels (negative inside) of each shape of radius r at (x, y) from its centre."""


def coverage(shape: str, x: FloatArray, y: FloatArray, radius: float) -> FloatArray:
    """How much of each pixel a shape covers.

    Args:
        shape: a name in `SHAPES`.
        x: pixel centres' distance to the right of the shape's centre, in pixels; any broadcastable shape.
        y: the same downwards.
        radius: the shape's radius in pixels.

    Returns:
        float32 in 0..1 of the broadcast shape: 1 inside, 0 outside, a one-pixel ramp at the edge.
    """
    return np.clip(np.float32(0.5) - SHAPES[shape](x, y, np.float32(radius)), 0.0, 1.0).astype(np.float32)
