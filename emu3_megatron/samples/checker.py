"""Reads attributes from pixels: what is in the picture, whatever the prompt was.

The checker fits the shapes of `definitions` to the picture by least squares over every place and a range of
radii, with the object's colour and the background measured in the picture. It knows the public definitions
(palette, shapes, what a position's and a size's name means) and nothing of how a scene was chosen or drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from emu3_megatron.samples.definitions import (
    BACKGROUNDS,
    COLOURS,
    DIRECTIONS,
    POSITIONS,
    SHAPES,
    SIZES,
    FloatArray,
    coverage,
)
from emu3_megatron.samples.world import WorldConfig

RADIUS_STEP = 0.5
"""Spacing of the radii that are fitted, in pixels."""
CONTRAST = 36.0
"""Least distance of an object's colour from its background, in levels of 255 (Euclidean, RGB)."""
STILL = 0.3
"""An object slower than this, in pixels per frame, does not move."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What the checker sees. An attribute it cannot see is None; it never guesses."""

    shape: str | None = None
    colour: str | None = None
    size: str | None = None
    background: str | None = None
    position: str | None = None
    direction: str | None = None
    """Only of clips."""
    centre: tuple[float, float] | None = None
    """Centre (x, y) of the fitted shape, in pixels."""
    fit: float = 0.0
    """Share of the object's pixels that the fitted shape explains, 1 for a perfect drawing."""


class Checker:
    """Reads pictures of one size; holds a bank of shapes, a few MB. A picture takes about 10 ms."""

    def __init__(self, config: WorldConfig) -> None:
        self.config = config
        low, high = 0.6 * config.radii[0], 1.25 * config.radii[-1]
        radii = np.arange(low, high + RADIUS_STEP, RADIUS_STEP, dtype=np.float32)
        self._candidates = [(shape, float(radius)) for shape in SHAPES for radius in radii]
        axis = np.arange(config.size, dtype=np.float32) - np.float32(config.size / 2)
        self._bank = np.stack([coverage(s, axis[None, :], axis[:, None], r) for s, r in self._candidates])
        self._bank_spectrum = np.conj(np.fft.rfft2(self._bank)).astype(np.complex64)
        self._bank_energy = np.square(self._bank).sum((1, 2))
        edges = config.radii
        self._size_limits = [(edges[0] + edges[1]) / 2, (edges[1] + edges[2]) / 2]

    def read_image(self, pixels: npt.NDArray[np.uint8]) -> Reading:
        """Read a picture, uint8 ``[H, W, 3]`` (sRGB).

        Raises:
            ValueError: the array has another type or size.
        """
        self._check(pixels, 3)
        image = pixels.astype(np.float32)
        border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
        ground = np.median(border, axis=0)
        background = _nearest(ground, BACKGROUNDS)
        distance = np.sqrt(np.square(image - ground).sum(-1))
        if np.sort(distance, axis=None)[-20] < CONTRAST:
            return Reading(background=background)
        alpha = _opacity(image, ground, distance >= 0.8 * np.quantile(distance, 0.99))
        index, (x, y), error = self._fit(alpha)
        # Measure the colour again, well inside the fitted shape, and fit once more.
        inside = (
            np.roll(self._bank[index], (y - self.config.size // 2, x - self.config.size // 2), (0, 1)) > 0.99
        )
        inside &= distance >= 0.5 * CONTRAST
        if inside.sum() < 8:
            return Reading(background=background)
        colour = np.median(image[inside], axis=0)
        alpha = _opacity(image, ground, inside)
        index, (x, y), error = self._fit(alpha)
        shape, radius = self._candidates[index]
        return Reading(
            shape=shape,
            colour=_nearest(colour, COLOURS),
            size=SIZES[int(np.searchsorted(self._size_limits, radius))],
            background=background,
            position=self._position(x, y),
            centre=(float(x), float(y)),
            fit=float(max(0.0, 1.0 - error / np.square(alpha).sum())),
        )

    def read_clip(self, pixels: npt.NDArray[np.uint8]) -> Reading:
        """Read a clip, uint8 ``[T, H, W, 3]`` (sRGB): the attributes most frames show, and the motion.

        The direction is None unless an object is seen in at least two frames and moves; the position is None.

        Raises:
            ValueError: the array has another type or size.
        """
        self._check(pixels, 4)
        readings = [self.read_image(frame) for frame in pixels]
        seen = [(t, r.centre) for t, r in enumerate(readings) if r.centre is not None]
        return Reading(
            shape=_majority([r.shape for r in readings]),
            colour=_majority([r.colour for r in readings]),
            size=_majority([r.size for r in readings]),
            background=_majority([r.background for r in readings]),
            direction=_direction(seen),
            fit=float(np.mean([r.fit for r in readings])),
        )

    def _check(self, pixels: npt.NDArray[np.uint8], dimensions: int) -> None:
        """Refuse what is not a picture (3 dimensions) or clip (4) of this world's size."""
        shape = (self.config.size, self.config.size, 3)
        if pixels.dtype != np.uint8 or pixels.ndim != dimensions or pixels.shape[-3:] != shape:
            raise ValueError(
                f"got {pixels.dtype} {pixels.shape}; the checker reads uint8 arrays ending in {shape}"
            )

    def _fit(self, alpha: FloatArray) -> tuple[int, tuple[int, int], float]:
        """Best candidate, its centre (x, y) in whole pixels, and its squared error.

        The error of a candidate at every place is |alpha|^2 - 2 <alpha, shape> + |shape|^2; the middle term
        is a correlation, computed for all places at once by Fourier transform. Places wrap around, which a
        picture with an object inside it never uses.
        """
        half = self.config.size // 2
        spectrum = np.fft.rfft2(alpha).astype(np.complex64)
        correlation = np.fft.irfft2(spectrum * self._bank_spectrum, s=alpha.shape)
        errors = self._bank_energy[:, None, None] - 2 * correlation
        best = int(errors.argmin())
        index, dy, dx = (int(i) for i in np.unravel_index(best, errors.shape))
        centre = ((dx + half) % self.config.size, (dy + half) % self.config.size)
        return index, centre, float(np.square(alpha).sum() + errors.flat[best])

    def _position(self, x: float, y: float) -> str:
        """The position whose centre is nearest."""
        names = list(POSITIONS)
        centres = np.array(list(POSITIONS.values())) * self.config.size
        return names[int(np.square(centres - np.array([x, y])).sum(1).argmin())]


def _opacity(image: FloatArray, ground: FloatArray, core: npt.NDArray[np.bool_]) -> FloatArray:
    """How far each pixel is from the background towards the core's median colour, 0..1, ``[H, W]``."""
    towards = np.median(image[core], axis=0) - ground
    return np.clip((image - ground) @ towards / max(float(towards @ towards), 1.0), 0.0, 1.0)


def _nearest(colour: FloatArray, palette: Mapping[str, tuple[int, int, int]]) -> str:
    """Name of the palette's colour nearest in RGB."""
    distances = np.square(np.array(list(palette.values()), np.float32) - colour).sum(1)
    return list(palette)[int(distances.argmin())]


def _majority(values: Sequence[str | None]) -> str | None:
    """The most frequent value that is not None; None where more than half are None or two tie."""
    named = [value for value in values if value is not None]
    if 2 * len(named) < len(values) or not named:
        return None
    counts = sorted(((named.count(value), value) for value in set(named)), reverse=True)
    if len(counts) > 1 and counts[0][0] == counts[1][0]:
        return None
    return counts[0][1]


def _direction(seen: Sequence[tuple[int, tuple[float, float]]]) -> str | None:
    """Direction of the line fitted through (frame, centre); None for fewer than two frames or no motion."""
    if len(seen) < 2:
        return None
    times = np.array([t for t, _ in seen], np.float64)
    centres = np.array([centre for _, centre in seen], np.float64)
    times -= times.mean()
    velocity = times @ (centres - centres.mean(0)) / (times @ times)
    if float(np.abs(velocity).max()) < STILL:
        return None
    steps = np.array(list(DIRECTIONS.values()), np.float64)
    return list(DIRECTIONS)[int((steps @ velocity).argmax())]
