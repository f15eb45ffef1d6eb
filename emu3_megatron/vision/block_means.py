"""First weights with which a tokenizer gives the means of blocks, smoothly enlarged.

Group norms take the mean out of every group of channels, and with it the level of a colour: a picture's
darkness and its tint have to be found again from what the other channels say, for which a training of minutes
is too short. A group of which one channel holds a colour, one its negative and one a large constant has a
fixed mean and nearly a fixed variance, so that the norm passes the colour on as it is. All other channels
start as they always do.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import cast

import torch
from torch import Tensor, nn

from emu3_megatron.vision.config import NORM_GROUPS, VisionTokenizerConfig
from emu3_megatron.vision.layers import ResidualBlock, SpatialNorm, TemporalDownsample, TemporalUpsample
from emu3_megatron.vision.model import Level, VisionTokenizer

COLOURS = 3

CONSTANT = 6.0
"""Of the third channel of a group; colours lie in [-1, 1], and its square should be far above theirs."""

MEAN_SQUARE = 0.25
"""Of a colour, about; an error of it changes the contrast by a 50th of the error."""

SHIFT = 3.0
"""Added before a swish, which is nearly linear there."""

NOISE = 0.002
"""Standard deviation of what the layers over time add to the identity."""

SMOOTH = torch.tensor([1.0, 2.0, 1.0]) / 4
"""Between repetitions of pixels: twice as many of them then lie on a curve."""


def check_block_means(config: VisionTokenizerConfig) -> None:
    """Raise `ValueError` where a tokenizer of this shape cannot start so."""
    least = 3 * NORM_GROUPS
    for width in (config.channels, config.hidden_size):
        if width < least:
            raise ValueError(
                f"start_from_block_means is true, and a level has {width} channels: it takes three for each "
                f"of a norm's {NORM_GROUPS} groups, at least {least} at the first level and the last"
            )
    if config.z_channels < COLOURS or config.in_channels != COLOURS or config.out_channels != COLOURS:
        raise ValueError(
            f"start_from_block_means is true with in_channels {config.in_channels}, out_channels "
            f"{config.out_channels} and z_channels {config.z_channels}: it takes three colours, and a latent "
            "channel for each"
        )


@torch.no_grad()
def start_from_block_means(tokenizer: VisionTokenizer) -> None:
    """Set weights in place, after `initialise`.

    The first three latents are the mean colours of blocks; further ones start at random. Decoding enlarges
    them by repetition and a binomial kernel at every level.

    Raises:
        ValueError: see `check_block_means`.
    """
    check_block_means(tokenizer.config)
    training = tokenizer.training
    tokenizer.eval()  # batch norms keep their statistics
    encoder, decoder = tokenizer.encoder, tokenizer.decoder
    inwards, outwards = _path(encoder.conv_in, encoder.down), _path(decoder.conv_in, reversed(decoder.up))
    _pass_colours(list(inwards), encoder.norm_out, encoder.conv_out)
    _pass_colours(list(outwards), decoder.norm_out.norm_layer, decoder.conv_out)
    _fix(decoder.norm_out)
    _pass_through_time(tokenizer)
    tokenizer.train(training)


def _path(first: nn.Conv2d, levels: Iterable[nn.Module]) -> Iterator[tuple[nn.Conv2d, Tensor]]:
    """The convolutions on the way through a 2D network that no shortcut goes around, with their kernels."""
    yield first, _centre()
    for level in cast(Iterable[Level], levels):
        for block in cast(Iterable[ResidualBlock], level.block):
            if hasattr(block, "nin_shortcut"):
                yield block.nin_shortcut, torch.ones(1, 1)
        if level.downsample is not None:
            mean = torch.zeros(3, 3)
            mean[:2, :2] = 0.25
            yield level.downsample.conv, mean
        if level.upsample is not None:
            yield level.upsample.conv, SMOOTH[:, None] * SMOOTH


def _centre() -> Tensor:
    kernel = torch.zeros(3, 3)
    kernel[1, 1] = 1
    return kernel


def _pass_colours(path: list[tuple[nn.Conv2d, Tensor]], norm: nn.GroupNorm, out: nn.Conv2d) -> None:
    """Lead three colours through convolutions, the norm behind them, a swish, and the last convolution."""
    places = list(range(COLOURS))
    for number, (conv, kernel) in enumerate(path):
        last = number == len(path) - 1
        group = conv.out_channels // NORM_GROUPS
        after = [group * colour if last else colour for colour in range(COLOURS)]
        for before, place in zip(places, after, strict=True):
            _set(conv, place, before, kernel)
            if last:
                _set(conv, place + 1, before, -kernel)
                for silent in range(place + 2, place + group):
                    _set(conv, silent, before, 0 * kernel)
                conv.get_parameter("bias")[place + 2] = CONSTANT
        places = after
    group = norm.num_channels // NORM_GROUPS
    mean = CONSTANT / group
    deviation = math.sqrt((CONSTANT**2 + 2 * MEAN_SQUARE) / group - mean**2)
    slope = (_swish(SHIFT + 1) - _swish(SHIFT - 1)) / 2
    for colour, place in enumerate(places):
        norm.weight[place] = deviation
        norm.bias[place] = SHIFT + mean
        _set(out, colour, place, _centre() / slope)
        out.get_parameter("bias")[colour] = -_swish(SHIFT) / slope


def _set(conv: nn.Conv2d, place: int, before: int, kernel: Tensor) -> None:
    """Let output channel `place` be input channel `before` under `kernel`."""
    conv.weight[place] = 0
    conv.weight[place, before] = kernel.to(conv.weight)
    conv.get_parameter("bias")[place] = 0


def _fix(norm: SpatialNorm) -> None:
    """Let the codes leave the channels alone that hold colours."""
    for colour in range(COLOURS):
        place = colour * (norm.norm_layer.num_channels // NORM_GROUPS)
        for conv, value in ((norm.conv_y, 1.0), (norm.conv_b, 0.0)):
            conv.weight[place] = 0
            conv.get_parameter("bias")[place] = value


def _pass_through_time(tokenizer: VisionTokenizer) -> None:
    """The layers over time, with less noise, and without what they add and multiply by."""
    layers = [m.conv for m in tokenizer.modules() if isinstance(m, TemporalDownsample | TemporalUpsample)]
    for layer in (*layers, tokenizer.quant_conv, tokenizer.post_quant_conv):
        weight: Tensor = layer.conv.weight
        frames = 2 if layer.conv.stride[0] == 2 else 1
        identity = torch.eye(*weight.shape[:2]).to(weight)
        nn.init.normal_(weight, std=NOISE)
        weight[:, :, -frames:, weight.shape[3] // 2, weight.shape[4] // 2] += identity[:, :, None] / frames
    encoder, decoder = tokenizer.encoder, tokenizer.decoder

    def encoded(value: float) -> Tensor:
        steady = torch.full((1, tokenizer.config.z_channels, tokenizer.temporal_factor, 9, 9), value)
        return tokenizer.quant_conv(encoder.time(steady))[0, :, 0, 4, 4]

    def decoded(value: float) -> Tensor:
        steady = torch.full((1, tokenizer.config.embed_dim, 1, 9, 9), value)
        return decoder.time(tokenizer.post_quant_conv(steady))[0, :, -1, 4, 4]

    last: nn.Conv3d = tokenizer.quant_conv.conv
    slope, middle = (encoded(1.0) - encoded(-1.0)) / 2, encoded(0.0)
    last.weight.div_(slope[:, None, None, None, None])
    bias = last.get_parameter("bias")
    bias.sub_(middle).div_(slope)
    slope, middle = (decoded(1.0) - decoded(-1.0)) / 2, decoded(0.0)
    decoder.conv_in.weight.div_(slope[None, :, None, None])
    decoder.conv_in.get_parameter("bias").sub_(
        (decoder.conv_in.weight * middle[None, :, None, None]).sum((1, 2, 3))
    )


def _swish(value: float) -> float:
    return value / (1 + math.exp(-value))
