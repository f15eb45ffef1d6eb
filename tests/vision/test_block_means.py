"""The start from which a small tokenizer learns photographs within minutes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from emu3_megatron.vision import VisionTokenizer, VisionTokenizerConfig
from emu3_megatron.vision.block_means import start_from_block_means
from emu3_megatron.vision.initialization import initialise
from emu3_megatron.vision.training_config import VisionTrainingConfig

SHAPES = [
    {"channels": 96, "channel_multiplier": (1, 1, 1), "num_res_blocks": 0, "attention_resolutions": ()},
    {"channels": 96, "channel_multiplier": (1, 2), "num_res_blocks": 1, "attention_resolutions": (1,)},
    {"channels": 128, "channel_multiplier": (1, 1, 1, 1), "num_res_blocks": 0, "attention_resolutions": ()},
]


def _tokenizer(shape: dict[str, object]) -> VisionTokenizer:
    torch.manual_seed(0)
    sizes = {"z_channels": 5, "embed_dim": 5, "codebook_size": 16, **shape}
    tokenizer = VisionTokenizer(VisionTokenizerConfig(**sizes))  # type: ignore[arg-type]
    initialise(tokenizer)
    start_from_block_means(tokenizer)
    return tokenizer.eval()


def _pictures() -> torch.Tensor:
    """Soft shapes at several levels and tints: dark, bright, red, blue."""
    generator = torch.Generator().manual_seed(1)
    soft = F.interpolate(torch.rand(4, 3, 6, 6, generator=generator) - 0.5, size=(64, 64), mode="bicubic")
    tint = torch.tensor([[-0.6, -0.6, -0.6], [0.6, 0.6, 0.6], [0.5, -0.4, -0.6], [-0.6, -0.3, 0.4]])
    return (soft * 0.6 + tint[:, :, None, None]).clamp(-1, 1)


def _enlarged(means: torch.Tensor, levels: int) -> torch.Tensor:
    line = torch.tensor([1.0, 2.0, 1.0]) / 4
    kernel = (line[:, None] * line)[None, None].repeat(3, 1, 1, 1)
    for _ in range(levels):
        means = F.interpolate(means, scale_factor=2, mode="nearest")
        means = F.conv2d(F.pad(means, (1, 1, 1, 1), mode="replicate"), kernel, groups=3)
    return means


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("frames", [0, 4])
@torch.no_grad()
def test_levels_and_tints_of_a_picture_pass_through_every_norm(shape: dict[str, object], frames: int) -> None:
    tokenizer, pictures = _tokenizer(shape), _pictures()
    side = tokenizer.spatial_factor
    pixels = pictures[:, None].repeat(1, frames, 1, 1, 1) if frames else pictures
    latents = tokenizer.encode_latents(pixels)
    means = F.avg_pool2d(pictures, side)
    for given, mean in zip(latents[:, :3, 0], means, strict=True):
        slope = (given * mean).sum() / (mean * mean).sum()
        assert 0.7 < slope < 1.4
        assert (given / slope - mean).abs().max() < 0.15
    decoded = tokenizer.decode_latents(latents, frames=[0])[:, 0]
    inner = slice(2 * side, -2 * side)  # convolutions see zeros beyond the border
    wanted = _enlarged(means, len(tokenizer.config.channel_multiplier) - 1)
    assert (decoded - wanted)[:, :, inner, inner].abs().max() < 0.2
    assert (decoded - wanted)[:, :, inner, inner].abs().mean() < 0.06


def test_shapes_that_cannot_start_so_are_refused() -> None:
    def check(start: str | None = None, **sizes: object) -> None:
        shape = {**SHAPES[0], "z_channels": 5, "embed_dim": 5, "codebook_size": 16, **sizes}
        model = VisionTokenizerConfig(**shape)  # type: ignore[arg-type]
        config = VisionTrainingConfig(model=model, start_from_block_means=True, warm_start=start)
        config.check(1)

    check()
    with pytest.raises(ValueError, match=r"a level has 64 channels: .* at least 96"):
        check(channels=64)
    with pytest.raises(ValueError, match=r"z_channels 2: .* a latent channel for each"):
        check(z_channels=2, embed_dim=2)
    with pytest.raises(ValueError, match="beside warm_start"):
        check(start="somewhere")
