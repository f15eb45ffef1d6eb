"""Stripes, tiles, lists and the layout for inference: what each promises of the plain calls."""

from __future__ import annotations

import copy

import pytest
import torch

from emu3_megatron.vision import (
    VisionTokenizer,
    VisionTokenizerConfig,
    decode_in_stripes,
    decode_in_tiles,
    decode_list,
    encode_in_stripes,
    encode_in_tiles,
    encode_list,
)
from emu3_megatron.vision.layers import attend
from tests.vision.oracle import TINY, adopt, reference

ATTENTION_EVERYWHERE = VisionTokenizerConfig(
    channels=32, channel_multiplier=(1, 1), num_res_blocks=1, attention_resolutions=(0, 1), codebook_size=128,
    temporal_downsample_factor=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> VisionTokenizer:
    return adopt(reference(TINY), TINY)


def pixels(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("stripe_elements", [1, 5_000, 40_000])
def test_stripes_of_any_size_give_the_whole(tokenizer: VisionTokenizer, stripe_elements: int) -> None:
    for shape in ((2, 3, 52, 44), (1, 8, 3, 20, 24)):
        x = pixels(*shape)
        codes = tokenizer.encode(x)
        assert torch.equal(encode_in_stripes(tokenizer, x, stripe_elements=stripe_elements), codes)
        decoded = decode_in_stripes(tokenizer, codes, stripe_elements=stripe_elements)
        torch.testing.assert_close(decoded, tokenizer.decode(codes), rtol=0, atol=1e-4)


def test_stripes_with_attention_at_every_level() -> None:
    tokenizer = adopt(reference(ATTENTION_EVERYWHERE), ATTENTION_EVERYWHERE)
    x = pixels(1, 3, 14, 10)
    codes = tokenizer.encode(x)
    assert torch.equal(encode_in_stripes(tokenizer, x, stripe_elements=700), codes)
    decoded = decode_in_stripes(tokenizer, codes, stripe_elements=700)
    torch.testing.assert_close(decoded, tokenizer.decode(codes), rtol=0, atol=1e-4)


def test_one_tile_is_the_whole_and_several_are_pictures_of_their_own(tokenizer: VisionTokenizer) -> None:
    x = pixels(1, 3, 40, 64)
    codes = tokenizer.encode(x)
    assert torch.equal(encode_in_tiles(tokenizer, x, tile=64, overlap=16), codes)
    torch.testing.assert_close(
        decode_in_tiles(tokenizer, codes, tile=64, overlap=16), tokenizer.decode(codes)
    )

    tiled = encode_in_tiles(tokenizer, x, tile=40, overlap=16)
    left, right = tokenizer.encode(x[..., :40]), tokenizer.encode(x[..., 24:])
    assert torch.equal(tiled, torch.cat((left[..., :8], right[..., 2:]), -1))
    decoded = decode_in_tiles(tokenizer, codes, tile=40, overlap=16)
    left, right = tokenizer.decode(codes[..., :10]), tokenizer.decode(codes[..., 6:])
    torch.testing.assert_close(decoded[..., :24], left[..., :24])
    torch.testing.assert_close(decoded[..., 40:], right[..., 16:])
    fade = (torch.arange(16) + 0.5) / 16
    torch.testing.assert_close(
        decoded[..., 24:40], left[..., 24:] * (1 - fade) + right[..., :16] * fade, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(("tile", "overlap"), [(16, 0), (16, 4), (24, 20), (60, 8)])
def test_tiles_cover_every_place_of_images_and_clips(
    tokenizer: VisionTokenizer, tile: int, overlap: int
) -> None:
    constant = torch.full((1, 3, 44, 28), 0.25)
    codes = encode_in_tiles(tokenizer, constant, tile=tile, overlap=overlap)
    assert codes.shape == (1, 11, 7)
    assert 0 <= int(codes.min()) <= int(codes.max()) < TINY.codebook_size
    clip = tokenizer.encode(pixels(1, 4, 3, 20, 28))
    assert decode_in_tiles(tokenizer, clip, tile=tile, overlap=overlap).shape == (1, 4, 3, 20, 28)
    assert decode_in_tiles(tokenizer, codes, tile=tile, overlap=overlap).isfinite().all()


@pytest.mark.parametrize(("tile", "overlap"), [(18, 4), (16, 6), (16, 16), (16, -4)])
def test_tiles_that_make_no_sense_are_refused(tokenizer: VisionTokenizer, tile: int, overlap: int) -> None:
    with pytest.raises(ValueError, match=f"tile is {tile}, overlap {overlap}: both must be multiples of 4"):
        encode_in_tiles(tokenizer, pixels(1, 3, 32, 32), tile=tile, overlap=overlap)


def test_a_list_of_mixed_shapes_gives_what_each_gives_alone(tokenizer: VisionTokenizer) -> None:
    image = pixels(3, 16, 20)
    pictures = [image, pixels(3, 8, 8), pixels(4, 3, 16, 20), -image, image / 2]
    for batch_pixels in (1, 700, 1 << 20):
        codes = encode_list(tokenizer, pictures, batch_pixels=batch_pixels)
        assert all(torch.equal(c, tokenizer.encode(p[None])[0]) for c, p in zip(codes, pictures, strict=True))
        decoded = decode_list(tokenizer, codes, batch_pixels=batch_pixels)
        for part, code, picture in zip(decoded, codes, pictures, strict=True):
            assert part.shape == picture.shape
            torch.testing.assert_close(part, tokenizer.decode(code[None])[0], rtol=0, atol=1e-4)
    assert encode_list(tokenizer, []) == []
    assert encode_list(tokenizer, [pixels(3, 9, 5)], fit="pad")[0].shape == (3, 2)
    with pytest.raises(ValueError, match="9x5: both must be multiples of 4"):
        encode_list(tokenizer, [pixels(3, 9, 5)])


def test_attention_in_parts_is_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = torch.randn(3, 2, 1, 700, 32).unbind(0)
    whole = attend(q, k, v)
    monkeypatch.setattr("emu3_megatron.vision.layers.ATTENTION_AT_ONCE", 1)
    torch.testing.assert_close(attend(q, k, v), whole, rtol=0, atol=1e-5)
    weights = (q @ k.transpose(-1, -2) / 32**0.5).softmax(-1)
    torch.testing.assert_close(whole, weights @ v, rtol=0, atol=1e-5)


def test_channels_last_changes_nothing_but_rounding(tokenizer: VisionTokenizer) -> None:
    fast, x = copy.deepcopy(tokenizer).for_inference(), pixels(2, 3, 32, 48)
    codes = tokenizer.encode(x)
    assert (fast.encode(x) == codes).float().mean() > 0.99
    torch.testing.assert_close(fast.decode(codes), tokenizer.decode(codes), rtol=0, atol=1e-4)
    assert fast.fingerprint == tokenizer.fingerprint


def test_fp32_layers_are_not_rounded_to_tf32_while_codes_are_made(tokenizer: VisionTokenizer) -> None:
    """What cuDNN would do by default; a CPU shows the setting only."""
    seen: list[bool] = []
    own = copy.deepcopy(tokenizer)
    for layer in (own.encoder.conv_out, own.quant_conv):
        layer.register_forward_pre_hook(lambda *_: seen.append(torch.backends.cudnn.allow_tf32))
    assert torch.backends.cudnn.allow_tf32
    x = pixels(2, 3, 32, 48)
    codes = own.encode(x)
    assert torch.equal(codes, tokenizer.encode(x))
    encode_in_stripes(own, x, stripe_elements=4_000)
    assert len(seen) >= 3
    assert not any(seen)
    with pytest.raises(ValueError, match="not numbers"):
        own.encode(x * float("nan"))
    assert torch.backends.cudnn.allow_tf32


def test_bfloat16_keeps_most_codes_and_the_types(
    tokenizer: VisionTokenizer, tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    fast, x = copy.deepcopy(tokenizer).for_inference(dtype=torch.bfloat16), pixels(2, 3, 32, 48)
    codes = tokenizer.encode(x)
    assert (fast.encode(x) == codes).float().mean() > 0.8
    decoded = fast.decode(codes)
    assert decoded.dtype == torch.float32
    assert (decoded - tokenizer.decode(codes)).abs().mean() < 0.05
    stripes = encode_in_stripes(fast, x, stripe_elements=4_000)
    assert (stripes == fast.encode(x)).float().mean() > 0.8
    assert fast.codebook.dtype == fast.dtype == torch.float32
    with pytest.raises(ValueError, match=r"bfloat16 and torch.float32: for_inference\(\) has rounded"):
        fast.save_pretrained(str(tmp_path))
