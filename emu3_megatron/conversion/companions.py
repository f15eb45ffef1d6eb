"""The small files of a Hugging Face folder: kept beside an imported checkpoint, given back on export."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from emu3_megatron.conversion.rules import ConversionError
from emu3_megatron.errors import UserError
from emu3_megatron.files import atomic_write, parse_json
from emu3_megatron.model import ModelConfig

KEPT = "hugging_face"
"""Folder of a run that holds the small files it was imported with."""

VISION = "vision_tokenizer"
"""Folder of a run that holds the vision tokenizer it was imported with."""

TRAINING = "train.yaml"
"""The configuration that an import leaves in the run, to train from it."""

LARGEST = 1 << 28
"""Bytes; a larger file is no companion."""

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".index.json")


def companions(folder: Path) -> Iterator[Path]:
    """The small plain files of a Hugging Face folder: configurations, tokenizers, code, texts; no weights."""
    for path in sorted(folder.iterdir()):
        hidden = path.name.startswith(".")
        if hidden or path.name.endswith(_WEIGHTS) or not path.is_file():
            continue
        if path.stat().st_size <= LARGEST:
            yield path


def keep_companions(source: Path, run: Path) -> None:
    """Copy the small files of a Hugging Face folder into a run."""
    (run / KEPT).mkdir()
    for path in companions(source):
        shutil.copyfile(path, run / KEPT / path.name)


def kept_folder(checkpoint: Path, name: str) -> Path | None:
    """The folder `name` (`KEPT` or `VISION`) of a checkpoint's run; None where there is none."""
    for run in (checkpoint, checkpoint.parent, checkpoint.parent.parent):
        if (run / name).is_dir():
            return run / name
    return None


def give_back(kept: Path, folder: Path) -> None:
    """Copy kept files into an export where it does not have files of their names, nor makes them later."""
    for path in companions(kept):
        if path.name != "config.json" and not (folder / path.name).exists():
            shutil.copyfile(path, folder / path.name)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises `ConversionError` when it is missing or damaged."""
    try:
        values = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConversionError(f"{path} is missing; is {path.parent} a Hugging Face folder?") from error
    except ValueError as error:
        raise ConversionError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ConversionError(f"{path} holds no JSON object")
    return values


def write_training_config(
    run: Path, checkpoint: Path, model: ModelConfig, *, precision: str, datasets: Mapping[str, Path]
) -> None:
    """``train.yaml`` of an imported run: the exact model, and where its weights are.

    Args:
        run: Folder that is being filled.
        checkpoint: Where the checkpoint will be once the run is published.
        model: Its shape.
        precision: Of the weights.
        datasets: Folders to train on, by name; without one the user names them.
    """
    values = {
        "run": str(checkpoint.parent.parent / "training"),
        "model": asdict(model),
        "data": {
            "sources": {name: {"path": str(path)} for name, path in datasets.items()},
            "context_length": min(model.max_position_embeddings, 5120),
        },
        "optimizer": {"learning_rate": 5.0e-5, "warmup_steps": 50},
        "trainer": {"steps": 1000, "global_batch_size": 8, "precision": precision},
        "checkpoint": {"load": str(checkpoint)},
    }
    lines = [
        "# Trains from the imported weights:",
        f"#   python -m emu3_megatron.training --config {checkpoint.parent.parent / TRAINING}",
    ]
    if not datasets:
        lines += [
            "# Name your datasets under data.sources first; their vocabulary must be that of the weights:",
            "#   sources: {NAME: {path: FOLDER}}",
        ]
    text = "\n".join(lines) + "\n" + yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    with atomic_write(run / TRAINING) as stream:
        stream.write(text.encode())


def name_datasets(folders: list[Path]) -> dict[str, Path]:
    """Names for dataset folders: the last part of each path.

    Raises `UserError` when two are called alike.
    """
    named = {folder.name: folder for folder in folders}
    if len(named) != len(folders):
        raise UserError(f"datasets {[str(folder) for folder in folders]} have equal names; rename one folder")
    return named
