"""A sheet of originals, reconstructions and their differences, as one picture.

Shapes: T frames, H W height and width. Pixels are in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from emu3_megatron.vision.evaluation import Reconstruction, to_bytes

MARGIN = 8
"""Pixels around every picture."""

LINE = 14
"""Pixels of a line of text."""

DIFFERENCE_GAIN = 4
"""Differences are shown this many times larger."""

PAPER = (255, 255, 255)
INK = (40, 40, 40)


def draw_sheet(reconstructions: Sequence[Reconstruction]) -> npt.NDArray[np.uint8]:
    """One row for each image, and for the first and the last frame of each clip.

    Args:
        reconstructions: all of one height and width.

    Returns:
        RGB, uint8 [rows, columns, 3]: originals, reconstructions, and absolute differences times
        `DIFFERENCE_GAIN`, on black.

    Raises:
        ValueError: nothing to draw.
    """
    if not reconstructions:
        raise ValueError("there is no reconstruction to draw: keep at least one")
    rows = [row for item in reconstructions for row in _rows(item)]
    height, width = rows[0][1].shape[-2:]
    heads = ("original", "reconstruction", f"difference x{DIFFERENCE_GAIN}")
    cell_width = max(width, 110) + MARGIN
    cell_height = height + LINE + MARGIN
    sheet = Image.new(
        "RGB", (MARGIN + cell_width * len(heads), MARGIN + LINE + cell_height * len(rows)), PAPER
    )
    pen = ImageDraw.Draw(sheet)
    for column, head in enumerate(heads):
        pen.text((MARGIN + column * cell_width, MARGIN // 2), head, INK)
    for index, (caption, original, decoded) in enumerate(rows):
        top = MARGIN + LINE + index * cell_height
        for column, picture in enumerate((original, decoded, _difference(original, decoded))):
            place = (MARGIN + column * cell_width, top)
            sheet.paste(Image.fromarray(to_bytes(picture).permute(1, 2, 0).numpy()), place)
        pen.text((MARGIN, top + height + 1), caption, INK)
    return np.asarray(sheet)


def _rows(item: Reconstruction) -> list[tuple[str, Tensor, Tensor]]:
    """Caption, original and reconstruction of every row of a sample."""
    caption = f"{item.name}  {item.psnr:.2f} dB"
    if item.original.dim() == 3:
        return [(caption, item.original, item.decoded)]
    last = len(item.original) - 1
    return [
        (f"{caption}, frame {frame}", item.original[frame], item.decoded[frame])
        for frame in sorted({0, last})
    ]


def _difference(original: Tensor, decoded: Tensor) -> Tensor:
    return torch.clamp((original - decoded).abs() * DIFFERENCE_GAIN, 0, 2) - 1
