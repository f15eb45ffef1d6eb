"""Emu3's vision tokenizer: images and clips to codes, and back.

Shapes: B batch, T frames, t = T / temporal factor latent frames, N frames of a batch (B*T), C channels,
H W height and width in pixels, h w in codes, D length of a codebook vector, Z channels of the temporal
layers, K codes, R rows (positions) to quantize.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from emu3_megatron.vision import checkpoint
from emu3_megatron.vision.config import NORM_GROUPS, VisionTokenizerConfig
from emu3_megatron.vision.layers import (
    NORM_EPSILON,
    AttentionBlock,
    CausalConv3d,
    Downsample,
    ResidualBlock,
    SpatialNorm,
    TemporalDownsample,
    TemporalResidualBlock,
    TemporalUpsample,
    Upsample,
    swish,
)

DISTANCES_AT_ONCE = 1 << 22
"""Elements of the [rows, codes] distances held at a time by `nearest_codes`: 16 MiB in fp32."""

PIXEL_TOLERANCE = 0.1
"""Pixels may overshoot [-1, 1] by this much (resampling does) before they are refused."""


class Middle(nn.Module):
    """Residual block, attention, residual block, at the lowest resolution."""

    def __init__(self, channels: int, embed_dim: int | None = None) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(channels, channels, embed_dim)
        self.attn_1 = AttentionBlock(channels, embed_dim)
        self.block_2 = ResidualBlock(channels, channels, embed_dim)

    def forward(self, x_NChw: Tensor, codes_NDhw: Tensor | None = None) -> Tensor:
        """Shape of the input."""
        x_NChw = self.attn_1(self.block_1(x_NChw, codes_NDhw), codes_NDhw)
        return self.block_2(x_NChw, codes_NDhw)


class Level(nn.Module):
    """Residual blocks of one resolution, each followed by attention where the level has it."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_blocks: int,
        attention: bool,
        embed_dim: int | None = None,
        *,
        downsample: bool = False,
        upsample: bool = False,
    ) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * (num_blocks - 1)
        self.block = nn.ModuleList(ResidualBlock(w, out_channels, embed_dim) for w in widths[:num_blocks])
        num_attention = num_blocks if attention else 0
        self.attn = nn.ModuleList(AttentionBlock(out_channels, embed_dim) for _ in range(num_attention))
        self.downsample = Downsample(out_channels) if downsample else None
        self.upsample = Upsample(out_channels) if upsample else None

    def forward(self, x_NCHW: Tensor, codes_NDhw: Tensor | None = None) -> Tensor:
        """Channels change; height and width only where the level resamples."""
        for index, block in enumerate(self.block):
            x_NCHW = block(x_NCHW, codes_NDhw)
            if len(self.attn) > 0:
                x_NCHW = self.attn[index](x_NCHW, codes_NDhw)
        for resample in (self.downsample, self.upsample):
            if resample is not None:
                x_NCHW = resample(x_NCHW)
        return x_NCHW


class Encoder(nn.Module):
    """Pixels to latents: a 2D network on every frame, then causal layers over time."""

    def __init__(self, config: VisionTokenizerConfig) -> None:
        super().__init__()
        widths = config.level_channels
        self.conv_in = nn.Conv2d(config.in_channels, config.channels, 3, padding=1)
        self.down = nn.ModuleList()
        for index, width in enumerate(widths):
            before, attention = widths[max(index - 1, 0)], index in config.attention_resolutions
            last = index == len(widths) - 1
            self.down.append(Level(before, width, config.num_res_blocks, attention, downsample=not last))
        self.mid = Middle(config.hidden_size)
        self.norm_out = nn.GroupNorm(NORM_GROUPS, config.hidden_size, eps=NORM_EPSILON)
        self.conv_out = nn.Conv2d(config.hidden_size, config.z_channels, 3, padding=1)
        self.time_conv = nn.ModuleList(
            TemporalDownsample(config.z_channels) for _ in range(config.temporal_steps)
        )
        self.time_res_stack = nn.ModuleList(
            TemporalResidualBlock(config.z_channels) for _ in range(config.num_res_blocks)
        )

    def frames(self, pixels_NCHW: Tensor) -> Tensor:
        """The 2D network: [N, C, H, W] to [N, Z, h, w]."""
        x_NCHW = self.conv_in(pixels_NCHW)
        for level in self.down:
            x_NCHW = level(x_NCHW)
        return self.conv_out(swish(self.norm_out(self.mid(x_NCHW))))

    def time(self, x_BZThw: Tensor) -> Tensor:
        """The layers over time: [B, Z, T, h, w] to [B, Z, t, h, w]."""
        for layer in self.time_conv:
            x_BZThw = swish(layer(x_BZThw))
        for layer in self.time_res_stack:
            x_BZThw = layer(x_BZThw)
        return x_BZThw


class Decoder(nn.Module):
    """Latents to pixels: causal layers over time, then a 2D network on every frame, steered by the codes."""

    def __init__(self, config: VisionTokenizerConfig) -> None:
        super().__init__()
        widths, embed_dim = config.level_channels, config.embed_dim
        self.time_res_stack = nn.ModuleList(
            TemporalResidualBlock(config.z_channels) for _ in range(config.num_res_blocks)
        )
        self.time_conv = nn.ModuleList(
            TemporalUpsample(config.z_channels) for _ in range(config.temporal_steps)
        )
        self.conv_in = nn.Conv2d(config.z_channels, config.hidden_size, 3, padding=1)
        self.mid = Middle(config.hidden_size, embed_dim)
        levels = []
        for index, width in enumerate(widths):
            before = widths[min(index + 1, len(widths) - 1)]
            attention = index in config.attention_resolutions
            blocks = config.num_res_blocks + 1
            levels.append(Level(before, width, blocks, attention, embed_dim, upsample=index > 0))
        self.up = nn.ModuleList(levels)
        self.norm_out = SpatialNorm(config.channels, embed_dim)
        self.conv_out = nn.Conv2d(config.channels, config.out_channels, 3, padding=1)

    def time(self, x_BZthw: Tensor) -> Tensor:
        """The layers over time: [B, Z, t, h, w] to [B, Z, T, h, w]."""
        for layer in self.time_res_stack:
            x_BZthw = layer(x_BZthw)
        for layer in self.time_conv:
            x_BZthw = swish(layer(x_BZthw))
        return x_BZthw

    def frames(self, x_NZhw: Tensor, codes_NDhw: Tensor) -> Tensor:
        """The 2D network: [N, Z, h, w] to [N, C, H, W]."""
        x_NCHW = self.mid(self.conv_in(x_NZhw), codes_NDhw)
        for level in reversed(self.up):
            x_NCHW = level(x_NCHW, codes_NDhw)
        return self.conv_out(swish(self.norm_out(x_NCHW, codes_NDhw)))


class Codebook(nn.Module):
    """K vectors of length D; a latent is replaced by the nearest in L2."""

    def __init__(self, config: VisionTokenizerConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.codebook_size, config.embed_dim)


def nearest_codes(rows_RD: Tensor, codebook_KD: Tensor) -> Tensor:
    """Index (int64, [R]) of the codebook vector nearest to every row, in L2; the first among equals.

    One matrix product per chunk of rows, so that the [R, K] distances never exist as a whole.
    """
    norms_K = codebook_KD.square().sum(1)
    chunk = max(1, DISTANCES_AT_ONCE // codebook_KD.shape[0])
    found = []
    for part_rD in rows_RD.split(chunk):
        # The reference's order of operations, so that rounding (hence near ties) falls the same way.
        distances_rK = part_rD.square().sum(1, keepdim=True) + norms_K
        distances_rK.sub_(part_rD @ codebook_KD.T, alpha=2)
        found.append(distances_rK.argmin(1))
    return torch.cat(found)


class VisionTokenizer(nn.Module):
    """Turns pixels into codes and codes into pixels, exactly as Emu3's tokenizer does on the same weights.

    A new instance is in evaluation mode: its batch norms must use their running statistics when tokenizing.
    """

    def __init__(self, config: VisionTokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = Codebook(config)
        self.quant_conv = CausalConv3d(config.z_channels, config.embed_dim, (3, 1, 1))
        self.post_quant_conv = CausalConv3d(config.embed_dim, config.z_channels, (3, 1, 1))
        self.eval()

    @property
    def spatial_factor(self) -> int:
        """Pixels to one code, in height and in width."""
        return self.config.spatial_factor

    @property
    def temporal_factor(self) -> int:
        """Frames of a clip to one frame of codes."""
        return self.config.temporal_downsample_factor

    @property
    def codebook(self) -> Tensor:
        """The codebook vectors, [K, D]."""
        return self.quantize.embedding.weight

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the weights."""
        return self.codebook.dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.codebook.device

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the configuration and every weight; read anew at each call."""
        return checkpoint.fingerprint(self)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Codes of images or clips.

        Args:
            pixels: floating point in [-1, 1]; images [B, 3, H, W] or clips [B, T, 3, H, W].

        Returns:
            int64 codes, [B, h, w] for images and [B, t, h, w] for clips.

        Raises:
            ValueError: for another shape or dtype, sizes that are not multiples of the factors, NaN, or
                pixels far outside [-1, 1].
        """
        self._check_pixels(pixels)
        latents_BDthw = self.encode_latents(pixels.to(self.device, self.dtype))
        codes_Bthw = self.codes_of(latents_BDthw)
        return codes_Bthw.squeeze(1) if pixels.dim() == 4 else codes_Bthw

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Pixels of codes; they may overshoot [-1, 1].

        Args:
            codes: integers in ``0 .. codebook_size - 1``; images [B, h, w] or clips [B, t, h, w].

        Returns:
            [B, 3, H, W] or [B, T, 3, H, W], in the dtype of the weights.

        Raises:
            ValueError: for another shape or dtype, or a code outside the codebook.
        """
        self._check_codes(codes)
        image = codes.dim() == 3
        codes_Bthw = codes.to(self.device, torch.int64)
        quantized_BDthw = self.vectors_of(codes_Bthw.unsqueeze(1) if image else codes_Bthw)
        # Of the frames that an image's latents stand for, the first is the image.
        pixels_BTCHW = self.decode_latents(quantized_BDthw, frames=[0] if image else None)
        return pixels_BTCHW.squeeze(1) if image else pixels_BTCHW

    def encode_latents(self, pixels: Tensor) -> Tensor:
        """Latents before quantization, [B, D, t, h, w], of images [B, 3, H, W] or clips [B, T, 3, H, W].

        An image is what Emu3 makes of it: a clip of equal frames. The 2D network runs once on it, and only
        its latents, of few channels, are repeated.
        """
        image = pixels.dim() == 4
        batch = pixels.shape[0]
        x_NZhw = self.encoder.frames(pixels if image else pixels.flatten(0, 1))
        x_BTZhw = x_NZhw.unflatten(0, (batch, -1))
        x_BZThw = x_BTZhw.transpose(1, 2)
        if image:
            x_BZThw = x_BZThw.expand(-1, -1, self.temporal_factor, -1, -1)
        return self.quant_conv(self.encoder.time(x_BZThw))

    def codes_of(self, latents_BDthw: Tensor) -> Tensor:
        """Nearest codes, [B, t, h, w]."""
        rows_BthwD = latents_BDthw.movedim(1, -1)
        return nearest_codes(rows_BthwD.flatten(0, -2), self.codebook).view(rows_BthwD.shape[:-1])

    def vectors_of(self, codes_Bthw: Tensor) -> Tensor:
        """Codebook vectors of codes, [B, D, t, h, w]."""
        return self.quantize.embedding(codes_Bthw).movedim(-1, 1).contiguous()

    def decode_latents(self, quantized_BDthw: Tensor, *, frames: Sequence[int] | None = None) -> Tensor:
        """Pixels [B, T, 3, H, W] of quantized latents; T counts all frames, or those of the list `frames`.

        The 2D network, nearly all of the work, runs on the wanted frames only.
        """
        batch = quantized_BDthw.shape[0]
        both_BZthw = torch.cat((self.post_quant_conv(quantized_BDthw), quantized_BDthw))
        both_BTZhw = self.decoder.time(both_BZthw).transpose(1, 2)
        if frames is not None:
            both_BTZhw = both_BTZhw[:, list(frames)]
        x_NZhw, codes_NDhw = (part.flatten(0, 1) for part in both_BTZhw.chunk(2))
        return self.decoder.frames(x_NZhw, codes_NDhw).unflatten(0, (batch, -1))

    def save_pretrained(
        self, folder: str | os.PathLike[str], *, layout: Literal["transformers", "emu3"] = "transformers"
    ) -> None:
        """Write ``config.json`` and ``model.safetensors``, each atomically.

        `layout` names the public layout: that of `transformers.Emu3VQVAE`, or that of the released model.
        """
        checkpoint.save(self, Path(folder), layout)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> VisionTokenizer:
        """Load a folder in either public layout, in evaluation mode.

        Raises:
            ValueError: for weights that are missing, unexpected, or not of the configuration's shapes.
            FileNotFoundError: for a folder without the files.
        """
        config = checkpoint.load_config(Path(folder))
        with torch.device("meta"):
            tokenizer = cls(config)
        checkpoint.load_weights(tokenizer, Path(folder))
        return tokenizer.eval()

    def _check_pixels(self, pixels: Tensor) -> None:
        channels = self.config.in_channels
        if pixels.dim() not in (4, 5) or pixels.shape[-3] != channels or pixels.numel() == 0:
            raise ValueError(
                f"pixels have shape {list(pixels.shape)}: give images [B, {channels}, H, W] or clips "
                f"[B, T, {channels}, H, W], channels before height"
            )
        if not pixels.is_floating_point():
            raise ValueError(f"pixels are {pixels.dtype}: give floating point in [-1, 1] (uint8 / 127.5 - 1)")
        height, width = pixels.shape[-2:]
        factor = self.spatial_factor
        if height % factor or width % factor:
            raise ValueError(
                f"pixels are {height}x{width}: both must be multiples of {factor}; resize, crop or pad"
            )
        if pixels.dim() == 5 and pixels.shape[1] % self.temporal_factor:
            raise ValueError(
                f"clips have {pixels.shape[1]} frames: the number must be a multiple of "
                f"{self.temporal_factor}; cut the clip or repeat its last frame"
            )
        low, high = (float(value) for value in pixels.aminmax())
        if not (low >= -1 - PIXEL_TOLERANCE and high <= 1 + PIXEL_TOLERANCE):
            raise ValueError(
                f"pixels range from {low} to {high}: they must lie in [-1, 1] (uint8 / 127.5 - 1)"
            )

    def _check_codes(self, codes: Tensor) -> None:
        if codes.dim() not in (3, 4) or codes.numel() == 0:
            raise ValueError(
                f"codes have shape {list(codes.shape)}: give images [B, h, w] or clips [B, t, h, w]"
            )
        if codes.is_floating_point() or codes.dtype == torch.bool:
            raise ValueError(f"codes are {codes.dtype}: give integers")
        low, high = (int(value) for value in codes.aminmax())
        if low < 0 or high >= self.config.codebook_size:
            raise ValueError(
                f"codes range from {low} to {high}: they must lie in 0 to {self.config.codebook_size - 1}"
            )
