"""Whole folders: our model to Hugging Face and back."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from emu3_megatron.conversion import configuration
from emu3_megatron.conversion.companions import give_back, read_json
from emu3_megatron.conversion.lazy import (
    Cast,
    Finite,
    InMemory,
    Joined,
    LazyTensors,
    Renamed,
    refuse_problems,
    select,
)
from emu3_megatron.conversion.maps import (
    LAYOUTS,
    VISION_PREFIXES,
    Converted,
    Layout,
    WeightMap,
    canonical_names,
    detect_layout,
)
from emu3_megatron.conversion.names import vocabulary_map
from emu3_megatron.conversion.processes import on_first, together
from emu3_megatron.conversion.publish import publish_folder
from emu3_megatron.conversion.rules import ConversionError
from emu3_megatron.conversion.tensor_files import TensorFolder, open_tensors, write_tensors
from emu3_megatron.conversion.tokenizer_files import build_tokenizer, write_tokenizer
from emu3_megatron.conversion.vision_files import open_vision_tokenizer, strip, vision_tensors
from emu3_megatron.files import write_json_atomic
from emu3_megatron.model import ModelConfig
from emu3_megatron.vision import VisionTokenizer, VisionTokenizerConfig
from emu3_megatron.vision.checkpoint import load_config
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
    """A Hugging Face folder, opened; weights are read when asked for."""

    config: ModelConfig
    vocabulary: Vocabulary
    dialect: str | None
    layout: Layout
    files: TensorFolder

    def tensors(self) -> Converted:
        """Our tensors (tensor parallelism 1), read one by one.

        Raises `ConversionError` when the files do not fit.
        """
        weight_map = WeightMap(configuration.architecture(self.config, self.vocabulary), self.layout)
        prefix = VISION_PREFIXES.get(self.layout.name)
        names = [name for name in self.files if prefix is None or not name.startswith(prefix)]
        return weight_map.ours(select(self.files, names))

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors of `tensors`."""
        yield from self.tensors().items()

    def vision(self) -> tuple[VisionTokenizerConfig, LazyTensors] | None:
        """The vision tokenizer in transformers' names; None in a layout that has none.

        Raises `ConversionError` when its tensors do not fit its configuration.
        """
        prefix = VISION_PREFIXES.get(self.layout.name)
        if prefix is None:
            return None
        folder = self.files.folder
        try:
            config = load_config(folder)
        except (TypeError, ValueError) as error:
            raise ConversionError(f"{folder / 'config.json'}: vq_config: {error}") from error
        if config.codebook_size != self.vocabulary.codebook_size:
            raise ConversionError(
                f"{folder / 'config.json'}: vq_config has {config.codebook_size} codes, the vocabulary "
                f"{self.vocabulary.codebook_size}"
            )
        return config, vision_tensors(strip(self.files, prefix), config, folder)


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
    kept: Path | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a folder that transformers loads, whole or not at all; one tensor is in memory at a time.

    Args:
        folder: where it appears; must not exist unless `overwrite`.
        weights: state dict of the whole megatron-core model (tensor and pipeline parallelism 1), plain or
            lazy.
        model: its configuration and vocabulary.
        vision_tokenizer: needed by the transformers layouts, which hold it; ignored by ``emu3``.
        text_tokenizer: file of the text tokenizer; without it that of `kept`, or none, is written.
        layout: ``transformers``, ``transformers-5`` or ``emu3`` (see `maps.LAYOUTS`).
        dtype: of the language model's tensors; None keeps them. The vision tokenizer keeps its own.
        image_pixels: smallest and largest image, in pixels, that the image processor resizes to; by default
            the released ones (512x512 to 1024x1024).
        kept: folder of the small files that the model was imported with; they travel on where this export
            does not make them anew.
        overwrite: replace an existing folder.

    Returns:
        The folder.

    Raises:
        ConversionError: the parts do not fit together, or weights are not finite; everything wrong with the
            tensors is listed.
        UserError: the folder exists.
    """
    if layout not in LAYOUTS:
        raise ConversionError(f"unknown layout {layout!r}; known layouts: {', '.join(LAYOUTS)}")
    tokenizer = _tokenizer(text_tokenizer, kept, model.vocabulary, layout)
    weight_map = WeightMap(configuration.architecture(model.config, model.vocabulary), LAYOUTS[layout])
    converted = weight_map.theirs(
        weights if isinstance(weights, LazyTensors) else InMemory(canonical_names(weights))
    )
    finite = Finite(converted if dtype is None else Cast(converted, dtype))
    vision = None if layout == "emu3" else _open_vision(vision_tokenizer)
    config = _config(model, tokenizer, kept, vision, _dtype_name(finite.dtype(next(iter(finite)))))
    tensors: LazyTensors = finite
    if vision is not None:
        prefix = VISION_PREFIXES[layout]
        tensors = Joined(finite, Renamed(vision[1], {prefix + name: name for name in vision[1]}))
    sizes = None if vision is None else vision[0]
    with publish_folder(folder, overwrite=overwrite) as unfinished:
        write_tensors(unfinished, tensors)
        for problems in together(lambda: finite.problems):
            refuse_problems(Path(folder), problems)
        on_first(lambda: _write_companions(unfinished, model, config, tokenizer, sizes, image_pixels, kept))
    return Path(folder)


def _config(
    model: ExportedModel,
    tokenizer: Tokenizer | None,
    kept: Path | None,
    vision: tuple[VisionTokenizerConfig, LazyTensors] | None,
    dtype: str,
) -> dict[str, Any]:
    """``config.json``: as released, or with a vision tokenizer that of transformers."""
    names = vocabulary_map(model.vocabulary, _text_names(tokenizer, kept, model.vocabulary))
    if vision is None:
        return configuration.released_config(model.config, model.vocabulary, dtype=dtype)
    return configuration.transformers_config(
        model.config, model.vocabulary, names=names, vision=_vision_config(vision[0]), dtype=dtype
    )


def open_hugging_face(folder: str | os.PathLike[str], *, allow_pickle: bool = False) -> ImportedModel:
    """Open an Emu3 folder of any layout: as released, of transformers, or written by `export_hugging_face`.

    Args:
        folder: With ``config.json`` and weights.
        allow_pickle: Read ``.bin`` weights with torch's weights-only loader where there are no others.

    Raises `ConversionError` when something is missing, damaged or not Emu3.
    """
    path = Path(folder)
    values = read_json(path / "config.json")
    files = open_tensors(path, allow_pickle=allow_pickle)
    layout = detect_layout(set(files))
    first = layout.rename("model.layers.0.self_attn.")
    stated = replace(
        configuration.read_model_config(values, path / "config.json"),
        qk_layernorm=first + "q_norm.weight" in files,
        qkv_bias=first + "q_proj.bias" in files,
    )
    if not (path / OWN_FILE).is_file():
        vocabulary = configuration.read_vocabulary_of(values, path / "config.json")
        return ImportedModel(config=stated, vocabulary=vocabulary, dialect="emu3", layout=layout, files=files)
    config, vocabulary, dialect = _read_own(path / OWN_FILE)
    own, other = (configuration.architecture(model, vocabulary) for model in (config, stated))
    size = values.get("text_config", values).get("vocab_size", vocabulary.size)
    contradictions = [
        f"{name} is {getattr(other, name)} in config.json, {value} in {OWN_FILE}"
        for name, value in vars(own).items()
        if getattr(other, name) != value
    ]
    if size != vocabulary.size:
        contradictions.append(f"vocab_size is {size} in config.json, {vocabulary.size} in {OWN_FILE}")
    if contradictions:
        raise ConversionError(f"{path}: its two configurations disagree: {'; '.join(contradictions)}")
    return ImportedModel(config=config, vocabulary=vocabulary, dialect=dialect, layout=layout, files=files)


def _read_own(path: Path) -> tuple[ModelConfig, Vocabulary, str | None]:
    """Model, vocabulary and dialect of the file that `export_hugging_face` adds."""
    own = read_json(path)
    try:
        config, vocabulary = ModelConfig(**own["model"]), Vocabulary(**own["vocabulary"])
        config.validate()
        return config, vocabulary, own["dialect"]
    except (KeyError, TypeError, ValueError) as error:
        raise ConversionError(f"{path} does not describe a model: {error}") from error


def _tokenizer(
    given: str | os.PathLike[str] | None, kept: Path | None, vocabulary: Vocabulary, layout: str
) -> Tokenizer | None:
    """The text tokenizer to write: the one given, or the released one where transformers' is not kept."""
    if given is not None:
        return build_tokenizer(given, vocabulary)
    if kept is None or layout == "emu3" or (kept / "tokenizer.json").is_file():
        return None
    released = sorted(kept.glob("*.tiktoken"))
    return build_tokenizer(released[0], vocabulary) if released else None


def _text_names(tokenizer: Tokenizer | None, kept: Path | None, vocabulary: Vocabulary) -> dict[str, int]:
    """Spelling of the text ids, by the tokenizer or by the configuration that was imported."""
    if tokenizer is not None:
        return dict(tokenizer.get_vocab(with_added_tokens=False))
    if kept is None:
        return {}
    names = read_json(kept / "config.json").get("vocabulary_map") or {}
    return {name: token for name, token in names.items() if token < vocabulary.text_size}


def _write_companions(
    folder: Path,
    model: ExportedModel,
    config: dict[str, Any],
    tokenizer: Tokenizer | None,
    vision: VisionTokenizerConfig | None,
    pixels: tuple[int, int] | None,
    kept: Path | None,
) -> None:
    """Everything small: configurations, tokenizer, our own file, and what was kept of an import."""
    write_json_atomic(folder / OWN_FILE, _own_file(model))
    if kept is not None:
        old = read_json(kept / "config.json")
        if old.get("model_type") == config["model_type"]:
            old.pop("dtype", None)  # the newer name of torch_dtype
            config = {**old, **config}
    if tokenizer is not None:
        write_tokenizer(folder, tokenizer, model_max_length=model.config.max_position_embeddings)
    if pixels is not None and vision is not None:
        _write_image_processor(folder, vision, pixels)
    if kept is not None:
        give_back(kept, folder)
    if not (folder / "generation_config.json").exists():
        values = configuration.generation_config(model.vocabulary)
        write_json_atomic(folder / "generation_config.json", values)
    if vision is not None and not _is_for_transformers(folder / "preprocessor_config.json"):
        area = configuration.IMAGE_AREA
        _write_image_processor(folder, vision, (area["min_pixels"], area["max_pixels"]))
    write_json_atomic(folder / "config.json", config)  # last: nothing opens a folder without one


def _own_file(model: ExportedModel) -> dict[str, Any]:
    """Contents of `OWN_FILE`."""
    return {
        "model": asdict(model.config),
        "vocabulary": model.vocabulary.to_dict(),
        "dialect": model.dialect,
    }


def _is_for_transformers(path: Path) -> bool:
    """Whether a kept image processor is transformers' own: the released one is remote code."""
    return path.is_file() and read_json(path).get("image_processor_type", "").startswith("Emu3ImageProcessor")


def _open_vision(
    vision: VisionTokenizer | str | os.PathLike[str] | None,
) -> tuple[VisionTokenizerConfig, LazyTensors]:
    """The vision tokenizer's configuration and tensors."""
    if vision is None:
        raise ConversionError(
            "this layout holds the vision tokenizer: give its folder (--vision-tokenizer), "
            "or use --layout emu3"
        )
    return open_vision_tokenizer(vision if isinstance(vision, VisionTokenizer) else Path(vision))


def _vision_config(vision: VisionTokenizerConfig) -> dict[str, Any]:
    """``vq_config`` without the keys that belong to a folder of its own."""
    values = vision.to_transformers()
    values.pop("architectures", None)
    return values


def _write_image_processor(folder: Path, vision: VisionTokenizerConfig, pixels: tuple[int, int]) -> None:
    """``preprocessor_config.json``."""
    values = configuration.image_processor_config(
        vision.spatial_factor, min_pixels=pixels[0], max_pixels=pixels[1]
    )
    write_json_atomic(folder / "preprocessor_config.json", values)


def _dtype_name(dtype: torch.dtype) -> str:
    """``float32`` for `torch.float32`."""
    return str(dtype).removeprefix("torch.")
