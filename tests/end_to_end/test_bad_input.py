"""Bad input through the command-line programs: one clear line or a quarantine entry, nothing lost."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from emu3_megatron.data import MultimodalDataset
from emu3_megatron.text import train_sentencepiece
from tests.end_to_end.conftest import TRAINING as SETTINGS
from tests.end_to_end.conftest import Quickstart
from tests.media.clips import CLIPS, PHOTOGRAPHS
from tests.programs import TRAINING, Programs, start

pytestmark = pytest.mark.slow

BAD_ENTRIES: tuple[tuple[str, dict[str, Any] | str, str], ...] = (
    ("missing", {"image": "none.png", "caption": "c"}, "no such file"),
    ("text as video", {"video": "text.mp4", "caption": "c"}, "cannot be read as video"),
    ("truncated", {"video": "cut.mp4", "caption": "c"}, "cut.mp4"),
    ("empty", {"image": "empty.png", "caption": "c"}, "zero bytes"),
    ("caption alone", {"caption": "c"}, "neither"),
    ("manifest.jsonl:12", '{"id": "broken", "image": ', "not valid JSON"),
)
"""Id in the quarantine, entry, and a part of the reason or the path."""


def write_manifest(folder: Path) -> tuple[Path, Path]:
    """A manifest of good and bad entries in turn, and one of the good ones alone."""
    folder.mkdir()
    (folder / "empty.png").touch()
    (folder / "text.mp4").write_text("not a video\n" * 100)
    clip = (CLIPS / "carphone_pristine.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(clip[: len(clip) // 2])
    shutil.copy(PHOTOGRAPHS / "rocket.jpg", folder)
    good, mixed = [], []
    for number, (identifier, entry, _) in enumerate(BAD_ENTRIES):
        good.append(
            json.dumps({"id": f"good {number}", "image": "rocket.jpg", "caption": f"a rocket {number}"})
        )
        mixed += [good[-1], entry if isinstance(entry, str) else json.dumps({"id": identifier, **entry})]
    (folder / "manifest.jsonl").write_text("\n".join(mixed) + "\n")
    (folder / "good.jsonl").write_text("\n".join(good) + "\n")
    return folder / "manifest.jsonl", folder / "good.jsonl"


def tokenize(quickstart: Quickstart, manifest: Path, output: Path, *arguments: object) -> tuple[object, ...]:
    """Arguments of the tokenization of `manifest`."""
    sizes = ("--image-area", 4096, "--video-frames", 8, "--no-progress")
    files = ("--manifest", manifest, "--output", output)
    return "tools/tokenize_media.py", *files, *quickstart.tokenizers, *sizes, *arguments


def documents(folder: Path) -> list[list[tuple[list[int], int]]]:
    dataset = MultimodalDataset.open(folder)
    return [[(ids.tolist(), mode) for ids, mode in dataset.document(i)] for i in range(len(dataset))]


def test_bad_entries_are_listed_and_the_good_ones_kept(
    quickstart: Quickstart, program: Programs, tmp_path: Path
) -> None:
    mixed, good = write_manifest(tmp_path / "corpus")
    ended = program(*tokenize(quickstart, mixed, tmp_path / "mixed", "--quarantine-budget", 0.5))
    assert ended.code == 0, ended.err
    assert "Traceback" not in ended.err
    listed = [json.loads(line) for line in (tmp_path / "mixed" / "quarantine.jsonl").read_text().splitlines()]
    assert [entry["id"] for entry in listed] == [identifier for identifier, _, _ in BAD_ENTRIES]
    for entry, (_, _, part) in zip(listed, BAD_ENTRIES, strict=True):
        assert entry["reason"]
        assert part in f"{entry['path']} {entry['reason']}"
    ended = program(*tokenize(quickstart, good, tmp_path / "good"))
    assert ended.code == 0, ended.err
    assert documents(tmp_path / "mixed") == documents(tmp_path / "good")

    line = program(*tokenize(quickstart, mixed, tmp_path / "strict")).error
    assert "6 of 12 entries cannot be used" in line
    assert "--quarantine-budget" in line


def test_tokenization_without_a_manifest(quickstart: Quickstart, program: Programs, tmp_path: Path) -> None:
    line = program(*tokenize(quickstart, tmp_path / "none.jsonl", tmp_path / "data")).error
    assert "none.jsonl: cannot read the manifest" in line
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("entry", "part"),
    [
        ('{"image": "none.png"}', "none.png"),
        ('{"image": "empty.png"}', "empty.png"),
        ('{"video": "text.mp4"}', "text.mp4"),
        ('{"image": ', "line 1"),
        ("[1]", "line 1"),
        ('{"caption": "alone"}', "no image or video"),
    ],
)
def test_vision_training_names_the_bad_file(program: Programs, tmp_path: Path, entry: str, part: str) -> None:
    manifest, _ = write_manifest(tmp_path / "corpus")
    manifest.write_text(entry + "\n")
    settings = ("--data.manifests", json.dumps([str(manifest)]), "--output", tmp_path / "vision")
    assert part in program("tools/train_vision_tokenizer.py", *settings).error
    assert not (tmp_path / "vision").exists()


@pytest.mark.parametrize(
    ("entry", "part"), [('{"caption": ', "line 1"), ("[1]", "line 1"), (None, "manifest.jsonl")]
)
def test_text_training_names_the_bad_line(
    program: Programs, tmp_path: Path, entry: str | None, part: str
) -> None:
    manifest = tmp_path / "manifest.jsonl"
    if entry is not None:
        manifest.write_text(entry + "\n")
    ended = program(
        "tools/train_text_tokenizer.py", "--manifest", manifest, "--output", tmp_path / "text.model"
    )
    assert part in ended.error


@pytest.mark.parametrize("tool", ["tools/quickstart.py", "tools/train_vision_tokenizer.py", TRAINING])
@pytest.mark.parametrize("where", ["command line", "file", "missing file"])
def test_unknown_keys_are_named(
    program: Programs, tmp_path: Path, quickstart: Quickstart, tool: str | Sequence[str], where: str
) -> None:
    config = tmp_path / "config.yaml"
    if where != "missing file":
        config.write_text(json.dumps({**SETTINGS, "colour": 1} if tool is TRAINING else {"colour": 1}))
    command = [tool] if isinstance(tool, str) else list(tool)
    options = ["--colour", 1] if where == "command line" else ["--config", config]
    line = program(*command, *options).error
    assert ("config.yaml" if where == "missing file" else "colour") in line


@pytest.fixture
def training(quickstart: Quickstart, tmp_path: Path) -> list[object]:
    """Arguments of a training of two steps on the quickstart's texts."""
    settings = json.loads(json.dumps(SETTINGS))
    settings["data"]["sources"] = {"texts": {"path": str(quickstart.run / "data" / "texts")}}
    settings["trainer"]["steps"] = 2
    settings["optimizer"]["warmup_steps"] = 1
    settings["logging"] = {"progress": False, "tensorboard": False}
    (tmp_path / "training.yaml").write_text(json.dumps(settings))
    return [*TRAINING, "--config", tmp_path / "training.yaml", "--run", tmp_path / "run"]


def with_sources(training: list[object], **folders: Path) -> list[object]:
    sources = {name: {"path": str(folder)} for name, folder in folders.items()}
    return [*training, "--data.sources", json.dumps(sources)]


def test_a_layout_that_does_not_divide(program: Programs, training: list[object]) -> None:
    layout = ("--parallel.tensor_model_parallel_size", 3, "--dry-run", "--world-size", 3)
    line = program(*training, *layout).error
    assert "model.num_query_groups=2 is not divisible by tensor_model_parallel_size=3" in line


def test_a_folder_without_manifest(program: Programs, training: list[object], tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    assert "data/manifest.json: no such file" in program(*with_sources(training, one=tmp_path / "data")).error


def test_sources_of_different_tokenizers(
    quickstart: Quickstart, program: Programs, training: list[object], tmp_path: Path
) -> None:
    manifest = quickstart.run / "corpus" / "train-texts.jsonl"
    model = tmp_path / "other.model"
    ended = program(
        "tools/train_text_tokenizer.py", "--manifest", manifest, "--output", model, "--vocab-size", 300
    )
    assert ended.code == 0, ended.err
    ended = program(*tokenize(quickstart, manifest, tmp_path / "other", "--text-tokenizer", model))
    assert ended.code == 0, ended.err
    line = program(
        *with_sources(training, ours=quickstart.run / "data" / "texts", other=tmp_path / "other")
    ).error
    assert "vocabulary" in line
    assert str(tmp_path / "other") in line


@pytest.mark.parametrize("damage", ["bit", "cut", "gone"])
def test_a_damaged_shard_is_named(
    quickstart: Quickstart, program: Programs, training: list[object], tmp_path: Path, damage: str
) -> None:
    data = tmp_path / "texts"
    shutil.copytree(quickstart.run / "data" / "texts", data)
    shard = data / "texts-00001-of-00002.bin"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content if damage == "bit" else content[:-4])
    if damage == "gone":
        shard.unlink()
    line = program(*with_sources(training, texts=data)).error
    assert "texts-00001-of-00002" in line
    if damage == "bit":  # found by a worker of the loader; the process ends all the same, with one clean line
        ended = start(*with_sources(training, texts=data), "--data.num_workers", 1, timeout=120)
        assert ended.error == line
    verified = program("tools/dataset.py", "verify", data)
    assert verified.code
    assert "texts-00001-of-00002" in verified.out + verified.err
    assert "Traceback" not in verified.err


def test_a_checkpoint_of_another_model(
    quickstart: Quickstart, program: Programs, training: list[object], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    ended = program(*training)
    assert ended.code == 0, ended.err
    before = {path: path.read_bytes() for path in (run / "checkpoints").rglob("*") if path.is_file()}
    line = program(*training, "--model.hidden_size", 32).error
    assert "hidden_size" in line
    checkpoint = run / "checkpoints" / "step-00000002"
    line = program(
        *training, "--run", tmp_path / "next", "--checkpoint.load", checkpoint, "--model.num_layers", 1
    ).error
    assert "num_layers" in line
    assert {path: path.read_bytes() for path in (run / "checkpoints").rglob("*") if path.is_file()} == before


def test_generation_refuses_what_does_not_belong_to_the_run(
    quickstart: Quickstart, program: Programs, tmp_path: Path
) -> None:
    command = ("tools/generate.py", "image", "--checkpoint", quickstart.run / "training", "--platform", "cpu")
    prompt = ("--prompt", "a red circle", "--height", 64, "--width", 64, "--output", tmp_path / "out.png")
    vision = ("--vision-tokenizer", quickstart.run / "vision-tokenizer")
    assert "tokenizer" in program(*command, *prompt).error
    assert "none" in program(*command, *prompt, *vision, "--text-tokenizer", tmp_path / "none.model").error
    train_sentencepiece(["other words, other pieces"] * 9, tmp_path / "other.model", 300)
    other = program(*command, *prompt, *vision, "--text-tokenizer", tmp_path / "other.model").error
    assert "other.model is not the text tokenizer" in other
    assert not (tmp_path / "out.png").exists()


def test_a_good_run_still_trains(program: Programs, training: list[object], tmp_path: Path) -> None:
    ended = program(*training)
    assert ended.code == 0, ended.err
    losses = [
        json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert len(losses) == 2
    assert np.isfinite(losses).all()
