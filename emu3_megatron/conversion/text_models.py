"""A text-only Llama or Qwen as the start of pre-training, its vocabulary extended.

The rows of text ids are kept. The rows of control and vision ids, which the text model does not have, are
drawn from the normal distribution with the mean and covariance of the kept rows, so that a new id is as
likely and as long as an old one (Hewitt, 2021, "Initializing new word embeddings"): the loss on text starts
where the text model ended.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from emu3_megatron.conversion import configuration
from emu3_megatron.conversion.checkpoints import build_empty, fill, save_weights
from emu3_megatron.conversion.hugging_face import read_json
from emu3_megatron.conversion.maps import LAYOUTS, WeightMap
from emu3_megatron.conversion.publish import publish_folder, refuse_existing
from emu3_megatron.conversion.rules import ConversionError
from emu3_megatron.conversion.tensor_files import TensorFiles
from emu3_megatron.vocabulary import Vocabulary

EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
KINDS = ("llama", "mistral", "qwen3")
"""Values of ``model_type`` whose decoder is ours. Qwen2 has biases, which ours has not."""

SMALLEST_VARIANCE = 1e-6
"""Share of the mean variance that is added to every direction, so that the covariance has a root."""


def import_text_model(
    source: str | os.PathLike[str],
    run: str | os.PathLike[str],
    vocabulary: Vocabulary,
    *,
    seed: int = 0,
    precision: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a text-only Hugging Face folder as the first checkpoint of a new run, with more ids.

    Args:
        source: Folder of a Llama or Qwen3 in safetensors.
        run: Appears whole or not at all, with ``checkpoints/step-00000000``; `checkpoint.load` takes it.
        vocabulary: That of the datasets to train on; its text ids are those of the model's tokenizer.
        seed: Of the new rows.
        precision: ``fp32`` or ``bf16``; by default that of the folder (half precision becomes bf16).
        overwrite: Replace an existing folder.

    Raises:
        ConversionError: The folder is damaged, another kind of model, or has too few rows.
        UserError: `run` exists.
    """
    from emu3_megatron.training.checkpoint_files import step_folder

    refuse_existing(run, overwrite=overwrite)
    folder = Path(source)
    values = read_json(folder / "config.json")
    if values.get("model_type") not in KINDS:
        raise ConversionError(
            f"{folder / 'config.json'}: model_type={values.get('model_type')!r} is none of {', '.join(KINDS)}"
        )
    files = TensorFiles(folder)
    # Tied matrices are taken apart: each side is extended and trained on its own.
    config = configuration.read_model_config({**values, "tie_word_embeddings": False})
    config = replace(config, qk_layernorm="model.layers.0.self_attn.q_norm.weight" in files)
    extended = _Extended(files, vocabulary, seed)
    weight_map = WeightMap(configuration.architecture(config, vocabulary), LAYOUTS["emu3"])
    if precision is None:
        precision = "fp32" if files[EMBEDDING].dtype == torch.float32 else "bf16"
    model = build_empty(config, vocabulary, precision)
    fill(model, dict(weight_map.from_hugging_face(extended)))
    record = {
        "model": asdict(config),
        "seed": seed,
        "trainer": {"precision": precision},
        "imported": {"text_model": folder.name, "text_rows": extended.text_rows},
    }
    with publish_folder(run, overwrite=overwrite) as unfinished:
        save_weights(model, step_folder(unfinished / "checkpoints", 0), vocabulary.to_dict(), record)
    return step_folder(Path(run) / "checkpoints", 0)


class _Extended(Mapping[str, Tensor]):
    """The tensors of a text model with rows for every id of a vocabulary; read when asked for."""

    def __init__(self, files: TensorFiles, vocabulary: Vocabulary, seed: int) -> None:
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
        return torch.cat([kept, new_rows(kept, self._vocabulary.size - self.text_rows, generator)])

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        if name in (EMBEDDING, OUTPUT):
            return (self._vocabulary.size, self._files.shape(EMBEDDING)[1])
        return self._files.shape(name)


def new_rows(kept_VH: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Rows with the mean and covariance of others.

    Args:
        kept_VH: ``[V, H]``.
        count: How many.
        generator: Of the draws.

    Returns:
        ``[count, H]`` in the type of `kept_VH`, computed in fp32.
    """
    wide = kept_VH.float()
    mean_H = wide.mean(0)
    centred = wide - mean_H
    covariance_HH = (centred.t() @ centred).double() / max(1, len(wide) - 1)
    floor = SMALLEST_VARIANCE * covariance_HH.diagonal().mean().clamp_min(1e-30)
    covariance_HH.diagonal().add_(floor)
    root_HH = torch.linalg.cholesky(covariance_HH).float()
    draws = torch.randn(count, wide.size(1), generator=generator)
    return (mean_H + draws @ root_HH.t()).to(kept_VH.dtype)
