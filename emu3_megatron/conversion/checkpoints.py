"""Training checkpoints and Hugging Face folders: one into the other, and both compared.

Distributed checkpoints do not depend on a layout, so one process converts what any number of processes wrote
or will read. The functions need process groups (`initialize_parallel`) of a single process.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emu3_megatron.conversion.hugging_face import ExportedModel, export_hugging_face, open_hugging_face
from emu3_megatron.conversion.maps import canonical_names
from emu3_megatron.conversion.publish import publish_folder, refuse_existing
from emu3_megatron.errors import UserError
from emu3_megatron.parallel.config import ParallelConfig

StrPath = str | os.PathLike[str]


def export_checkpoint(
    source: StrPath,
    folder: StrPath,
    *,
    vision_tokenizer: StrPath | None = None,
    text_tokenizer: StrPath | None = None,
    layout: str = "transformers",
    dtype: torch.dtype | None = None,
    averaged: bool | None = None,
    dialect: str | None = None,
    image_pixels: tuple[int, int] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a training checkpoint, saved under any layout, as a Hugging Face folder.

    Args:
        source: a run or a committed checkpoint.
        folder: where the result appears, whole or not at all.
        vision_tokenizer: folder of the vision tokenizer; needed but for the layout ``emu3``.
        text_tokenizer: file of the text tokenizer; without it no tokenizer is written.
        layout: see `export_hugging_face`.
        dtype: of the language model's tensors; None keeps them.
        averaged: take the averaged weights; by default they are taken where there are some.
        dialect: name to keep in the folder; by default that of the run's datasets.
        image_pixels: see `export_hugging_face`.
        overwrite: replace an existing folder.

    Raises:
        CheckpointError, ConversionError, UserError: see `load_model_for_inference` and `export_hugging_face`.
    """
    from emu3_megatron.training.checkpoint import Record, load_model_for_inference
    from emu3_megatron.training.checkpoint_files import resolve

    refuse_existing(folder, overwrite=overwrite)
    checkpoint = resolve(Path(source))
    (model,), config, vocabulary = load_model_for_inference(checkpoint, ParallelConfig(), averaged=averaged)
    dialect = dialect or dialect_of_run(Record.read(checkpoint).config)
    return export_hugging_face(
        folder,
        model.state_dict(),
        ExportedModel(config=config, vocabulary=vocabulary, dialect=dialect),
        vision_tokenizer=vision_tokenizer,
        text_tokenizer=text_tokenizer,
        layout=layout,
        dtype=dtype,
        image_pixels=image_pixels,
        overwrite=overwrite,
    )


def import_checkpoint(
    source: StrPath, run: StrPath, *, precision: str | None = None, overwrite: bool = False
) -> Path:
    """Write a Hugging Face folder as the first checkpoint of a new run folder.

    The run holds weights only: training starts from it, generation and export read it.

    Args:
        source: folder of any layout.
        run: appears whole or not at all, with ``checkpoints/step-00000000``.
        precision: ``fp32`` or ``bf16``; by default that of the folder (half precision becomes bf16).
        overwrite: replace an existing folder.

    Raises:
        ConversionError: the folder is damaged or does not fit.
        UserError: `run` exists.
    """
    from emu3_megatron.training.checkpoint_files import step_folder

    refuse_existing(run, overwrite=overwrite)
    opened = open_hugging_face(source)
    weights = dict(opened.weights())
    if precision is None:
        precision = "fp32" if next(iter(weights.values())).dtype == torch.float32 else "bf16"
    model = build_empty(opened.config, opened.vocabulary, precision)
    fill(model, weights)
    record = {
        "model": asdict(opened.config),
        "seed": 0,
        "trainer": {"precision": precision},
        "imported": {"layout": opened.layout.name, "dialect": opened.dialect},
    }
    with publish_folder(run, overwrite=overwrite) as unfinished:
        save_weights(model, step_folder(unfinished / "checkpoints", 0), opened.vocabulary.to_dict(), record)
    return step_folder(Path(run) / "checkpoints", 0)


def read_weights(source: StrPath, *, averaged: bool | None = None) -> dict[str, Tensor]:
    """Our tensors by name, of a run, a checkpoint or a Hugging Face folder; rows of padding are cut off."""
    if (Path(source) / "config.json").is_file():
        opened = open_hugging_face(source)
        vocabulary, weights = opened.vocabulary, dict(opened.weights())
    else:
        from emu3_megatron.training.checkpoint import load_model_for_inference

        (model,), _, vocabulary = load_model_for_inference(Path(source), ParallelConfig(), averaged=averaged)
        weights = canonical_names(model.state_dict())
    rows = {"embedding.word_embeddings.weight", "output_layer.weight"}
    return {name: t[: vocabulary.size] if name in rows else t for name, t in weights.items()}


def first_difference(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> str | None:
    """The first way in which two sets of tensors differ, in words; None where they are equal bit by bit."""
    for name in sorted(set(one) | set(other)):
        if name not in one or name not in other:
            return f"{name} is only in the {'second' if name not in one else 'first'}"
        left, right = one[name].detach(), other[name].detach()
        if left.shape != right.shape:
            return f"{name} has shape {list(left.shape)} in the first, {list(right.shape)} in the second"
        if left.dtype != right.dtype:
            return f"{name} is {left.dtype} in the first, {right.dtype} in the second"
        different = left.contiguous().view(torch.uint8) != right.contiguous().view(torch.uint8)
        if bool(different.any()):
            largest = (left.float() - right.float()).abs().max().item()
            return f"{name} differs, by at most {largest:.3g}"
    return None


def logit_difference(model: torch.nn.Module, folder: StrPath, sequences: Sequence[Sequence[int]]) -> float:
    """Largest absolute difference of our logits from those of transformers, on whole sequences.

    Args:
        model: our whole model, in evaluation mode.
        folder: what it was exported to, in a layout of transformers.
        sequences: token ids.
    """
    import transformers

    from emu3_megatron.parallel.context import packed_sequence_parameters

    theirs = transformers.Emu3ForConditionalGeneration.from_pretrained(folder, dtype="auto").eval()
    device = next(model.parameters()).device
    largest = 0.0
    with torch.no_grad():
        for sequence in sequences:
            ids = torch.tensor([list(sequence)])
            lengths = torch.tensor([0, ids.shape[1]], dtype=torch.int32, device=device)
            whole = packed_sequence_parameters(lengths)
            ours = model(ids.to(device), packed_seq_params=whole, logits="all")[0].cpu()
            expected = theirs(input_ids=ids).logits[0].float()
            largest = max(largest, (ours - expected).abs().max().item())
    return largest


def dialect_of_run(config: Mapping[str, Any]) -> str | None:
    """The dialect of the datasets a run was trained on; None where none of them is here any more.

    Raises `UserError` where they disagree: nobody but the user can choose.
    """
    names: set[str] = set()
    for source in (config.get("data") or {}).get("sources", {}).values():
        manifest = Path(source["path"]) / "manifest.json"
        if manifest.is_file():
            name = json.loads(manifest.read_text(encoding="utf-8")).get("dialect_name")
            names.update([name] if name else [])
    if len(names) > 1:
        raise UserError(f"the run's datasets use several dialects, {sorted(names)}; choose with --dialect")
    return names.pop() if names else None


def build_empty(config: Any, vocabulary: Any, precision: str) -> torch.nn.Module:
    """An empty model on this process."""
    from emu3_megatron.model import build_model

    if precision not in ("fp32", "bf16"):
        raise UserError(f"precision {precision!r} must be fp32 or bf16")
    (model,) = build_model(
        config,
        vocabulary_padded_size=vocabulary.padded_size,
        vocabulary_size=vocabulary.size,
        parallel=ParallelConfig(),
        seed=0,
        precision="bf16" if precision == "bf16" else "fp32",
        initialize=False,
    )
    return model


def fill(model: torch.nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy weights into the model."""
    state = canonical_names(model.state_dict())
    if set(state) != set(weights):
        raise UserError(f"weights do not fit the model: {sorted(set(state) ^ set(weights))[:5]}")
    with torch.no_grad():
        for name, tensor in weights.items():
            state[name].copy_(tensor)


def save_weights(
    model: torch.nn.Module, folder: Path, vocabulary: dict[str, Any], config: dict[str, Any]
) -> None:
    """Write a committed checkpoint of weights alone."""
    from megatron.core import dist_checkpointing

    from emu3_megatron.files import write_json_atomic
    from emu3_megatron.training import checkpoint_files as files
    from emu3_megatron.training.checkpoint import CONTENT_METADATA, Progress, Record, model_state

    folder.mkdir(parents=True)
    dist_checkpointing.save(model_state([model]), str(folder), content_metadata=CONTENT_METADATA)
    record = Record(progress=Progress(), vocabulary=vocabulary, plan_fingerprint="", plan={}, config=config)
    write_json_atomic(folder / files.RECORD, asdict(record))
    files.commit(folder, files.seal(folder, files.payload(folder)), 0)
