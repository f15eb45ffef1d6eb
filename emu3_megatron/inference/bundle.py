"""What generation needs, opened together: a model, its dialect and text tokenizer, and a vision tokenizer.

The model comes from a training run (``RUN``, or one of its ``checkpoints/step-*``) or from a Hugging Face
folder. A trained run holds neither tokenizer: they are given by path. A Hugging Face folder in transformers'
layout holds both, and so does a run that was imported from one.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from emu3_megatron.conversion.checkpoints import dialect_of_run
from emu3_megatron.conversion.companions import KEPT, VISION, kept_folder
from emu3_megatron.conversion.hugging_face import open_hugging_face
from emu3_megatron.data.mixture import TOKENIZERS
from emu3_megatron.errors import UserError
from emu3_megatron.grammar import Dialect
from emu3_megatron.inference.quantized import quantize
from emu3_megatron.model import ModelConfig
from emu3_megatron.model.config import AttentionBackend
from emu3_megatron.parallel.config import ParallelConfig
from emu3_megatron.text import TextTokenizer, load_text_tokenizer
from emu3_megatron.training.checkpoint_files import resolve
from emu3_megatron.vision import VisionTokenizer
from emu3_megatron.vocabulary import Vocabulary

StrPath = str | os.PathLike[str]

LAYERS: AttentionBackend = "torch"
"""The layers of a model for generation, on a GPU too: the engine has an attention of its own, uses their
weights without their calls, and can reduce them to one byte."""


@dataclass(frozen=True)
class ModelBundle:
    """A model and the tokenizers it was trained with."""

    model: torch.nn.Module
    """The whole GPTModel (pipeline parallelism 1), in evaluation mode."""
    config: ModelConfig
    dialect: Dialect
    """With the vocabulary and the text tokenizer."""
    vision_tokenizer: VisionTokenizer

    @property
    def vocabulary(self) -> Vocabulary:
        """The ids."""
        return self.dialect.vocabulary


def open_bundle(
    checkpoint: StrPath,
    *,
    text_tokenizer: StrPath | None = None,
    vision_tokenizer: StrPath | None = None,
    dialect: str | None = None,
    parallel: ParallelConfig | None = None,
    averaged: bool | None = None,
    weights: str | None = None,
) -> ModelBundle:
    """Open everything for generation; process groups must exist (`initialize_parallel`).

    Args:
        checkpoint: a run, a committed checkpoint in it, or a Hugging Face folder.
        text_tokenizer: file of the text tokenizer; by default the ``tokenizer.json`` of the Hugging Face
            folder, or of the one that the run was imported from.
        vision_tokenizer: its folder; by default the Hugging Face folder, or what the run was imported with.
        dialect: its name; by default what the Hugging Face folder or the run's datasets state, else ``emu3``.
        parallel: tensor parallelism to load into; one process by default.
        averaged: take a run's averaged weights; by default they are taken where there are some.
        weights: ``int8`` or ``fp8`` to keep projections and output layer in one byte a weight.

    Raises:
        UserError: something is missing, or the parts do not belong together.
        ValueError: a file is damaged; the part that reads it says how.
    """
    folder = Path(checkpoint)
    if not folder.exists():
        raise UserError(f"{folder} does not exist; give a run, a checkpoint or a Hugging Face folder")
    hugging_face = (folder / "config.json").is_file()
    trained_with: Mapping[str, str] = {}
    if hugging_face:
        model, config, vocabulary, named = _open_hugging_face(folder, parallel)
        text_tokenizer = text_tokenizer or folder / "tokenizer.json"
    else:
        model, config, vocabulary, named, trained_with = _open_run(folder, parallel, averaged)
        kept = kept_folder(resolve(folder), KEPT)
        if kept is not None and (kept / "tokenizer.json").is_file():
            text_tokenizer = text_tokenizer or kept / "tokenizer.json"
    vision_tokenizer = vision_tokenizer or vision_folder(folder)
    if text_tokenizer is None or vision_tokenizer is None:
        missing = "--text-tokenizer" if text_tokenizer is None else "--vision-tokenizer"
        raise UserError(f"{folder} is a training run, which holds no tokenizers; give {missing}")
    language = Dialect.preset(dialect or named or "emu3", vocabulary, load_text_tokenizer(text_tokenizer))
    vision = VisionTokenizer.from_pretrained(vision_tokenizer)
    if vision.config.codebook_size != vocabulary.codebook_size:
        raise UserError(
            f"{vision_tokenizer} has {vision.config.codebook_size} codes, the model's vocabulary "
            f"{vocabulary.codebook_size}; give the vision tokenizer that the model was trained with"
        )
    given: dict[str, tuple[StrPath, TextTokenizer | VisionTokenizer]] = {
        "text tokenizer": (text_tokenizer, language.text_tokenizer),
        "vision tokenizer": (vision_tokenizer, vision),
    }
    _check_tokenizers(folder, given, trained_with)
    if weights is not None:
        quantize(model, weights)
    return ModelBundle(model, config, language, _prepared(vision, next(model.parameters()).device))


def vision_folder(checkpoint: StrPath) -> Path | None:
    """Where a run, a checkpoint or a Hugging Face folder holds its vision tokenizer; None where it has
    none."""
    folder = Path(checkpoint)
    if (folder / "config.json").is_file():
        return folder
    return kept_folder(resolve(folder), VISION) if folder.exists() else None


def _prepared(vision: VisionTokenizer, device: torch.device) -> VisionTokenizer:
    """The vision tokenizer on its device; on CUDA laid out for speed, in fp32, since its codes and pixels are
    to be those of tokenization. On a CPU the layout would change roundings, and results are kept."""
    vision = vision.to(device).eval()
    return vision.for_inference() if device.type == "cuda" else vision


def _check_tokenizers(
    folder: Path,
    given: Mapping[str, tuple[StrPath, TextTokenizer | VisionTokenizer]],
    trained_with: Mapping[str, str],
) -> None:
    """Raise `UserError` where a tokenizer is not the one behind a run's data.

    Args:
        folder: the run.
        given: path and tokenizer of each kind; it is hashed only where there is something to compare with.
        trained_with: fingerprints by kind, as far as they are known.
    """
    for kind, (path, tokenizer) in given.items():
        if kind in trained_with and trained_with[kind] != (fingerprint := tokenizer.fingerprint):
            raise UserError(
                f"{path} is not the {kind} that {folder} was trained with ({fingerprint[:12]}, not "
                f"{trained_with[kind][:12]}); its ids mean other things: give that one"
            )


def _open_hugging_face(
    folder: Path, parallel: ParallelConfig | None
) -> tuple[torch.nn.Module, ModelConfig, Vocabulary, str | None]:
    """Build our model from a Hugging Face folder."""
    from emu3_megatron.model import build_model

    if parallel is not None and parallel.model_parallel_size > 1:
        raise UserError(
            "a Hugging Face folder loads on one process; import it with tools/convert_checkpoint.py to use "
            "tensor parallelism"
        )
    opened = open_hugging_face(folder)
    weights = dict(opened.weights())
    bf16 = next(iter(weights.values())).dtype in (torch.bfloat16, torch.float16)
    (model,) = build_model(
        replace(opened.config, attention_backend=LAYERS),
        vocabulary_padded_size=opened.vocabulary.padded_size,
        vocabulary_size=opened.vocabulary.size,
        parallel=ParallelConfig(),
        seed=0,
        precision="bf16" if bf16 else "fp32",
        initialize=False,
    )
    load_whole(model, weights)
    return model.eval(), opened.config, opened.vocabulary, opened.dialect


def load_whole(model: torch.nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Fill an unsharded model from plain tensors; raises `UserError` when names differ."""
    missing, unexpected = model.load_state_dict(dict(weights), strict=False)
    missing = [name for name in missing if not name.endswith("_extra_state")]
    if missing or unexpected:
        raise UserError(
            f"weights do not fit the model: missing {missing[:5]}, unexpected {list(unexpected)[:5]}"
        )


def _open_run(
    folder: Path, parallel: ParallelConfig | None, averaged: bool | None
) -> tuple[torch.nn.Module, ModelConfig, Vocabulary, str | None, dict[str, str]]:
    """Load a run's checkpoint; the last of the results is the fingerprints of the tokenizers behind it."""
    from emu3_megatron.training.checkpoint import Record, load_model_for_inference
    from emu3_megatron.training.checkpoint_choice import sound_checkpoint

    checkpoint = sound_checkpoint(folder)
    chunks, config, vocabulary = load_model_for_inference(
        checkpoint, parallel, averaged=averaged, backend=LAYERS
    )
    if len(chunks) != 1:
        raise UserError("generation needs pipeline_model_parallel_size=1")
    record = Record.read(checkpoint)
    datasets = [source["dataset"] for source in record.plan.get("sources", {}).values()]
    tokenizers = {kind: data[kind] for data in datasets for kind in TOKENIZERS if data[kind]}
    named = dialect_of_run(record.config) or record.config.get("imported", {}).get("dialect")
    return chunks[0], config, vocabulary, named, tokenizers
