"""The 2D networks in stripes of rows: pictures too large for memory, with the result of the whole.

A frame's norms need statistics of the whole frame, and its attention all positions, so that tiles which
know nothing of each other give other codes. Here every layer goes over the frame in stripes, with the rows
above and below that its convolution sees, and the next layer starts when the frame is complete: norms and
attention work as ever. Only the two activations of a residual block are held whole; what norms, swishes and
convolutions need beside them is as large as a stripe.

Shapes: N frames, C channels, H W height and width at a level, h w in codes, D length of a codebook vector.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from emu3_megatron.vision.inputs import check_codes, check_pixels, fit_pixels
from emu3_megatron.vision.layers import NORM_EPSILON, ResidualBlock, SpatialNorm, swish
from emu3_megatron.vision.model import Level, VisionTokenizer, exact_convolutions

STRIPE_ELEMENTS = 1 << 24
"""Elements of a stripe, of all channels and frames of a layer: 64 MiB in fp32."""

Rows = Callable[[int, int], Tensor]
"""Gives rows ``[first, last)`` of a tensor [N, C, H, W] that need not exist as a whole."""


@torch.no_grad()
def encode_in_stripes(
    tokenizer: VisionTokenizer, pixels: Tensor, *, stripe_elements: int = STRIPE_ELEMENTS
) -> Tensor:
    """`VisionTokenizer.encode` in little memory, frame by frame; equal to it up to rounding.

    Args:
        tokenizer: in evaluation mode.
        pixels: images [B, 3, H, W] or clips [B, T, 3, H, W] in [-1, 1]; sizes are multiples of the factors.
        stripe_elements: size of a stripe.

    Returns:
        int64 codes, [B, h, w] or [B, t, h, w].
    """
    check_pixels(pixels, tokenizer.config.in_channels)
    fit_pixels(
        pixels,
        "refuse",
        spatial_factor=tokenizer.spatial_factor,
        temporal_factor=tokenizer.temporal_factor,
    )
    image = pixels.dim() == 4
    frames_NCHW = pixels if image else pixels.flatten(0, 1)
    with exact_convolutions():
        latents = [
            _encode_frame(tokenizer, frame_CHW[None].to(tokenizer.device), stripe_elements)
            for frame_CHW in frames_NCHW
        ]
        latents_BTZhw = torch.cat(latents).unflatten(0, (len(pixels), -1))
        codes_Bthw = tokenizer.codes_of(tokenizer.latents_over_time(latents_BTZhw, image))
    return codes_Bthw.squeeze(1) if image else codes_Bthw


@torch.no_grad()
def decode_in_stripes(
    tokenizer: VisionTokenizer, codes: Tensor, *, stripe_elements: int = STRIPE_ELEMENTS
) -> Tensor:
    """`VisionTokenizer.decode` in little memory, frame by frame; equal to it up to rounding.

    Args:
        tokenizer: in evaluation mode.
        codes: integers, images [B, h, w] or clips [B, t, h, w].
        stripe_elements: size of a stripe.

    Returns:
        [B, 3, H, W] or [B, T, 3, H, W].
    """
    check_codes(codes, tokenizer.config.codebook_size)
    image = codes.dim() == 3
    codes_Bthw = codes.to(tokenizer.device, torch.int64)
    quantized_BDthw = tokenizer.vectors_of(codes_Bthw.unsqueeze(1) if image else codes_Bthw)
    x_NZhw, codes_NDhw = tokenizer.frames_to_decode(quantized_BDthw, frames=[0] if image else None)
    pixels = [
        _decode_frame(tokenizer, x_Zhw[None], codes_Dhw[None], stripe_elements)
        for x_Zhw, codes_Dhw in zip(x_NZhw, codes_NDhw, strict=True)
    ]
    pixels_NCHW = torch.cat(pixels).to(tokenizer.dtype)
    return pixels_NCHW if image else pixels_NCHW.unflatten(0, (len(codes), -1))


def _encode_frame(tokenizer: VisionTokenizer, pixels_NCHW: Tensor, stripe: int) -> Tensor:
    encoder = tokenizer.encoder
    pixels_NCHW = pixels_NCHW.to(encoder.conv_in.weight.dtype)
    x_NCHW = _convolved(encoder.conv_in, _rows(pixels_NCHW), pixels_NCHW.shape, stripe)
    for level in _levels(encoder.down):
        x_NCHW = _blocks(level, x_NCHW, None, stripe)
        if level.downsample is not None:
            x_NCHW = _convolved(level.downsample.conv, _rows(x_NCHW), x_NCHW.shape, stripe, before=0)
    return encoder.latents(encoder.mid(x_NCHW))


def _decode_frame(tokenizer: VisionTokenizer, x_NZhw: Tensor, codes_NDhw: Tensor, stripe: int) -> Tensor:
    decoder = tokenizer.decoder
    dtype = decoder.conv_in.weight.dtype
    x_NCHW, codes_NDhw = decoder.conv_in(x_NZhw.to(dtype)), codes_NDhw.to(dtype)
    x_NCHW = decoder.mid(x_NCHW, codes_NDhw)
    for level in reversed(_levels(decoder.up)):
        x_NCHW = _blocks(level, x_NCHW, codes_NDhw, stripe)
        if level.upsample is not None:
            batch, channels, height, width = x_NCHW.shape
            shape = torch.Size((batch, channels, 2 * height, 2 * width))
            x_NCHW = _convolved(level.upsample.conv, _doubled(x_NCHW), shape, stripe)
    normalised = _normalised(decoder.norm_out, x_NCHW, codes_NDhw)
    return _convolved(decoder.conv_out, normalised, x_NCHW.shape, stripe)


def _levels(modules: nn.ModuleList) -> list[Level]:
    return [module for module in modules if isinstance(module, Level)]


def _blocks(level: Level, x_NCHW: Tensor, codes_NDhw: Tensor | None, stripe: int) -> Tensor:
    for index, block in enumerate(level.block):
        assert isinstance(block, ResidualBlock)
        x_NCHW = _residual(block, x_NCHW, codes_NDhw, stripe)
        if len(level.attn) > 0:
            x_NCHW = level.attn[index](x_NCHW, codes_NDhw)
    return x_NCHW


def _residual(block: ResidualBlock, x_NCHW: Tensor, codes_NDhw: Tensor | None, stripe: int) -> Tensor:
    """A residual block; where its channels stay, the sum overwrites `x_NCHW`."""
    y_NCHW = _convolved(block.conv1, _normalised(block.norm1, x_NCHW, codes_NDhw), x_NCHW.shape, stripe)
    shortcut = block.nin_shortcut if hasattr(block, "nin_shortcut") else None
    sum_NCHW = x_NCHW if shortcut is None else torch.empty_like(y_NCHW)
    rows = _normalised(block.norm2, y_NCHW, codes_NDhw)
    for first, last, part in _convolutions(block.conv2, rows, y_NCHW.shape, stripe, before=1):
        x_part = x_NCHW[:, :, first:last]
        torch.add(part, x_part if shortcut is None else shortcut(x_part), out=sum_NCHW[:, :, first:last])
    return sum_NCHW


def _convolved(conv: nn.Conv2d, rows: Rows, shape: torch.Size, stripe: int, before: int = 1) -> Tensor:
    """A convolution in stripes; `before` rows and columns of zeros stand before the input's."""
    batch, _, height, width = shape
    step = int(conv.stride[0])
    like = conv.weight
    y_NCHW = like.new_empty(batch, conv.out_channels, height // step, width // step)
    for first, last, part in _convolutions(conv, rows, shape, stripe, before=before):
        y_NCHW[:, :, first:last] = part
    return y_NCHW


def _convolutions(
    conv: nn.Conv2d, rows: Rows, shape: torch.Size, stripe: int, *, before: int
) -> Iterator[tuple[int, int, Tensor]]:
    """First and last output row of each stripe, and its output."""
    batch, channels, height, width = shape
    step, kernel = int(conv.stride[0]), int(conv.kernel_size[0])
    total = height // step
    each = max(1, stripe // (batch * max(channels, conv.out_channels) * width) // step)
    for first in range(0, total, each):
        last = min(total, first + each)
        low, high = first * step - before, (last - 1) * step - before + kernel
        part = rows(max(low, 0), min(high, height))
        padding = (before, kernel - before - step, max(-low, 0), max(high - height, 0))
        yield first, last, F.conv2d(F.pad(part, padding), conv.weight, conv.bias, stride=step)


def _rows(x_NCHW: Tensor) -> Rows:
    return lambda first, last: x_NCHW[:, :, first:last]


def _doubled(x_NCHW: Tensor) -> Rows:
    """Rows of `x_NCHW` after doubling height and width by repetition."""

    def rows(first: int, last: int) -> Tensor:
        part = x_NCHW[:, :, first // 2 : (last + 1) // 2]
        skipped = first % 2
        return F.interpolate(part, scale_factor=2.0, mode="nearest")[:, :, skipped : skipped + last - first]

    return rows


def _normalised(norm: nn.Module, x_NCHW: Tensor, codes_NDhw: Tensor | None) -> Rows:
    """Rows of `x_NCHW` after a norm, with the statistics of the whole, and a swish."""
    group = norm.norm_layer if isinstance(norm, SpatialNorm) else norm
    assert isinstance(group, nn.GroupNorm)
    scale_NC11, shift_NC11 = _affine(group, x_NCHW)
    factor = 1 if codes_NDhw is None else x_NCHW.shape[-1] // codes_NDhw.shape[-1]
    maps: tuple[Tensor, Tensor] | None = None
    if isinstance(norm, SpatialNorm):
        maps = norm.conv_y(codes_NDhw), norm.conv_b(codes_NDhw)

    def rows(first: int, last: int) -> Tensor:
        part = torch.addcmul(shift_NC11, x_NCHW[:, :, first:last].float(), scale_NC11).to(x_NCHW.dtype)
        if maps is not None:
            places = torch.arange(first, last, device=part.device) // factor
            y_NCHW, b_NCHW = (m.index_select(2, places).repeat_interleave(factor, 3) for m in maps)
            part = torch.addcmul(b_NCHW, part, y_NCHW)
        return swish(part)

    return rows


def _affine(norm: nn.GroupNorm, x_NCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and shift, float32 [N, C, 1, 1], that a group norm applies to `x_NCHW`."""
    assert norm.weight is not None
    statistics = [
        torch.var_mean(group.float(), dim=(1, 2, 3), correction=0)
        for group in x_NCHW.chunk(norm.num_groups, dim=1)
    ]
    variance_NG, mean_NG = (torch.stack(parts, 1) for parts in zip(*statistics, strict=True))
    repeats = x_NCHW.shape[1] // norm.num_groups
    rate_NC = (variance_NG + NORM_EPSILON).rsqrt().repeat_interleave(repeats, 1)
    scale_NC = rate_NC * norm.weight.float()
    shift_NC = norm.bias.float() - mean_NG.repeat_interleave(repeats, 1) * scale_NC
    return scale_NC[..., None, None], shift_NC[..., None, None]
