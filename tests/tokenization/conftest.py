"""A tiny pair of tokenizers and a small mixed corpus of real files, made once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from emu3_megatron.media import write_mp4, write_png
from emu3_megatron.text import train_sentencepiece
from emu3_megatron.tokenization import TokenizationConfig, tokenize
from emu3_megatron.vision import VisionTokenizer, VisionTokenizerConfig
from tests.media.clips import CLIPS, PHOTOGRAPHS, encode, moving_picture

Tokenizers = dict[str, Path]


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> Tokenizers:
    """A vision tokenizer with 512 codes and random weights, and a SentencePiece model."""
    folder = tmp_path_factory.mktemp("tokenizers")
    torch.manual_seed(0)
    config = VisionTokenizerConfig(
        channels=32, channel_multiplier=(1, 1, 1, 2), num_res_blocks=1, codebook_size=512
    )
    vision = VisionTokenizer(config)
    with torch.no_grad():
        vision.codebook.normal_()
    vision.save_pretrained(folder / "vision")
    texts = [
        f"a small {noun} on the {place}, 一只小{noun}"
        for noun in ("cat", "dog", "cup")
        for place in ("mat", "sea")
    ]
    train_sentencepiece(texts * 4, folder / "text.model", 400)
    return {"vision_tokenizer": folder / "vision", "text_tokenizer": folder / "text.model"}


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manifest of 36 entries: drawn images, photographs, clips of several codecs and sizes, texts."""
    folder = tmp_path_factory.mktemp("corpus")
    generator = np.random.default_rng(0)
    records: list[dict[str, Any]] = []
    for i in range(14):
        write_png(folder / f"{i}.png", generator.integers(0, 256, (64, 64, 3), dtype=np.uint8))
        records.append({"image": f"{i}.png", "caption": f"a small cat number {i}"})
    for name in ("astronaut.png", "rocket.jpg", "camera.png", "chelsea.png", "coffee.png"):
        shutil.copy(PHOTOGRAPHS / name, folder / name)
        records.append({"image": name, "caption": "一只小 cat"})
    for i in range(6):
        write_mp4(folder / f"{i}.mp4", moving_picture(9, 64, 64) + np.uint8(i), 8)
        records.append({"video": f"{i}.mp4", "caption": f"the sea {i}"})
    encode(folder / "wide.webm", moving_picture(12), encoder="libvpx-vp9")
    encode(folder / "turned.mp4", moving_picture(12), rotation=90)
    shutil.copy(CLIPS / "carphone_pristine.mp4", folder / "real.mp4")
    records += [{"video": name} for name in ("wide.webm", "turned.mp4", "real.mp4")]
    records += [{"text": f"a text on the mat, number {i}", "task": "prose"} for i in range(8)]
    order = generator.permutation(len(records))
    lines = [{"id": f"sample-{i:03d}", **records[j]} for i, j in enumerate(order)]
    manifest = folder / "manifest.jsonl"
    manifest.write_text(
        "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8"
    )
    return manifest


@pytest.fixture
def make_config(tokenizers: Tokenizers) -> Callable[..., TokenizationConfig]:
    """Settings for 64 x 64 pixels."""

    def make(manifest: Path | tuple[Path, ...], output: Path, **settings: Any) -> TokenizationConfig:
        defaults: dict[str, Any] = {"image_area": 64 * 64, "progress": False, "name": "data", **tokenizers}
        manifests = manifest if isinstance(manifest, tuple) else (manifest,)
        return TokenizationConfig(manifest=manifests, output=output, **{**defaults, **settings})

    return make


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a dataset folder by its name."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="session")
def undisturbed(
    tmp_path_factory: pytest.TempPathFactory, corpus: Path, tokenizers: Tokenizers
) -> dict[str, bytes]:
    """The files of a job of four shards that nothing disturbed."""
    output = tmp_path_factory.mktemp("undisturbed") / "data"
    config = TokenizationConfig(
        manifest=(corpus,),
        output=output,
        image_area=64 * 64,
        progress=False,
        num_shards=4,
        name="data",
        **tokenizers,
    )
    assert tokenize(config)
    return contents(output)
