"""A text-only Llama, Qwen2 or Qwen3 as the start of pre-training, its vocabulary extended.

The rows of text ids are kept. The rows of control and vision ids, which the text model does not have, are
drawn from the normal distribution with the mean and covariance of the kept rows, so that a new id is as
likely and as long as an old one (Hewitt, 2021, "Initializing new word embeddings"): the loss on text starts
where the text model ended.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from emu3_megatron.conversion import configuration
from emu3_megatron.conversion.checkpoints import ImportedRun, write_run
from emu3_megatron.conversion.companions import read_json
from emu3_megatron.conversion.lazy import LazyTensors
from emu3_megatron.conversion.maps import LAYOUTS, WeightMap
from emu3_megatron.conversion.publish import refuse_existing
from emu3_megatron.conversion.rules import ConversionError
from emu3_megatron.conversion.tensor_files import TensorFolder, open_tensors
from emu3_megatron.parallel.config import ParallelConfig
from emu3_megatron.vocabulary import Vocabulary

EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
ROWS = 1 << 14
"""Rows that are computed with together."""

SMALLEST_VARIANCE = 1e-6
"""Share of the mean variance that is added to every direction, so that the covariance has a root."""


def import_text_model(
    source: str | os.PathLike[str],
    run: str | os.PathLike[str],
    vocabulary: Vocabulary,
    *,
    seed: int = 0,
    precision: str | None = None,
    parallel: ParallelConfig | None = None,
    datasets: Sequence[Path] = (),
    allow_pickle: bool = False,
    overwrite: bool = False,
) -> Path:
    """Write a text-only Hugging Face folder as the first checkpoint of a new run, with more ids.

    Args:
        source: Folder of a Llama, Qwen2 or Qwen3.
        run: Appears whole or not at all, with ``checkpoints/step-00000000``; `checkpoint.load` takes it.
        vocabulary: That of the datasets to train on; its text ids are those of the model's tokenizer.
        seed: Of the new rows.
        precision: ``fp32`` or ``bf16``; by default that of the folder.
        parallel: See `import_checkpoint`.
        datasets: See `import_checkpoint`.
        allow_pickle: See `open_hugging_face`.
        overwrite: Replace an existing folder.

    Raises:
        ConversionError: The folder is damaged, another kind of model, or has too few rows.
        UserError: `run` exists.
    """
    refuse_existing(run, overwrite=overwrite)
    folder = Path(source)
    values = read_json(folder / "config.json")
    if values.get("model_type") not in configuration.TEXT_MODELS:
        raise ConversionError(
            f"{folder / 'config.json'}: model_type={values.get('model_type')!r} is none of "
            f"{', '.join(configuration.TEXT_MODELS)}"
        )
    files = open_tensors(folder, allow_pickle=allow_pickle)
    # Tied matrices are taken apart: each side is extended and trained on its own.
    config = replace(
        configuration.read_model_config({**values, "tie_word_embeddings": False}, folder / "config.json"),
        qk_layernorm="model.layers.0.self_attn.q_norm.weight" in files,
        qkv_bias="model.layers.0.self_attn.q_proj.bias" in files,
    )
    extended = _Extended(files, vocabulary, seed)
    weight_map = WeightMap(configuration.architecture(config, vocabulary), LAYOUTS["emu3"])
    notes = {"text_model": folder.name, "text_rows": extended.text_rows}
    about = ImportedRun(
        config=config, vocabulary=vocabulary, notes=notes, companions=folder, keep_companions=False, seed=seed
    )
    return write_run(
        run,
        weight_map.ours(extended),
        about,
        precision=precision,
        parallel=parallel,
        datasets=datasets,
        overwrite=overwrite,
    )


class _Extended(LazyTensors):
    """The tensors of a text model with rows for every id of a vocabulary; read when asked for."""

    def __init__(self, files: TensorFolder, vocabulary: Vocabulary, seed: int) -> None:
        self._files, self._vocabulary, self._seed = files, vocabulary, seed
        self._names = dict.fromkeys([*files, OUTPUT])  # a tied model has no output matrix of its own
        if EMBEDDING not in files:
            raise ConversionError(f"{files.folder} has no {EMBEDDING}; is it a text-only Llama or Qwen?")
        rows = files.shape(EMBEDDING)[0]
        if rows < vocabulary.text_size:
            raise ConversionError(
                f"{files.folder} has {rows} rows, fewer than the {vocabulary.text_size} text ids of "
                f"vocabulary {vocabulary.name!r}; tokenize the datasets with the tokenizer of this model"
            )
        self.text_rows = vocabulary.text_size
        """Rows that are kept."""

    def __getitem__(self, name: str) -> Tensor:
        stored = name if name in self._files else EMBEDDING
        if name not in (EMBEDDING, OUTPUT):
            return self._files[name]
        kept = self._files[stored][: self.text_rows]
        digest = hashlib.sha256(f"{self._seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        whole = torch.empty(self.shape(name), dtype=kept.dtype)
        whole[: len(kept)] = kept
        new_rows(kept, whole[len(kept) :], generator)
        return whole

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        if name in (EMBEDDING, OUTPUT):
            return (self._vocabulary.size, self._files.shape(EMBEDDING)[1])
        return self._files.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """Type of a tensor's elements."""
        return self._files.dtype(name if name in self._files else EMBEDDING)


def new_rows(kept_VH: Tensor, new_NH: Tensor, generator: torch.Generator) -> None:
    """Fill rows with draws that have the mean and covariance of others.

    Args:
        kept_VH: ``[V, H]``.
        new_NH: ``[N, H]``, filled; computed in fp32, `ROWS` at a time.
        generator: Of the draws.
    """
    count, width = kept_VH.shape
    mean_H = torch.zeros(width)
    for block in kept_VH.split(ROWS):
        mean_H += block.float().sum(0) / count
    covariance_HH = torch.zeros(width, width)
    for block in kept_VH.split(ROWS):
        centred = block.float() - mean_H
        covariance_HH += centred.t() @ centred
    root_HH = _root(covariance_HH.double() / max(1, count - 1))
    for block in new_NH.split(ROWS):
        draws = torch.randn(len(block), width, generator=generator)
        block.copy_(mean_H + draws @ root_HH.t())


def _root(covariance_HH: Tensor) -> Tensor:
    """A lower triangular root in fp32, of the matrix with a little on its diagonal."""
    floor = SMALLEST_VARIANCE * covariance_HH.diagonal().mean().clamp_min(1e-30)
    covariance_HH.diagonal().add_(floor)
    return torch.linalg.cholesky(covariance_HH).float()
