"""First weights of a tokenizer that is trained from scratch: near the identity wherever that can be."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from emu3_megatron.vision.layers import (
    AttentionBlock,
    CausalConv3d,
    ResidualBlock,
    SpatialNorm,
    TemporalDownsample,
    TemporalResidualBlock,
    TemporalUpsample,
)
from emu3_megatron.vision.model import VisionTokenizer

SWISH_SHIFT = 3.0
"""Latents are shifted by this much before the swish of a temporal layer, where it is nearly the identity."""

NOISE = 0.02
"""Standard deviation added to identity weights, to break their symmetry."""


@torch.no_grad()
def initialise(tokenizer: VisionTokenizer) -> None:
    """Set the weights in place.

    Residual branches start at zero, spatial norms at the plain norm, and the temporal layers pass each latent
    through: they average the frames that become one, and repeat the one that becomes several. A tokenizer
    thus starts as a plain image autoencoder on every frame.
    """
    for module in tokenizer.modules():
        if isinstance(module, ResidualBlock):
            nn.init.zeros_(module.conv2.weight)
        elif isinstance(module, AttentionBlock):
            nn.init.zeros_(module.proj_out.weight)
            nn.init.zeros_(module.proj_out.bias)
        elif isinstance(module, SpatialNorm):
            _fill_bias(module.conv_y, 1.0)
        elif isinstance(module, TemporalResidualBlock):
            nn.init.zeros_(module.conv2.conv.weight)
            _fill_bias(module.conv2.conv, 0.0)
        elif isinstance(module, TemporalDownsample):
            _pass_through(module.conv, frames=2)
        elif isinstance(module, TemporalUpsample):
            _pass_through(module.conv, frames=1)
    for stack in (tokenizer.encoder.time_conv, tokenizer.decoder.time_conv):
        for layer in list(stack)[:1]:
            _fill_bias(layer.get_submodule("conv.conv"), SWISH_SHIFT)
    for conv in (tokenizer.quant_conv, tokenizer.post_quant_conv):
        _pass_through(conv, frames=1)
    if tokenizer.config.temporal_steps:
        # Undo the shift, so that codes lie around zero.
        _fill_bias(tokenizer.quant_conv.conv, -_after_swish(tokenizer.config.temporal_steps))


def _pass_through(conv: CausalConv3d, frames: int) -> None:
    """Weights that average the last `frames` frames of the kernel, at its centre, channel by channel."""
    weight: Tensor = conv.conv.weight
    height, width = weight.shape[3] // 2, weight.shape[4] // 2
    nn.init.normal_(weight, std=NOISE)
    identity = torch.eye(weight.shape[0], weight.shape[1])
    weight[:, :, -frames:, height, width] += identity[:, :, None] / frames
    _fill_bias(conv.conv, 0.0)


def _fill_bias(layer: nn.Module, value: float) -> None:
    layer.get_parameter("bias").fill_(value)


def _after_swish(times: int) -> float:
    value = torch.tensor(SWISH_SHIFT)
    for _ in range(times):
        value = nn.functional.silu(value)
    return float(value)
