"""From a conversation file with real pictures to a dataset; what cannot be used is named, the rest kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from emu3_megatron.data import MultimodalDataset
from emu3_megatron.errors import UserError
from emu3_megatron.grammar import Dialect, Image, Video
from emu3_megatron.media import write_mp4, write_png
from emu3_megatron.posttraining.conversation_job import ConversationConfig, tokenize_conversations
from emu3_megatron.text import load_text_tokenizer, train_sentencepiece
from emu3_megatron.vision import VisionTokenizer, VisionTokenizerConfig

SMALL, LARGE = 32 * 32, 64 * 64
"""Bounds of the pictures' areas."""


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tokenizers")
    torch.manual_seed(0)
    vision = VisionTokenizer(
        VisionTokenizerConfig(
            channels=32,
            channel_multiplier=(1, 1, 1, 1),
            num_res_blocks=0,
            attention_resolutions=(),
            codebook_size=512,
        )
    )
    vision.save_pretrained(folder / "vision")
    texts = ["You are a helpful assistant. USER: What colour is it? ASSISTANT: red", "Compare 0123456789*"]
    train_sentencepiece(texts * 20, folder / "text.model", 300)
    return {"vision_tokenizer": folder / "vision", "text_tokenizer": folder / "text.model"}


def talk(*values: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[n % 2], "value": value} for n, value in enumerate(values)]


RECORDS: list[Any] = [
    {"id": "one", "image": "a.png", "conversations": talk("<image>\nWhat colour is it?", "red")},
    {"id": "gone", "image": "absent.png", "conversations": talk("<image>\nWhat?", "red")},
    {"id": "text", "conversations": talk("Hello", "Hi", "And?", "Bye")},
    {"id": "roles", "conversations": talk("Hello", "Hi")[::-1]},
    {"id": "two", "image": ["a.png", "b.png"], "conversations": talk("<image><image>Compare", "red")},
    {"id": "wide", "image": "wide.png", "conversations": talk("<image>What?", "red")},
    {"id": "film", "video": "c.mp4", "conversations": talk("<video>What?", "red")},
    {"id": "long", "conversations": talk("Hello", "red " * 300)},
]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("talk")
    rng = np.random.default_rng(0)
    for name, size in {"a": (16, 20), "b": (96, 128), "wide": (8, 96)}.items():
        write_png(folder / f"{name}.png", rng.integers(0, 256, (*size, 3), dtype=np.uint8))
    write_mp4(folder / "c.mp4", rng.integers(0, 256, (8, 32, 48, 3), dtype=np.uint8), 8)
    path = folder / "talk.json"
    path.write_text(json.dumps(RECORDS, indent=1))
    return path


def make(file: Path, output: Path, tokenizers: dict[str, Path], **options: Any) -> bool:
    settings: dict[str, Any] = {
        "manifest": (file,),
        "output": output,
        "name": "talk",
        "min_area": SMALL,
        "max_area": LARGE,
        "max_tokens": 500,
        "quarantine_budget": 0.6,
        "progress": False,
        **tokenizers,
    }
    return tokenize_conversations(ConversationConfig(**{**settings, **options}))


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory, file: Path, tokenizers: dict[str, Path]) -> Path:
    folder = tmp_path_factory.mktemp("made") / "talk"
    assert make(file, folder, tokenizers)
    return folder


def line_of(file: Path, name: str) -> int:
    lines = file.read_text().splitlines()
    return next(n for n, line in enumerate(lines, 1) if f'"id": "{name}"' in line) - 1


def test_what_is_sound_is_written_as_the_template_says(
    output: Path, file: Path, tokenizers: dict[str, Path]
) -> None:
    dataset = MultimodalDataset.open(output)
    names = [dataset.sample_id(number) for number in range(len(dataset))]
    assert names == ["one", "text", "two", "film"]
    text = load_text_tokenizer(tokenizers["text_tokenizer"])
    dialect = Dialect.preset("emu3", dataset.vocabulary, text)

    def read(number: int) -> list[tuple[int, Any]]:
        return [
            (mode, dialect.parse_span(ids) if mode == 1 else ids.tolist())
            for ids, mode in dataset.document(number)
        ]

    opening = text.encode("You are a helpful assistant. USER: ")
    (_, first), (_, picture), (_, after), answer = read(0)
    assert first == opening
    assert after == text.encode("What colour is it?. ASSISTANT:")
    assert answer == (0, text.encode(" red"))
    assert isinstance(picture, Image)
    assert picture.codes.shape == (4, 5), "16 x 20 pixels are enlarged to 32 x 40"
    hello, hi, further, bye = read(1)
    assert hello == (2, text.encode("You are a helpful assistant. USER: Hello. ASSISTANT:"))
    assert hi == (0, [*text.encode(" Hi"), dataset.vocabulary.eos])
    assert further == (2, text.encode("USER: And?. ASSISTANT:"))
    assert bye == (0, text.encode(" Bye"))
    _, (_, small), (_, large), *_ = read(2)
    assert small == picture
    assert large.codes.shape == (6, 9), "96 x 128 pixels are reduced to 55 x 73, whole tokens below that"
    assert isinstance(read(3)[1][1], Video)


def test_what_cannot_be_used_is_named_with_its_line(output: Path, file: Path) -> None:
    lines = [json.loads(line) for line in (output / "quarantine.jsonl").read_text().splitlines()]
    reasons = {entry["id"]: entry["reason"] for entry in lines}
    assert list(reasons) == ["gone", "roles", "wide", "long"]
    for name, reason in reasons.items():
        assert reason.startswith(f"talk.json:{line_of(file, name)}: ")
    assert "absent.png" in reasons["gone"]
    assert "turn 1 is a answer" in reasons["roles"]
    assert "aspect ratio" in reasons["wide"]
    assert "max_tokens=500" in reasons["long"]


def test_two_workers_make_the_same_bytes(
    tmp_path: Path, output: Path, file: Path, tokenizers: dict[str, Path]
) -> None:
    whole, shared = tmp_path / "whole", tmp_path / "shared"
    assert make(file, whole, tokenizers, num_shards=2)
    assert not make(file, shared, tokenizers, num_shards=2, worker=1, num_workers=2)
    assert make(file, shared, tokenizers, num_shards=2, worker=0, num_workers=2)
    for path in sorted(whole.rglob("*")):
        if path.is_file():
            assert (shared / path.relative_to(whole)).read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    "options", [{"template": "mine"}, {"max_tokens": 2}, {"min_area": 100, "max_area": 64}]
)
def test_options_must_make_sense(
    tmp_path: Path, tokenizers: dict[str, Path], options: dict[str, Any]
) -> None:
    with pytest.raises((UserError, ValueError)):
        ConversationConfig(
            **{"manifest": (tmp_path,), "output": tmp_path, "min_area": SMALL, **tokenizers, **options}
        )
