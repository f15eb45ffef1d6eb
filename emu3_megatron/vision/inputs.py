"""What the vision tokenizer takes: checks that say what to change, and ways to make other sizes fit.

Shapes: B batch, T frames, C channels, H W height and width in pixels, h w in codes, t in latent frames.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

Fit = Literal["refuse", "pad", "crop", "floor"]
"""What to do with heights, widths and numbers of frames that are not multiples of the factors.

- ``refuse``: raise `ValueError`.
- ``pad``: repeat the last row, the last column and the last frame up to the next multiple. Codes count the
  part of a code as a whole one; `cut` takes the additions off what is decoded.
- ``crop``: cut rows below, columns on the right and frames at the end, down to the last multiple.
- ``floor``: what the reference does silently. There are as many codes as with ``crop``, but they are other
  codes: the left-over pixels still enter the convolutions and the statistics of the norms.
"""

PIXEL_TOLERANCE = 0.1
"""Pixels may overshoot [-1, 1] by this much (resampling does) before they are refused."""


def check_pixels(pixels: Tensor, channels: int) -> None:
    """Raise `ValueError` unless `pixels` are images [B, C, H, W] or clips [B, T, C, H, W] in [-1, 1]."""
    if pixels.dim() not in (4, 5) or pixels.shape[-3] != channels or pixels.numel() == 0:
        raise ValueError(
            f"pixels have shape {list(pixels.shape)}: give images [B, {channels}, H, W] or clips "
            f"[B, T, {channels}, H, W], channels before height{_remedy(pixels, channels)}"
        )
    if not pixels.is_floating_point():
        raise ValueError(f"pixels are {pixels.dtype}: give floating point in [-1, 1] (uint8 / 127.5 - 1)")
    low, high = (float(value) for value in pixels.aminmax())
    if low != low:
        raise ValueError(
            f"pixels range from {low} to {high}: some are not numbers; they must lie in [-1, 1]; look at the "
            "step that made them"
        )
    if not (low >= -1 - PIXEL_TOLERANCE and high <= 1 + PIXEL_TOLERANCE):
        raise ValueError(f"pixels range from {low} to {high}: they must lie in [-1, 1] (uint8 / 127.5 - 1)")


def _remedy(pixels: Tensor, channels: int) -> str:
    """The likely slip behind a wrong shape, and the call that puts it right."""
    shape = list(pixels.shape)
    if pixels.dim() == 3 and channels in shape:
        return "; of a single image, give [None]"
    if pixels.dim() == 4 and shape[-1] == channels:
        return "; channels stand last here: permute(0, 3, 1, 2)"
    if pixels.dim() == 5 and shape[-1] == channels:
        return "; channels stand last here: permute(0, 1, 4, 2, 3)"
    if pixels.dim() == 5 and shape[1] == channels:
        return "; channels stand before the frames here: transpose(1, 2)"
    return ""


def check_codes(codes: Tensor, codebook_size: int) -> None:
    """Raise `ValueError` unless `codes` are integers [B, h, w] or [B, t, h, w] inside the codebook."""
    if codes.dim() not in (3, 4) or codes.numel() == 0:
        raise ValueError(
            f"codes have shape {list(codes.shape)}: give images [B, h, w] or clips [B, t, h, w]; of a single "
            "image, give [None]"
        )
    if codes.is_floating_point() or codes.dtype == torch.bool:
        raise ValueError(f"codes are {codes.dtype}: give integers")
    low, high = (int(value) for value in codes.aminmax())
    if low < 0 or high >= codebook_size:
        raise ValueError(
            f"codes range from {low} to {high}: they must lie in 0 to {codebook_size - 1}; of tokens of a "
            "language model, subtract the id of the first visual token"
        )


def fit_pixels(pixels: Tensor, fit: Fit, *, spatial_factor: int, temporal_factor: int) -> Tensor:
    """Make images or clips of any size fit, in the way `fit` names.

    Args:
        pixels: [B, C, H, W] or [B, T, C, H, W].
        fit: see `Fit`.
        spatial_factor: pixels to a code, in height and in width.
        temporal_factor: frames to a code.

    Raises:
        ValueError: sizes that are not multiples (``refuse``), or below one code (``crop``, ``floor``).
    """
    if fit not in get_args(Fit):
        raise ValueError(f"fit is {fit!r}: choose one of {', '.join(get_args(Fit))}")
    clip = pixels.dim() == 5
    if fit == "refuse":
        _refuse(pixels, spatial_factor, temporal_factor)
    elif fit == "pad":
        for dim, factor in _axes(clip, spatial_factor, temporal_factor):
            pixels = _repeat_last(pixels, dim, -pixels.shape[dim] % factor)
    else:
        for dim, factor in _axes(clip, spatial_factor, temporal_factor):
            length = pixels.shape[dim]
            if length < factor:
                raise ValueError(
                    f"{_NAMES[dim]} is {length}, less than one code ({factor}): with fit {fit!r} nothing is "
                    "left; use fit='pad'"
                )
            if fit == "crop":
                pixels = pixels.narrow(dim, 0, length // factor * factor)
    return pixels


_NAMES = {-4: "the number of frames", -2: "height", -1: "width"}


def _axes(clip: bool, spatial_factor: int, temporal_factor: int) -> list[tuple[int, int]]:
    """Dimensions and the factors that they must be multiples of."""
    return [(-2, spatial_factor), (-1, spatial_factor), *([(-4, temporal_factor)] if clip else [])]


def _refuse(pixels: Tensor, spatial_factor: int, temporal_factor: int) -> None:
    height, width = pixels.shape[-2:]
    if height % spatial_factor or width % spatial_factor:
        raise ValueError(
            f"pixels are {height}x{width}: both must be multiples of {spatial_factor}; resize, or choose "
            "fit='pad' or fit='crop'"
        )
    if pixels.dim() == 5 and pixels.shape[1] % temporal_factor:
        raise ValueError(
            f"clips have {pixels.shape[1]} frames: the number must be a multiple of {temporal_factor}; "
            "choose fit='crop' to cut the last frames or fit='pad' to repeat the last one"
        )


def _repeat_last(x: Tensor, dim: int, count: int) -> Tensor:
    last = x.narrow(dim, x.shape[dim] - 1, 1)
    return torch.cat((x, *[last] * count), dim) if count else x


def cut(pixels: Tensor, *, size: tuple[int, int] | None = None, frames: int | None = None) -> Tensor:
    """Take off what ``pad`` added: keep the first rows, columns and frames.

    Args:
        pixels: decoded images [B, C, H, W] or clips [B, T, C, H, W].
        size: height and width to keep; None keeps all.
        frames: number of frames to keep; None keeps all.

    Raises:
        ValueError: more is asked for than there is, or frames of images.
    """
    if frames is not None and pixels.dim() != 5:
        raise ValueError(f"frames is {frames}, but the codes are of images: only clips have frames; leave it")
    wanted = {-4: frames, **dict(zip((-2, -1), size or (None, None), strict=True))}
    for dim, length in wanted.items():
        if length is None:
            continue
        if not 1 <= length <= pixels.shape[dim]:
            raise ValueError(
                f"{_NAMES[dim]} to keep is {length}: the codes give 1 to {pixels.shape[dim]}; name the size "
                "that was encoded"
            )
        pixels = pixels.narrow(dim, 0, length)
    return pixels
