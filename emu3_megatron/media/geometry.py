"""The size a picture is brought to: a target area at the picture's own ratio, in whole tokens.

The rule is Emu3's (``calculate_generate_size`` and ``smart_resize`` in the released code): a picture of
ratio h:w gets ``round(h * sqrt(area / (h * w)) / 8)`` rows of tokens, and columns likewise. Where the
released code then stretches the picture to that size, we scale it to cover the size and crop the few rows
or columns that stick out, centred.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from emu3_megatron.media.errors import MediaError

MAX_CUT = 16
"""A picture of which less than one part in so many would be left by a crop is refused: it is enlarged as a
whole before it is cropped, to this many times the memory of the result."""


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """How one picture is resized and cropped; sizes in pixels."""

    resized_height: int
    """Rows after resizing, before the crop."""
    resized_width: int
    """Columns after resizing, before the crop."""
    height: int
    """Rows of the result."""
    width: int
    """Columns of the result."""


@dataclass(frozen=True, kw_only=True)
class ResizeRule:
    """Target area of a picture.

    Raises `ValueError` on construction where a value is out of range.
    """

    area: int = 512 * 512
    """Pixels of the result, about (Emu3: 512 x 512 in pre-training, 720 x 720 in quality fine-tuning)."""
    spatial_factor: int = 8
    """Pixels along a token's side; both sides are multiples of it."""
    max_aspect_ratio: float = 5.0
    """A picture longer than this times its shorter side is refused (Emu3's image processor: 5)."""

    def __post_init__(self) -> None:
        """Check the values."""
        if self.spatial_factor < 1 or self.area < self.spatial_factor**2:
            raise ValueError(
                f"image area {self.area} must hold one token: give at least {self.spatial_factor**2} pixels "
                f"({self.spatial_factor} x {self.spatial_factor})"
            )
        if self.max_aspect_ratio < 1:
            raise ValueError(f"max_aspect_ratio {self.max_aspect_ratio} must be at least 1")

    def plan(self, height: int, width: int, *, pixel_aspect: float = 1.0) -> Geometry:
        """Size for a picture of `height` x `width` pixels, each `pixel_aspect` times as wide as high.

        Raises:
            MediaError: the picture is too elongated.
        """
        shown_width = width * pixel_aspect
        _check_aspect(height, width, shown_width, self.max_aspect_ratio)
        scale = math.sqrt(self.area / (height * shown_width))
        rows, columns = (self._whole_tokens(side * scale) for side in (height, shown_width))
        cover = max(rows / height, columns / shown_width)
        return Geometry(
            resized_height=max(rows, round(height * cover)),
            resized_width=max(columns, round(shown_width * cover)),
            height=rows,
            width=columns,
        )

    def _whole_tokens(self, pixels: float) -> int:
        """Nearest positive multiple of the token's side."""
        return max(1, round(pixels / self.spatial_factor)) * self.spatial_factor


@dataclass(frozen=True, kw_only=True)
class BoundedResizeRule:
    """Keeps a picture's own size within bounds (paper, section 3.3.2: pictures of conversations are resized
    only below 512 x 512 and above 1024 x 1024).

    Raises `ValueError` on construction where a value is out of range.
    """

    min_area: int = 512 * 512
    """Pixels of the result at least."""
    max_area: int = 1024 * 1024
    """Pixels of the result at most."""
    spatial_factor: int = 8
    """Pixels along a token's side; both sides are multiples of it."""
    max_aspect_ratio: float = 5.0
    """A picture longer than this times its shorter side is refused (Emu3's image processor: 5)."""

    def __post_init__(self) -> None:
        """Check the values."""
        ResizeRule(
            area=self.min_area, spatial_factor=self.spatial_factor, max_aspect_ratio=self.max_aspect_ratio
        )
        if self.max_area < self.min_area:
            raise ValueError(
                f"largest area {self.max_area} is below the smallest, {self.min_area}: swap them"
            )

    def plan(self, height: int, width: int, *, pixel_aspect: float = 1.0) -> Geometry:
        """Size for a picture of `height` x `width` pixels, each `pixel_aspect` times as wide as high.

        Sides are rounded to whole tokens: the nearest ones within the bounds, down above the upper bound, up
        below the lower one (as the released image processor does).

        Raises:
            MediaError: the picture is too elongated.
        """
        shown_width = width * pixel_aspect
        _check_aspect(height, width, shown_width, self.max_aspect_ratio)
        factor = self.spatial_factor
        sides = (height / factor, shown_width / factor)
        rows, columns = (max(1, round(side)) for side in sides)
        tokens, native = rows * columns * factor**2, height * shown_width
        if not self.min_area <= tokens <= self.max_area:
            too_large = tokens > self.max_area
            scale = math.sqrt((self.max_area if too_large else self.min_area) / native)
            whole = math.floor if too_large else math.ceil
            # A side of a whole number of tokens must not move for its last bit.
            rows, columns = (max(1, whole(round(side * scale, 9))) for side in sides)
        return fixed_geometry(height, width, (rows * factor, columns * factor), pixel_aspect=pixel_aspect)


def _check_aspect(height: int, width: int, shown_width: float, limit: float) -> None:
    """Refuse a picture that is too elongated."""
    ratio = max(height / shown_width, shown_width / height)
    if ratio > limit:
        raise MediaError(
            f"is {width}x{height} pixels, an aspect ratio of {ratio:.2f}; the limit is {limit:g}"
        )


def fixed_geometry(height: int, width: int, size: tuple[int, int], *, pixel_aspect: float = 1.0) -> Geometry:
    """Cover `size` (rows, columns) exactly, at the picture's own ratio, cropping what sticks out.

    Raises:
        MediaError: the picture is too elongated for this size (see `MAX_CUT`).
    """
    shown_width = width * pixel_aspect
    stretch = (height * size[1]) / (shown_width * size[0])
    if max(stretch, 1 / stretch) > MAX_CUT:
        raise MediaError(
            f"is {width}x{height} pixels; a crop to {size[1]}x{size[0]} leaves less than 1/{MAX_CUT} of it"
        )
    cover = max(size[0] / height, size[1] / shown_width)
    return Geometry(
        resized_height=max(size[0], round(height * cover)),
        resized_width=max(size[1], round(shown_width * cover)),
        height=size[0],
        width=size[1],
    )
