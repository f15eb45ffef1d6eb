"""Pictures side by side, for those who would rather look."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image


def write_sheet(path: Path, rows: Sequence[Sequence[Path]], side: int) -> None:
    """Square pictures of `side` pixels in rows, enlarged twice, as one PNG."""
    side, gap = 2 * side, 4
    size = [gap + (side + gap) * n for n in (max(map(len, rows)), len(rows))]
    sheet = Image.new("RGB", (size[0], size[1]), (200, 200, 200))
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            with Image.open(picture) as opened:
                enlarged = opened.resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (gap + x * (side + gap), gap + y * (side + gap)))
    sheet.save(path)
