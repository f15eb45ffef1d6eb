"""Whole folders: our model to Hugging Face and back."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from emu3_megatron.conversion import configuration
from emu3_megatron.conversion.maps import LAYOUTS, VISION_PREFIXES, Layout, WeightMap, detect_layout
from emu3_megatron.conversion.names import read_vocabulary, vocabulary_map
from emu3_megatron.conversion.publish import publish_folder
from emu3_megatron.conversion.rules import ConversionError
from emu3_megatron.conversion.tensor_files import TensorFiles, cast, write_tensors
from emu3_megatron.conversion.tokenizer_files import build_tokenizer, write_tokenizer
from emu3_megatron.files import write_json_atomic
from emu3_megatron.model import ModelConfig
from emu3_megatron.vision import VisionTokenizer
from emu3_megatron.vocabulary import Vocabulary

OWN_FILE = "emu3_megatron.json"
"""What Hugging Face's files have no place for: exact model configuration, vocabulary, dialect."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Names of dtypes on the command line."""


@dataclass(frozen=True, kw_only=True)
class ExportedModel:
    """What an export needs beside the weights."""

    config: ModelConfig
    vocabulary: Vocabulary
    dialect: str | None = None
    """Name of the document dialect, kept so that the folder generates without being told."""


@dataclass(frozen=True, kw_only=True)
class ImportedModel:
    """A Hugging Face folder, opened; weights are read when iterated."""

    config: ModelConfig
    vocabulary: Vocabulary
    dialect: str | None
    layout: Layout
    files: TensorFiles

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Our tensors one by one (tensor parallelism 1); raises `ConversionError` when the files do not
        fit."""
        weight_map = WeightMap(configuration.architecture(self.config, self.vocabulary), self.layout)
        return weight_map.from_hugging_face(self.files.without_prefix(VISION_PREFIXES.get(self.layout.name)))


def export_hugging_face(
    folder: str | os.PathLike[str],
    weights: Mapping[str, Tensor],
    model: ExportedModel,
    *,
    vision_tokenizer: VisionTokenizer | str | os.PathLike[str] | None = None,
    text_tokenizer: str | os.PathLike[str] | None = None,
    layout: str = "transformers",
    dtype: torch.dtype | None = None,
    image_pixels: tuple[int, int] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a folder that transformers loads, whole or not at all.

    Args:
        folder: where it appears; must not exist unless `overwrite`.
        weights: state dict of the whole megatron-core model (tensor and pipeline parallelism 1).
        model: its configuration and vocabulary.
        vision_tokenizer: needed by the transformers layouts, which hold it; ignored by ``emu3``.
        text_tokenizer: file of the text tokenizer; without it no tokenizer or processor is written.
        layout: ``transformers``, ``transformers-5`` or ``emu3`` (see `maps.LAYOUTS`).
        dtype: of the language model's tensors; None keeps them. The vision tokenizer keeps its own.
        image_pixels: smallest and largest image, in pixels, that the image processor resizes to; by default
            the released ones (512x512 to 1024x1024).
        overwrite: replace an existing folder.

    Returns:
        The folder.

    Raises:
        ConversionError: the parts do not fit together; everything wrong with the tensors is listed.
        UserError: the folder exists.
    """
    if layout not in LAYOUTS:
        raise ConversionError(f"unknown layout {layout!r}; known layouts: {', '.join(LAYOUTS)}")
    tokenizer = None if text_tokenizer is None else build_tokenizer(text_tokenizer, model.vocabulary)
    text_names = {} if tokenizer is None else tokenizer.get_vocab(with_added_tokens=False)
    names = vocabulary_map(model.vocabulary, text_names)
    weight_map = WeightMap(configuration.architecture(model.config, model.vocabulary), LAYOUTS[layout])
    tensors = cast(weight_map.to_hugging_face(weights), dtype)
    stored = _dtype_name(dtype or next(iter(weights.values())).dtype)
    with publish_folder(folder, overwrite=overwrite) as unfinished:
        if layout == "emu3":
            write_tensors(unfinished, tensors)
            config = configuration.released_config(model.config, model.vocabulary, dtype=stored)
        else:
            vision = _open_vision(vision_tokenizer)
            config = configuration.transformers_config(
                model.config, model.vocabulary, names=names, vision=_vision_config(vision), dtype=stored
            )
            write_tensors(unfinished, _with_vision(tensors, vision, VISION_PREFIXES[layout]))
            _write_image_processor(unfinished, vision, image_pixels)
        _write_companions(unfinished, model, config, tokenizer)
    return Path(folder)


def open_hugging_face(folder: str | os.PathLike[str]) -> ImportedModel:
    """Open an Emu3 folder of any layout: as released, of transformers, or written by `export_hugging_face`.

    Raises `ConversionError` when something is missing, damaged or not Emu3.
    """
    path = Path(folder)
    values = read_json(path / "config.json")
    files = TensorFiles(path)
    own = read_json(path / OWN_FILE) if (path / OWN_FILE).is_file() else None
    layout = detect_layout(set(files))
    if own is not None:
        config, vocabulary = ModelConfig(**own["model"]), Vocabulary(**own["vocabulary"])
        return ImportedModel(
            config=config, vocabulary=vocabulary, dialect=own["dialect"], layout=layout, files=files
        )
    config = configuration.read_model_config(values)
    return ImportedModel(
        config=config, vocabulary=_vocabulary(values), dialect="emu3", layout=layout, files=files
    )


def _write_companions(
    folder: Path, model: ExportedModel, config: dict[str, Any], tokenizer: Tokenizer | None
) -> None:
    """Everything small: configurations, tokenizer, and our own file."""
    write_json_atomic(folder / "config.json", config)
    write_json_atomic(folder / "generation_config.json", configuration.generation_config(model.vocabulary))
    if tokenizer is not None:
        write_tokenizer(folder, tokenizer, model_max_length=model.config.max_position_embeddings)
    own = {"model": asdict(model.config), "vocabulary": model.vocabulary.to_dict(), "dialect": model.dialect}
    write_json_atomic(folder / OWN_FILE, own)


def _vocabulary(values: Mapping[str, Any]) -> Vocabulary:
    """The vocabulary that a configuration states, by its map or by the released size."""
    if values.get("vocabulary_map"):
        return read_vocabulary(values["vocabulary_map"])
    size = int(values.get("vocab_size", 0))
    for name in ("emu3", "emu3.5"):
        if Vocabulary.preset(name).size == size:
            return Vocabulary.preset(name)
    raise ConversionError(
        "config.json has neither a vocabulary_map nor the vocab_size of Emu3 (184622) or Emu3.5 (282926): "
        f"{size}"
    )


def _open_vision(vision: VisionTokenizer | str | os.PathLike[str] | None) -> VisionTokenizer:
    """The vision tokenizer, loaded where a folder is given."""
    if vision is None:
        raise ConversionError(
            "this layout holds the vision tokenizer: give its folder (--vision-tokenizer), "
            "or use --layout emu3"
        )
    return vision if isinstance(vision, VisionTokenizer) else VisionTokenizer.from_pretrained(vision)


def _vision_config(vision: VisionTokenizer) -> dict[str, Any]:
    """``vq_config`` without the keys that belong to a folder of its own."""
    values = vision.config.to_transformers()
    values.pop("architectures", None)
    return values


def _with_vision(
    tensors: Iterator[tuple[str, Tensor]], vision: VisionTokenizer, prefix: str
) -> Iterator[tuple[str, Tensor]]:
    """The language model's tensors, then the vision tokenizer's."""
    from emu3_megatron.vision.checkpoint import to_layout

    yield from tensors
    for name, tensor in to_layout(dict(vision.state_dict()), "transformers").items():
        yield prefix + name, tensor


def _write_image_processor(folder: Path, vision: VisionTokenizer, pixels: tuple[int, int] | None) -> None:
    """``preprocessor_config.json``."""
    smallest, largest = pixels or (
        configuration.IMAGE_AREA["min_pixels"],
        configuration.IMAGE_AREA["max_pixels"],
    )
    values = configuration.image_processor_config(
        vision.spatial_factor, min_pixels=smallest, max_pixels=largest
    )
    write_json_atomic(folder / "preprocessor_config.json", values)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises `ConversionError` when it is missing or damaged."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConversionError(f"{path} is missing; is {path.parent} a Hugging Face folder?") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConversionError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ConversionError(f"{path} holds no JSON object")
    return values


def _dtype_name(dtype: torch.dtype) -> str:
    """``float32`` for `torch.float32`."""
    return str(dtype).removeprefix("torch.")
