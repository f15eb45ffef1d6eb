"""Both public layouts load and save without loss, and a wrong folder is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Emu3VQVAE

from emu3_megatron.errors import UserError
from emu3_megatron.vision import VisionTokenizer
from emu3_megatron.vision.processes import set_up_processes
from tests.vision.oracle import TINY, reference


@pytest.fixture
def tokenizer() -> VisionTokenizer:
    torch.manual_seed(0)
    return VisionTokenizer(TINY)


def test_transformers_loads_what_we_save(tokenizer: VisionTokenizer, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    model, report = Emu3VQVAE.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.hidden_size == TINY.hidden_size
    codes = torch.randint(512, (1, 3, 4))
    with torch.no_grad():
        torch.testing.assert_close(tokenizer.decode(codes), model.decode(codes), rtol=0, atol=1e-5)


@pytest.mark.parametrize("layout", ["transformers", "emu3"])
def test_round_trip_is_byte_equal(tokenizer: VisionTokenizer, tmp_path: Path, layout: str) -> None:
    tokenizer.save_pretrained(tmp_path / "a", layout=layout)
    again = VisionTokenizer.from_pretrained(tmp_path / "a")
    again.save_pretrained(tmp_path / "b", layout=layout)
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert again.fingerprint == tokenizer.fingerprint
    assert not again.training


def test_transformers_own_files_round_trip(tmp_path: Path) -> None:
    reference(TINY).save_pretrained(tmp_path / "a")
    VisionTokenizer.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    theirs, ours = (load_file(tmp_path / part / "model.safetensors") for part in "ab")
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[key], ours[key]) for key in theirs)


def test_the_released_layout_has_its_names_and_shapes(tokenizer: VisionTokenizer, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path, layout="emu3")
    weights = load_file(tmp_path / "model.safetensors")
    for key in (
        "encoder.down.2.attn.0.norm.weight",
        "encoder.mid.attn_1.norm.bias",
        "encoder.time_conv.1.conv.conv.weight",
        "encoder.time_res_stack.0.conv1.conv.weight",
        "decoder.up.1.upsample.conv.weight",
        "decoder.up.0.block.1.norm1.norm_layer.weight",
        "decoder.up.2.attn.1.norm.conv_y.weight",
        "quantize.embedding.weight",
        "quant_conv.conv.bias",
    ):
        assert key in weights
    assert weights["encoder.mid.attn_1.q.weight"].shape == (64, 64, 1, 1)
    assert json.loads((tmp_path / "config.json").read_text())["ch_mult"] == [1, 1, 2]


def test_the_fingerprint_follows_weights_and_configuration(tokenizer: VisionTokenizer) -> None:
    before = tokenizer.fingerprint
    assert before == tokenizer.fingerprint
    with torch.no_grad():
        tokenizer.codebook[3, 1] += 1e-6
    assert tokenizer.fingerprint != before


def test_a_full_model_folder_gives_its_tokenizer(tokenizer: VisionTokenizer, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({f"vqmodel.{k}": v for k, v in weights.items()} | {"lm_head.weight": torch.zeros(2)},
              tmp_path / "model.safetensors")  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps({"vq_config": TINY.to_transformers()}))
    assert VisionTokenizer.from_pretrained(tmp_path).fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda data: data[: len(data) // 2], "is cut off, damaged or no"),
        (lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", "git lfs pull"),
        (lambda data: b"", "is cut off, damaged or no"),
    ],
)
def test_damaged_files_are_named(
    tokenizer: VisionTokenizer, tmp_path: Path, name: str, damage: Callable[[bytes], bytes], words: str
) -> None:
    tokenizer.save_pretrained(tmp_path)
    path = tmp_path / name
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=words) as caught:
        VisionTokenizer.from_pretrained(tmp_path)
    assert str(path) in str(caught.value)


def test_more_processes_than_gpus_give_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(UserError, match="no more processes than GPUs"):
        set_up_processes()


def test_wrong_folders_are_named(tokenizer: VisionTokenizer, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        VisionTokenizer.from_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())

    save_file(weights | {"stray": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="unexpected tensors, the first is stray"):
        VisionTokenizer.from_pretrained(tmp_path)
    save_file({k: v for k, v in weights.items() if "conv_in" not in k}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"conv_in\.weight .* is missing"):
        VisionTokenizer.from_pretrained(tmp_path)
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config | {"codebook_size": 256}))
    with pytest.raises(ValueError, match=r"shape \[512, 4\], its config.json asks for \[256, 4\]"):
        VisionTokenizer.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="layout is 'other'"):
        tokenizer.save_pretrained(tmp_path, layout="other")
