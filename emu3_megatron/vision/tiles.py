"""Overlapping tiles, each a picture of its own: memory that does not grow with the picture.

A tile's norms and attention see the tile alone, so that codes are those of cut-out pictures and not those of
the whole: docs/vision-tokenizer.md says how many agree. Where stripes fit into memory, they are exact.

Shapes: B batch, T t frames of pixels and of codes, H W height and width in pixels, h w in codes.
"""

from __future__ import annotations

from itertools import pairwise, product

import torch
from torch import Tensor

from emu3_megatron.vision.inputs import check_codes, check_pixels, fit_pixels
from emu3_megatron.vision.model import VisionTokenizer

TILE = 512
"""Side of a tile in pixels: the size that Emu3's first stage is trained at."""

OVERLAP = 128
"""Least pixels that neighbouring tiles share."""


@torch.no_grad()
def encode_in_tiles(
    tokenizer: VisionTokenizer, pixels: Tensor, *, tile: int = TILE, overlap: int = OVERLAP
) -> Tensor:
    """Codes of images or clips of any size; each code is from the tile in which it lies farthest inside.

    Args:
        tokenizer: in evaluation mode.
        pixels: [B, 3, H, W] or [B, T, 3, H, W] in [-1, 1]; sizes are multiples of the factors.
        tile: side of a tile in pixels; for a picture that is not larger this is `VisionTokenizer.encode`.
        overlap: least pixels that neighbouring tiles share; below `tile`. Both are multiples of the factor.

    Returns:
        int64 codes, [B, h, w] or [B, t, h, w].

    Raises:
        ValueError: sizes that are not multiples of the factor, or an overlap of a tile or more.
    """
    factor = tokenizer.spatial_factor
    check_pixels(pixels, tokenizer.config.in_channels)
    fit_pixels(pixels, "refuse", spatial_factor=factor, temporal_factor=tokenizer.temporal_factor)
    _check_tiles(tile, overlap, factor)
    frames = () if pixels.dim() == 4 else (pixels.shape[1] // tokenizer.temporal_factor,)
    height, width = (side // factor for side in pixels.shape[-2:])
    codes = torch.empty(len(pixels), *frames, height, width, dtype=torch.int64, device=tokenizer.device)
    side = tile // factor
    rows, columns = (_tiles(length, side, overlap // factor) for length in (height, width))
    for (top, first_row, last_row), (left, first_column, last_column) in product(rows, columns):
        window = pixels[
            ..., top * factor : (top + side) * factor, left * factor : (left + side) * factor
        ]  # the last one ends with the picture
        part = tokenizer.encode(window)
        codes[..., first_row:last_row, first_column:last_column] = part[
            ..., first_row - top : last_row - top, first_column - left : last_column - left
        ]
    return codes


@torch.no_grad()
def decode_in_tiles(
    tokenizer: VisionTokenizer, codes: Tensor, *, tile: int = TILE, overlap: int = OVERLAP
) -> Tensor:
    """Pixels of codes of any size; where tiles overlap they fade into each other, linearly.

    Args:
        tokenizer: in evaluation mode.
        codes: integers, [B, h, w] or [B, t, h, w].
        tile: side of a tile in pixels; for a picture that is not larger this is `VisionTokenizer.decode`.
        overlap: least pixels that neighbouring tiles share; below `tile`. Both are multiples of the factor.

    Returns:
        [B, 3, H, W] or [B, T, 3, H, W].

    Raises:
        ValueError: a tile or overlap that is not a multiple of the factor, or an overlap of a tile or more.
    """
    factor = tokenizer.spatial_factor
    check_codes(codes, tokenizer.config.codebook_size)
    _check_tiles(tile, overlap, factor)
    side = tile // factor
    height, width = codes.shape[-2:]
    frames = () if codes.dim() == 3 else (codes.shape[1] * tokenizer.temporal_factor,)
    shape = (len(codes), *frames, tokenizer.config.out_channels, height * factor, width * factor)
    pixels = torch.zeros(shape, dtype=tokenizer.dtype, device=tokenizer.device)
    rows, columns = ([place[0] for place in _tiles(n, side, overlap // factor)] for n in (height, width))
    for top, left in product(rows, columns):
        window = codes[..., top : top + side, left : left + side]
        weights_HW = torch.outer(
            _fade(top, rows, side, height, factor), _fade(left, columns, side, width, factor)
        ).to(pixels)
        place = (..., _span(top, side, factor), _span(left, side, factor))
        pixels[place] += tokenizer.decode(window) * weights_HW
    return pixels


def _check_tiles(tile: int, overlap: int, factor: int) -> None:
    if tile % factor or overlap % factor or not 0 <= overlap < tile:
        raise ValueError(
            f"tile is {tile}, overlap {overlap}: both must be multiples of {factor}, and the overlap less "
            f"than the tile; for example {TILE} and {OVERLAP}"
        )


def _span(start: int, side: int, factor: int) -> slice:
    return slice(start * factor, (start + side) * factor)


def _tiles(length: int, side: int, overlap: int) -> list[tuple[int, int, int]]:
    """Start of each tile along one side, and the first and last place that is taken from it.

    The starts are spread evenly; borders lie in the middle of what two tiles share.
    """
    if length <= side:
        return [(0, 0, length)]
    count = -(-(length - overlap) // (side - overlap))
    starts = [(length - side) * index // (count - 1) for index in range(count)]
    borders = [0, *((a + side + b) // 2 for a, b in pairwise(starts)), length]
    return list(zip(starts, borders, borders[1:], strict=False))


def _fade(start: int, starts: list[int], side: int, length: int, factor: int) -> Tensor:
    """Weight of each pixel of a tile along one side; the weights of all tiles add up to 1."""
    places = torch.arange(start * factor, min(start + side, length) * factor) + 0.5
    ramps = torch.stack([_ramp(places, other, side, length, factor) for other in starts])
    return ramps[starts.index(start)] / ramps.sum(0)


def _ramp(places: Tensor, start: int, side: int, length: int, factor: int) -> Tensor:
    """Distance of places to the border of a tile; 0 outside. The picture's own borders do not count."""
    first, last = start * factor, min(start + side, length) * factor
    inside = torch.full_like(places, float(side * factor))
    if start > 0:
        inside = torch.minimum(inside, places - first)
    if start + side < length:
        inside = torch.minimum(inside, last - places)
    return inside.clamp_min(0)
