"""The architecture is Emu3's: the reference implementation gives the same codes and the same pixels."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from emu3_megatron.vision import VisionTokenizer, VisionTokenizerConfig
from emu3_megatron.vision.model import nearest_codes
from tests.vision.oracle import TINY, adopt, count_near_ties, reference

CONFIGS = {
    "tiny": TINY,
    "no-blocks": VisionTokenizerConfig(
        channels=64, channel_multiplier=(1, 1, 1, 1), num_res_blocks=0, attention_resolutions=(),
        codebook_size=256,
    ),
    "wide-latent": VisionTokenizerConfig(
        channels=32, channel_multiplier=(1, 2), num_res_blocks=2, attention_resolutions=(), z_channels=6,
        embed_dim=6, codebook_size=512, temporal_downsample_factor=2,
    ),
    "released-shape": VisionTokenizerConfig(channels=32, codebook_size=4096),
    "still": VisionTokenizerConfig(
        channels=32, channel_multiplier=(1, 1), num_res_blocks=1, attention_resolutions=(0, 1),
        codebook_size=128, temporal_downsample_factor=1,
    ),
}  # fmt: skip

SIZES = [(1, 1), (1, 5), (2, 3), (3, 3), (4, 4), (5, 7), (6, 2), (7, 1), (8, 8), (9, 4), (3, 11), (11, 5)]
"""Latent heights and widths."""


def pixels(seed: int, *shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_transformers_on_images_and_clips(
    name: str, record_property: Callable[[str, object], None]
) -> None:
    config = CONFIGS[name]
    model = reference(config)
    ours = adopt(model, config)
    used: set[int] = set()
    near_ties = 0
    for seed, (height, width) in enumerate(SIZES if name == "tiny" else SIZES[1::3]):
        size = (3, height * config.spatial_factor, width * config.spatial_factor)
        for shape in ((2, *size), (1, config.temporal_downsample_factor * (1 + seed % 3), *size)):
            x = pixels(seed, *shape)
            codes = ours.encode(x)
            near_ties += count_near_ties(model, x, codes)
            used.update(codes.flatten().tolist())
            with torch.no_grad():
                torch.testing.assert_close(ours.decode(codes), model.decode(codes), rtol=0, atol=1e-4)
    assert len(used) > 10, "the codebook must be exercised, or equality says little"
    record_property("near_ties", near_ties)


def test_released_configuration_has_its_parameters_and_tensors() -> None:
    with torch.device("meta"):
        tokenizer = VisionTokenizer(VisionTokenizerConfig())
    assert sum(p.numel() for p in tokenizer.parameters()) == 270_740_287
    assert len(tokenizer.state_dict()) == 495
    assert (tokenizer.spatial_factor, tokenizer.temporal_factor) == (8, 4)


def test_shapes_and_dtypes() -> None:
    tokenizer = VisionTokenizer(TINY)
    assert tokenizer.encode(pixels(0, 2, 3, 8, 12)).shape == (2, 2, 3)
    codes = tokenizer.encode(pixels(0, 2, 8, 3, 8, 12))
    assert codes.shape == (2, 2, 2, 3)
    assert codes.dtype == torch.int64
    assert tokenizer.decode(codes).shape == (2, 8, 3, 8, 12)
    assert tokenizer.decode(codes[:, 0].to(torch.int32)).shape == (2, 3, 8, 12)


def test_an_image_is_a_clip_of_equal_frames() -> None:
    tokenizer = adopt(reference(TINY), TINY)
    x = pixels(3, 2, 3, 24, 16)
    clip = x[:, None].repeat(1, 4, 1, 1, 1)
    assert torch.equal(tokenizer.encode(x), tokenizer.encode(clip)[:, 0])
    codes = tokenizer.encode(x)
    torch.testing.assert_close(
        tokenizer.decode(codes), tokenizer.decode(codes[:, None])[:, 0], rtol=0, atol=1e-5
    )


def test_codes_do_not_depend_on_later_frames() -> None:
    tokenizer = adopt(reference(TINY), TINY)
    clip = pixels(4, 1, 12, 3, 16, 16)
    changed = torch.cat((clip[:, :8], -clip[:, 8:]), 1)
    assert torch.equal(tokenizer.encode(clip)[:, :2], tokenizer.encode(changed)[:, :2])
    assert not torch.equal(tokenizer.encode(clip)[:, 2], tokenizer.encode(changed)[:, 2])


def test_nearest_codes_is_the_brute_force_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, codebook = torch.randn(301, 4), torch.randn(77, 4)
    brute = torch.cdist(rows.double(), codebook.double()).argmin(1)
    monkeypatch.setattr("emu3_megatron.vision.model.DISTANCES_IN_CACHE", 500)
    assert torch.equal(nearest_codes(rows, codebook), brute)
    assert torch.equal(nearest_codes(codebook, torch.cat((codebook, codebook))), torch.arange(77))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 3, 30, 32), "30x32: both must be multiples of 4"),
        ((2, 32, 32, 3), "channels before height"),
        ((3, 32, 32), "shape \\[3, 32, 32\\]"),
        ((1, 6, 3, 32, 32), "6 frames: the number must be a multiple of 4"),
        ((0, 3, 32, 32), "shape"),
    ],
)
def test_pixels_of_a_wrong_shape_are_refused(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VisionTokenizer(TINY).encode(torch.zeros(shape))


def test_pixels_of_a_wrong_range_are_refused() -> None:
    tokenizer, x = VisionTokenizer(TINY), torch.zeros(1, 3, 8, 8)
    with pytest.raises(ValueError, match=r"255.0: they must lie in \[-1, 1\]"):
        tokenizer.encode(x + 255)
    with pytest.raises(ValueError, match="nan"):
        tokenizer.encode(x * float("nan"))
    with pytest.raises(ValueError, match="uint8: give floating point"):
        tokenizer.encode(x.to(torch.uint8))


def test_codes_that_do_not_exist_are_refused() -> None:
    tokenizer = VisionTokenizer(TINY)
    with pytest.raises(ValueError, match="0 to 511"):
        tokenizer.decode(torch.full((1, 2, 2), 512))
    with pytest.raises(ValueError, match="give integers"):
        tokenizer.decode(torch.zeros(1, 2, 2))
    with pytest.raises(ValueError, match=r"shape \[2, 2\]"):
        tokenizer.decode(torch.zeros(2, 2, dtype=torch.int64))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"channels": 48}, "multiple of 32"),
        ({"temporal_downsample_factor": 3}, "power of two"),
        ({"channel_multiplier": ()}, "empty"),
        ({"num_res_blocks": 0}, "every multiplier must be 1"),
        ({"attention_resolutions": (4,)}, "levels are 0 to 3"),
        ({"attention_resolutions": (1,)}, "one attention width"),
        ({"codebook_size": 0}, "at least 1"),
        ({"embed_dim": 8}, "must be equal"),
    ],
)
def test_configurations_that_cannot_be_built_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VisionTokenizerConfig(**values)
