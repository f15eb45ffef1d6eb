"""Layers of the vision tokenizer (MoVQGAN with temporal layers, as Emu3 released it).

Shapes: N frames (batch times time), B batch, T frames of a clip, C channels, H W height and width at a level,
h w height and width of the latents, S = H*W positions, D length of a codebook vector.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from emu3_megatron.vision.config import NORM_GROUPS

NORM_EPSILON = 1e-6

SWISH_AT_ONCE = 1 << 18
"""Elements a thread of a CPU takes at a time: 1 MiB in fp32, which stays in its cache."""

ATTENTION_AT_ONCE = 1 << 26
"""Most elements of the [queries, keys] weights of one attention call: 256 MiB in fp32."""

ATTENTION_BLOCK = 256
"""Queries are cut at multiples of this, where the kernels cut too: the rounding stays the same."""


def swish(x: Tensor) -> Tensor:
    """``x * sigmoid(x)``, any shape. Without gradients it overwrites `x`."""
    if torch.is_grad_enabled():
        return F.silu(x)
    # The reference rounds sigmoid before the product; F.silu does not, and a last bit can turn a code.
    for part in _parts(x):
        part.mul_(torch.sigmoid(part))
    return x


def _parts(x: Tensor) -> Sequence[Tensor]:
    """`x` in parts that share its memory; on a CPU small ones: fresh memory costs more than arithmetic."""
    in_order = x if x.is_contiguous() else x.movedim(1, -1)
    if x.device.type != "cpu" or not in_order.is_contiguous():
        return (x,)
    return in_order.view(-1).split(SWISH_AT_ONCE * torch.get_num_threads())


class SpatialNorm(nn.Module):
    """Group norm whose scale and shift are read from the codebook vectors at the same place (MoVQ)."""

    def __init__(self, channels: int, embed_dim: int) -> None:
        super().__init__()
        self.norm_layer = nn.GroupNorm(NORM_GROUPS, channels, eps=NORM_EPSILON)
        self.conv_y = nn.Conv2d(embed_dim, channels, 1)
        self.conv_b = nn.Conv2d(embed_dim, channels, 1)

    def forward(self, x_NCHW: Tensor, codes_NDhw: Tensor) -> Tensor:
        """Normalise `x_NCHW`; H and W are whole multiples of h and w."""
        # A 1x1 convolution commutes with nearest-neighbour upsampling; done first, it costs (H/h)^2 less.
        size = x_NCHW.shape[-2:]
        scale_NCHW = _nearest(self.conv_y(codes_NDhw), size)
        shift_NCHW = _nearest(self.conv_b(codes_NDhw), size)
        return torch.addcmul(shift_NCHW, self.norm_layer(x_NCHW), scale_NCHW)


def _nearest(x_NChw: Tensor, size: torch.Size) -> Tensor:
    return x_NChw if x_NChw.shape[-2:] == size else F.interpolate(x_NChw, size=size, mode="nearest")


def attend(q_N1SC: Tensor, k_N1SC: Tensor, v_N1SC: Tensor) -> Tensor:
    """Softmax attention over the positions of each frame, [N, 1, S, C], without [S, S] weights at large S.

    One head of 1,024 channels is more than flash kernels on GPUs take (256), and what takes their place may
    hold all weights. Queries do not depend on each other, so that they can be cut into parts.
    """
    batch, _, positions, _ = q_N1SC.shape
    fitting = ATTENTION_AT_ONCE // (batch * positions)
    if fitting >= positions:
        return F.scaled_dot_product_attention(q_N1SC, k_N1SC, v_N1SC)
    rows = max(1, fitting // ATTENTION_BLOCK) * ATTENTION_BLOCK
    parts = (F.scaled_dot_product_attention(part, k_N1SC, v_N1SC) for part in q_N1SC.split(rows, dim=2))
    return torch.cat(list(parts), 2)


def _norm(channels: int, embed_dim: int | None) -> nn.Module:
    if embed_dim is None:
        return nn.GroupNorm(NORM_GROUPS, channels, eps=NORM_EPSILON)
    return SpatialNorm(channels, embed_dim)


def _normalise(norm: nn.Module, x_NCHW: Tensor, codes_NDhw: Tensor | None) -> Tensor:
    return norm(x_NCHW) if codes_NDhw is None else norm(x_NCHW, codes_NDhw)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions, each after a norm and a swish. `embed_dim` given: the norms are spatial norms."""

    def __init__(self, in_channels: int, out_channels: int, embed_dim: int | None = None) -> None:
        super().__init__()
        self.norm1 = _norm(in_channels, embed_dim)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = _norm(out_channels, embed_dim)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x_NCHW: Tensor, codes_NDhw: Tensor | None = None) -> Tensor:
        """Channels change from `in_channels` to `out_channels`; height and width stay."""
        y_NCHW = self.conv1(swish(_normalise(self.norm1, x_NCHW, codes_NDhw)))
        y_NCHW = self.conv2(swish(_normalise(self.norm2, y_NCHW, codes_NDhw)))
        x_NCHW = self.nin_shortcut(x_NCHW) if hasattr(self, "nin_shortcut") else x_NCHW
        return y_NCHW + x_NCHW if torch.is_grad_enabled() else y_NCHW.add_(x_NCHW)


class AttentionBlock(nn.Module):
    """Self-attention of one head over the positions of a frame, with its norm and its residual."""

    def __init__(self, channels: int, embed_dim: int | None = None) -> None:
        super().__init__()
        self.norm = _norm(channels, embed_dim)
        self.q = nn.Linear(channels, channels)
        self.k = nn.Linear(channels, channels)
        self.v = nn.Linear(channels, channels)
        self.proj_out = nn.Linear(channels, channels)

    def forward(self, x_NCHW: Tensor, codes_NDhw: Tensor | None = None) -> Tensor:
        """Shape and dtype of `x_NCHW`."""
        y_NSC = _normalise(self.norm, x_NCHW, codes_NDhw).flatten(2).transpose(1, 2)
        q_N1SC, k_N1SC, v_N1SC = (layer(y_NSC).unsqueeze(1) for layer in (self.q, self.k, self.v))
        y_NSC = self.proj_out(attend(q_N1SC, k_N1SC, v_N1SC).squeeze(1))
        return x_NCHW + y_NSC.transpose(1, 2).reshape(x_NCHW.shape)


class Downsample(nn.Module):
    """Halve height and width: a 3x3 convolution of stride 2, padded below and on the right only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Give [N, C, H/2, W/2], rounded down."""
        return self.conv(F.pad(x_NCHW, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double height and width by repetition, then convolve 3x3."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Give [N, C, 2H, 2W]."""
        return self.conv(F.interpolate(x_NCHW, scale_factor=2.0, mode="nearest"))


class CausalConv3d(nn.Module):
    """A 3D convolution over [B, C, T, H, W] that keeps height and width.

    Time is padded by two frames before the first, whatever the kernel, and never after the last.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel: tuple[int, int, int], time_stride: int = 1
    ) -> None:
        super().__init__()
        self.conv = nn.Conv3d(in_channels, out_channels, kernel, stride=(time_stride, 1, 1))
        height, width = kernel[1] // 2, kernel[2] // 2
        self.padding = (width, width, height, height, 2, 0)

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        """Convolve; the length becomes ``(T + 2 - kernel) // time_stride + 1``."""
        return self.conv(F.pad(x_BCTHW, self.padding))


class TemporalResidualBlock(nn.Module):
    """Two causal 3x3x3 convolutions, each after a batch norm and a swish."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm3d(channels)
        self.conv1 = CausalConv3d(channels, channels, (3, 3, 3))
        self.norm2 = nn.BatchNorm3d(channels)
        self.conv2 = CausalConv3d(channels, channels, (3, 3, 3))

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        """Shape of the input."""
        y_BCTHW = self.conv1(swish(self.norm1(x_BCTHW)))
        return x_BCTHW + self.conv2(swish(self.norm2(y_BCTHW)))


class TemporalUpsample(nn.Module):
    """Double the number of frames by repetition, then convolve 3x3x3."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = CausalConv3d(channels, channels, (3, 3, 3))

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        """Give [B, C, 2T, H, W]."""
        return self.conv(x_BCTHW.repeat_interleave(2, dim=2))


class TemporalDownsample(nn.Module):
    """Halve the number of frames: a 4x3x3 convolution of stride 2 in time."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = CausalConv3d(channels, channels, (4, 3, 3), time_stride=2)

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        """Give [B, C, T/2, H, W], rounded down."""
        return self.conv(x_BCTHW)
