"""The released configuration, at small pixel sizes: equal to transformers, and saved without loss."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import Emu3VQVAE

from emu3_megatron.files import sha256_file
from emu3_megatron.vision import VisionTokenizer, VisionTokenizerConfig
from tests.vision.oracle import adopt, count_near_ties, reference

pytestmark = pytest.mark.slow

SIZES = [(1, 1), (1, 2), (2, 1), (2, 3), (3, 2), (3, 3), (4, 3), (1, 5), (4, 4), (5, 3), (4, 6), (8, 8)]
"""Latent heights and widths: pixels are eight times as many."""

CLIPS = {(2, 3): 8, (3, 3): 4}
"""Frames of the sizes that are also encoded as a clip."""


@pytest.fixture(scope="module")
def pair() -> tuple[Emu3VQVAE, VisionTokenizer]:
    """The reference, and ours with its weights."""
    config = VisionTokenizerConfig()
    model = reference(config)
    return model, adopt(model, config)


def test_codes_and_pixels_are_those_of_transformers(
    pair: tuple[Emu3VQVAE, VisionTokenizer], record_property: Callable[[str, object], None]
) -> None:
    model, ours = pair
    generator = torch.Generator().manual_seed(1)
    near_ties, used = 0, set()
    for size in SIZES:
        frames = (CLIPS[size],) if size in CLIPS else ()
        for leading in {(), frames}:
            x = torch.rand(1, *leading, 3, 8 * size[0], 8 * size[1], generator=generator) * 2 - 1
            codes = ours.encode(x)
            near_ties += count_near_ties(model, x, codes)
            used.update(codes.flatten().tolist())
            if size != SIZES[-1]:
                with torch.no_grad():
                    torch.testing.assert_close(ours.decode(codes), model.decode(codes), rtol=0, atol=1e-4)
    assert len(used) > 50
    record_property("near_ties", near_ties)


@pytest.mark.parametrize("layout", ["transformers", "emu3"])
def test_both_layouts_round_trip_to_the_byte(
    pair: tuple[Emu3VQVAE, VisionTokenizer], tmp_path: Path, layout: str
) -> None:
    _, ours = pair
    ours.save_pretrained(tmp_path, layout=layout)
    path = tmp_path / "model.safetensors"
    before = sha256_file(path), (tmp_path / "config.json").read_bytes()
    again = VisionTokenizer.from_pretrained(tmp_path)
    path.unlink()
    again.save_pretrained(tmp_path, layout=layout)
    assert (sha256_file(path), (tmp_path / "config.json").read_bytes()) == before
    assert sum(p.numel() for p in again.parameters()) == 270_740_287
    assert len(again.state_dict()) == 495
