"""Winograd's convolution equals torch's at any size, and takes the place of bf16 on CPUs without AMX."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from emu3_megatron.vision import VisionTokenizer, VisionTokenizerConfig, encode_in_stripes, winograd
from tests.vision.oracle import adopt, reference

WIDE = VisionTokenizerConfig(
    channels=64, channel_multiplier=(1, 2), num_res_blocks=1, attention_resolutions=(1,), codebook_size=128,
    temporal_downsample_factor=2,
)  # fmt: skip


@pytest.mark.parametrize("at_once", [1, 30_000, winograd.AT_ONCE])
@pytest.mark.parametrize("made", [64, 80])
@pytest.mark.parametrize(
    "shape", [(1, 64, 8, 8), (2, 64, 9, 13), (1, 96, 1, 3), (1, 64, 40, 6), (3, 64, 4, 4), (2, 64, 24, 20)]
)
def test_equals_a_plain_convolution(
    shape: tuple[int, ...], made: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(winograd, "AT_ONCE", at_once)
    generator = torch.Generator().manual_seed(0)
    conv = nn.Conv2d(shape[1], made, 3, padding=1).requires_grad_(False)
    nn.init.normal_(conv.weight, std=shape[1] ** -0.5 / 3, generator=generator)
    x = torch.randn(shape, generator=generator)
    wanted = F.conv2d(x.double(), conv.weight.double(), conv.bias.double(), padding=1)
    for given in (x, x.contiguous(memory_format=torch.channels_last)):
        got = winograd.WinogradConv2d(conv)(given.clone())  # which it may overwrite
        assert got.shape == wanted.shape
        torch.testing.assert_close(got.double(), wanted, rtol=0, atol=1e-4)


def test_a_convolution_without_bias() -> None:
    conv = nn.Conv2d(64, 64, 3, padding=1, bias=False).requires_grad_(False)
    x = torch.randn(1, 64, 7, 10, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(winograd.WinogradConv2d(conv)(x.clone()), conv(x), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(64, 64, 3, stride=2),
        nn.Conv2d(64, 64, 3),
        nn.Conv2d(64, 64, 1),
        nn.Conv2d(3, 64, 3, padding=1),
        nn.Conv2d(64, 64, 3, padding=2, dilation=2),
        nn.Conv2d(64, 64, 3, padding=1, groups=2),
        nn.Conv2d(64, 64, 3, padding=1, padding_mode="reflect"),
    ],
)
def test_other_convolutions_stay(conv: nn.Conv2d) -> None:
    assert not winograd.fits(conv)


def test_a_cpu_without_amx_gets_it_for_bfloat16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    exact = adopt(reference(WIDE), WIDE)
    fast = copy.deepcopy(exact).for_inference(dtype=torch.bfloat16)
    x = torch.rand(2, 3, 44, 28, generator=torch.Generator().manual_seed(1)) * 2 - 1
    assert any(isinstance(module, winograd.WinogradConv2d) for module in fast.modules())
    codes = exact.encode(x)
    assert (fast.encode(x) == codes).float().mean() > 0.99
    torch.testing.assert_close(fast.decode(codes), exact.decode(codes), rtol=0, atol=1e-3)
    assert (encode_in_stripes(fast, x, stripe_elements=4_000) == codes).float().mean() > 0.99
    # Nothing has been rounded, so that what is saved is what was loaded.
    fast.save_pretrained(tmp_path)
    loaded = VisionTokenizer.from_pretrained(tmp_path).state_dict()
    assert loaded.keys() == exact.state_dict().keys()
    for name, weight in exact.state_dict().items():
        assert torch.equal(loaded[name], weight)
