"""Opening a bundle: tokenizers are compared only with what is known, and laid out for their device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from emu3_megatron.errors import UserError
from emu3_megatron.inference import bundle
from emu3_megatron.vision import VisionTokenizer, VisionTokenizerConfig, checkpoint


@pytest.fixture
def vision() -> VisionTokenizer:
    torch.manual_seed(0)
    return VisionTokenizer(
        VisionTokenizerConfig(channels=32, channel_multiplier=(1, 1), num_res_blocks=1, codebook_size=16,
                              attention_resolutions=())
    )  # fmt: skip


def test_a_tokenizer_is_hashed_only_where_there_is_something_to_compare_with(
    vision: VisionTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, tuple[str | Path, VisionTokenizer]] = {"vision tokenizer": ("there", vision)}
    right = vision.fingerprint
    hashed: list[VisionTokenizer] = []
    monkeypatch.setattr(checkpoint, "fingerprint", lambda own: hashed.append(own) or right)
    bundle._check_tokenizers(Path("run"), given, {})
    assert not hashed
    bundle._check_tokenizers(Path("run"), given, {"vision tokenizer": right})
    assert len(hashed) == 1
    with pytest.raises(UserError, match=f"{right[:12]}, not 000"):
        bundle._check_tokenizers(Path("run"), given, {"vision tokenizer": "0" * 64})


def test_only_a_gpu_gets_another_layout(vision: VisionTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU another order of additions would change results; that it is right for CUDA a GPU must show."""
    fingerprint, strides = vision.fingerprint, [weight.stride() for weight in vision.parameters()]
    same = bundle._prepared(vision.train(), torch.device("cpu"))
    assert same is vision
    assert not same.training
    assert [weight.stride() for weight in same.parameters()] == strides
    monkeypatch.setattr(VisionTokenizer, "to", lambda self, device: self)
    laid_out = bundle._prepared(vision, torch.device("cuda"))
    assert [weight.stride() for weight in laid_out.parameters()] != strides
    assert {weight.dtype for weight in laid_out.parameters()} == {torch.float32}
    assert laid_out.fingerprint == fingerprint, "candidates are named by it later"
