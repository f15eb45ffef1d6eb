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
        ratio = max(height / shown_width, shown_width / height)
        if ratio > self.max_aspect_ratio:
            raise MediaError(
                f"is {width}x{height} pixels, an aspect ratio of {ratio:.2f}; "
                f"the limit is {self.max_aspect_ratio:g}"
            )
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


def fixed_geometry(height: int, width: int, size: tuple[int, int], *, pixel_aspect: float = 1.0) -> Geometry:
    """Cover `size` (rows, columns) exactly, at the picture's own ratio, cropping what sticks out."""
    shown_width = width * pixel_aspect
    cover = max(size[0] / height, size[1] / shown_width)
    return Geometry(
        resized_height=max(size[0], round(height * cover)),
        resized_width=max(size[1], round(shown_width * cover)),
        height=size[0],
        width=size[1],
    )
