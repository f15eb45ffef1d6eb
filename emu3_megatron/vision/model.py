"""Emu3's vision tokenizer: images and clips to codes, and back.

Shapes: B batch, T frames, t = T / temporal factor latent frames, N frames of a batch (B*T), C channels,
H W height and width in pixels, h w in codes, D length of a codebook vector, Z channels of the temporal
layers, K codes, R rows (positions) to quantize.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from emu3_megatron.vision import checkpoint
from emu3_megatron.vision.config import NORM_GROUPS, VisionTokenizerConfig
from emu3_megatron.vision.inputs import Fit, check_codes, check_pixels, cut, fit_pixels
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
from emu3_megatron.vision.winograd import WinogradConv2d, fits

DISTANCES_AT_ONCE = 1 << 22
"""Most elements of the [rows, codes] distances that `nearest_codes` holds at a time: 16 MiB in fp32."""

DISTANCES_IN_CACHE = 1 << 19
"""The same on a CPU, where they should stay in its cache: twice as fast."""


@contextmanager
def exact_convolutions() -> Iterator[None]:
    """Within it fp32 convolutions on CUDA do not round their inputs to TF32, as cuDNN does by default.

    Its 10 bits of mantissa change codes, which hang on fp32 layers even where the others are bf16.
    """
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def _use_winograd(network: nn.Module) -> None:
    """Put `WinogradConv2d` in the place of the convolutions within `network` that it fits."""
    for module in list(network.modules()):
        for name, inner in list(module.named_children()):
            if isinstance(inner, nn.Conv2d) and fits(inner):
                setattr(module, name, WinogradConv2d(inner))


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
        x_NCHW = self.conv_in(pixels_NCHW.to(self.conv_in.weight.dtype))
        for level in self.down:
            x_NCHW = level(x_NCHW)
        return self.latents(self.mid(x_NCHW))

    def latents(self, x_NChw: Tensor) -> Tensor:
        """The last norm and convolution, in their own precision: [N, C, h, w] to [N, Z, h, w]."""
        return self.conv_out(swish(self.norm_out(x_NChw.to(self.conv_out.weight.dtype))))

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
        dtype = self.conv_in.weight.dtype
        x_NCHW, codes_NDhw = self.conv_in(x_NZhw.to(dtype)), codes_NDhw.to(dtype)
        x_NCHW = self.mid(x_NCHW, codes_NDhw)
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
    at_once = DISTANCES_IN_CACHE if codebook_KD.device.type == "cpu" else DISTANCES_AT_ONCE
    chunk = max(1, at_once // codebook_KD.shape[0])
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
    def encode(self, pixels: Tensor, *, fit: Fit = "refuse") -> Tensor:
        """Codes of images or clips.

        Args:
            pixels: floating point in [-1, 1]; images [B, 3, H, W] or clips [B, T, 3, H, W].
            fit: what to do with sizes that are not multiples of the factors; see `inputs.Fit`.

        Returns:
            int64 codes, [B, h, w] for images and [B, t, h, w] for clips.

        Raises:
            ValueError: for another shape or dtype, sizes that do not fit, NaN, or pixels far outside [-1, 1].
        """
        check_pixels(pixels, self.config.in_channels)
        pixels = fit_pixels(
            pixels, fit, spatial_factor=self.spatial_factor, temporal_factor=self.temporal_factor
        )
        with exact_convolutions():
            codes_Bthw = self.codes_of(self.encode_latents(pixels.to(self.device, self.dtype)))
        return codes_Bthw.squeeze(1) if pixels.dim() == 4 else codes_Bthw

    @torch.no_grad()
    def decode(
        self, codes: Tensor, *, size: tuple[int, int] | None = None, frames: int | None = None
    ) -> Tensor:
        """Pixels of codes; they may overshoot [-1, 1].

        Args:
            codes: integers in ``0 .. codebook_size - 1``; images [B, h, w] or clips [B, t, h, w].
            size: height and width of what was encoded with ``fit="pad"``: the additions are cut off.
            frames: its number of frames, for the same purpose.

        Returns:
            [B, 3, H, W] or [B, T, 3, H, W], in the dtype of the codebook.

        Raises:
            ValueError: for another shape or dtype, a code outside the codebook, or a size beyond the codes'.
        """
        check_codes(codes, self.config.codebook_size)
        image = codes.dim() == 3
        codes_Bthw = codes.to(self.device, torch.int64)
        quantized_BDthw = self.vectors_of(codes_Bthw.unsqueeze(1) if image else codes_Bthw)
        # Of the frames that an image's latents stand for, the first is the image.
        pixels_BTCHW = self.decode_latents(quantized_BDthw, frames=[0] if image else None)
        return cut(pixels_BTCHW.squeeze(1) if image else pixels_BTCHW, size=size, frames=frames)

    def encode_latents(self, pixels: Tensor) -> Tensor:
        """Latents before quantization, [B, D, t, h, w], of images [B, 3, H, W] or clips [B, T, 3, H, W].

        An image is what Emu3 makes of it: a clip of equal frames. The 2D network runs once on it, and only
        its latents, of few channels, are repeated.
        """
        image = pixels.dim() == 4
        x_NZhw = self.encoder.frames(pixels if image else pixels.flatten(0, 1))
        return self.latents_over_time(x_NZhw.unflatten(0, (len(pixels), -1)), image)

    def latents_over_time(self, x_BTZhw: Tensor, image: bool) -> Tensor:
        """The part of `encode_latents` after the 2D network."""
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
        pixels_NCHW = self.decoder.frames(*self.frames_to_decode(quantized_BDthw, frames=frames))
        return pixels_NCHW.to(self.dtype).unflatten(0, (len(quantized_BDthw), -1))

    def frames_to_decode(
        self, quantized_BDthw: Tensor, *, frames: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """The part of `decode_latents` before the 2D network: the two inputs of `Decoder.frames`."""
        both_BZthw = torch.cat((self.post_quant_conv(quantized_BDthw), quantized_BDthw))
        both_BTZhw = self.decoder.time(both_BZthw).transpose(1, 2)
        if frames is not None:
            both_BTZhw = both_BTZhw[:, list(frames)]
        x_BTZhw, codes_BTDhw = both_BTZhw.chunk(2)
        return x_BTZhw.flatten(0, 1), codes_BTDhw.flatten(0, 1)

    @torch.no_grad()
    def for_inference(
        self, *, dtype: torch.dtype = torch.float32, channels_last: bool = True
    ) -> VisionTokenizer:
        """Lay the weights of the 2D networks out for speed, in place; nothing else should be done with them.

        The layers over time, the encoder's last norm and convolution and the codebook stay as they are: they
        cost nothing, and codes hang on them. Pixels and codes keep their types. Take `fingerprint` before.

        Args:
            dtype: arithmetic of the 2D networks: float32, or bfloat16, which changes some codes:
                docs/vision-tokenizer.md has figures. A CPU without AMX multiplies matrices no faster in
                bfloat16; it is given `winograd` in fp32 instead, which is faster and nearer to fp32.
            channels_last: memory order of convolutions. It changes the order of additions, so that a code may
                differ from the reference's where two codebook vectors are nearly equally near.

        Returns:
            This tokenizer.
        """
        kept = (self.encoder.norm_out, self.encoder.conv_out)
        slow = self.device.type == "cpu" and not torch.cpu._is_amx_tile_supported()
        for network in (self.encoder, self.decoder):
            for name, part in network.named_children():
                if name in ("time_conv", "time_res_stack") or part in kept:
                    continue
                if dtype == torch.bfloat16 and slow:
                    _use_winograd(part)
                else:
                    part.to(dtype)
        for weight in self.parameters():
            if channels_last and weight.dim() == 4:
                weight.data = weight.data.contiguous(memory_format=torch.channels_last)
        return self

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
