"""Lists of pictures of any sizes, in batches of one shape.

Norms and attention see the whole frame, so that padding to a common size would change codes.

Shapes: T t frames of pixels and of codes, H W height and width in pixels, h w in codes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from emu3_megatron.vision.inputs import Fit
from emu3_megatron.vision.model import VisionTokenizer

BATCH_PIXELS = 1 << 20
"""Pixels times frames of a batch: four pictures of 512x512."""


def encode_list(
    tokenizer: VisionTokenizer,
    pictures: Sequence[Tensor],
    *,
    fit: Fit = "refuse",
    batch_pixels: int = BATCH_PIXELS,
) -> list[Tensor]:
    """Codes of images and clips of mixed shapes, in their order.

    Args:
        tokenizer: in evaluation mode.
        pictures: images [3, H, W] and clips [T, 3, H, W], floating point in [-1, 1].
        fit: what to do with sizes that are not multiples of the factors; see `inputs.Fit`.
        batch_pixels: pixels times frames of a batch; a larger picture makes a batch of its own.

    Returns:
        int64 codes of each, [h, w] or [t, h, w].

    Raises:
        ValueError: what `VisionTokenizer.encode` refuses.
    """
    sizes = [picture.numel() // tokenizer.config.in_channels for picture in pictures]
    return _in_batches(pictures, sizes, batch_pixels, lambda batch: tokenizer.encode(batch, fit=fit))


def decode_list(
    tokenizer: VisionTokenizer, codes: Sequence[Tensor], *, batch_pixels: int = BATCH_PIXELS
) -> list[Tensor]:
    """Pixels of codes of mixed shapes, in their order.

    Args:
        tokenizer: in evaluation mode.
        codes: integers, images [h, w] and clips [t, h, w].
        batch_pixels: pixels times frames of a batch; a larger picture makes a batch of its own.

    Returns:
        Pixels of each, [3, H, W] or [T, 3, H, W].

    Raises:
        ValueError: what `VisionTokenizer.decode` refuses.
    """
    area = tokenizer.spatial_factor**2
    sizes = [c.numel() * area * (tokenizer.temporal_factor if c.dim() == 3 else 1) for c in codes]
    return _in_batches(codes, sizes, batch_pixels, tokenizer.decode)


def _in_batches(
    items: Sequence[Tensor], sizes: Sequence[int], most: int, work: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """Apply `work` to stacks of equal shapes; `most` bounds the sum of the `sizes` of a stack."""
    buckets: dict[torch.Size, list[int]] = {}
    for index, item in enumerate(items):
        buckets.setdefault(item.shape, []).append(index)
    results: dict[int, Tensor] = {}
    for indices in buckets.values():
        each = max(1, most // max(1, sizes[indices[0]]))
        for first in range(0, len(indices), each):
            part = indices[first : first + each]
            results.update(zip(part, work(torch.stack([items[i] for i in part])), strict=True))
    return [results[index] for index in range(len(items))]
