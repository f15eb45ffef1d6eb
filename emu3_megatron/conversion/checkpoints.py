"""Training checkpoints and Hugging Face folders: one into the other, tensor by tensor.

Distributed checkpoints do not depend on a layout, so any number of processes converts what any other wrote or
will read. Started under torchrun, they divide the work.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emu3_megatron.conversion.adapters import Merged
from emu3_megatron.conversion.companions import (
    KEPT,
    VISION,
    keep_companions,
    kept_folder,
    name_datasets,
    write_training_config,
)
from emu3_megatron.conversion.distributed import write_checkpoint_tensors
from emu3_megatron.conversion.hugging_face import ExportedModel, export_hugging_face, open_hugging_face
from emu3_megatron.conversion.lazy import Cast, Finite, InMemory, LazyTensors, refuse_problems
from emu3_megatron.conversion.maps import Converted, canonical_names, one_dtype
from emu3_megatron.conversion.processes import on_first, together
from emu3_megatron.conversion.publish import publish_folder, refuse_existing
from emu3_megatron.conversion.stored import StoredTensors
from emu3_megatron.conversion.vision_files import write_vision_tokenizer
from emu3_megatron.data import Manifest
from emu3_megatron.errors import UserError
from emu3_megatron.files import write_json_atomic
from emu3_megatron.model import LoRAConfig, ModelConfig
from emu3_megatron.parallel.config import ParallelConfig
from emu3_megatron.training.checkpoint import Progress, Record, has_adapters
from emu3_megatron.training.checkpoint_files import (
    RECORD,
    CheckpointError,
    commit,
    file_damage,
    payload,
    resolve,
    seal,
    sealed_files,
    step_folder,
)
from emu3_megatron.vision import VisionTokenizerConfig
from emu3_megatron.vocabulary import Vocabulary

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""Types that a model trains in, by their names."""

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
        vision_tokenizer: folder of the vision tokenizer; needed but for the layout ``emu3``, and where the
            run was imported with one.
        text_tokenizer: file of the text tokenizer; without it that of the import, or none, is written.
        layout: see `export_hugging_face`.
        dtype: of the language model's tensors; None keeps them.
        averaged: take the averaged weights; by default they are taken where there are some.
        dialect: name to keep in the folder; by default that of the run's datasets, or of its import.
        image_pixels: see `export_hugging_face`.
        overwrite: replace an existing folder.

    Raises:
        CheckpointError: the checkpoint is damaged.
        ConversionError, UserError: see `export_hugging_face`.
    """
    refuse_existing(folder, overwrite=overwrite)
    if (Path(source) / "config.json").is_file():
        raise UserError(f"{source} is a Hugging Face folder already; export takes a run or its checkpoint")
    checkpoint = resolve(Path(source))
    check_files(checkpoint)
    record = Record.read(checkpoint)
    dialect = dialect or dialect_of_run(record.config) or record.config.get("imported", {}).get("dialect")
    with checkpoint_weights(checkpoint, averaged=averaged) as (weights, config, vocabulary):
        return export_hugging_face(
            folder,
            weights,
            ExportedModel(config=config, vocabulary=vocabulary, dialect=dialect),
            vision_tokenizer=vision_tokenizer or kept_folder(checkpoint, VISION),
            text_tokenizer=text_tokenizer,
            layout=layout,
            dtype=dtype,
            image_pixels=image_pixels,
            kept=kept_folder(checkpoint, KEPT),
            overwrite=overwrite,
        )


def import_checkpoint(
    source: StrPath,
    run: StrPath,
    *,
    precision: str | None = None,
    parallel: ParallelConfig | None = None,
    datasets: Sequence[Path] = (),
    allow_pickle: bool = False,
    overwrite: bool = False,
) -> Path:
    """Write a Hugging Face folder as the first checkpoint of a new run folder, one tensor at a time.

    The run holds weights only, the vision tokenizer where the layout has one, the small files of the folder,
    and ``train.yaml``: training starts from it, generation and export read it.

    Args:
        source: folder of any layout.
        run: appears whole or not at all, with ``checkpoints/step-00000000``.
        precision: ``fp32`` or ``bf16``; by default every number is kept as it is.
        parallel: layout whose ranks read whole files; every other one can load the checkpoint too.
        datasets: folders that ``train.yaml`` trains on.
        allow_pickle: see `open_hugging_face`.
        overwrite: replace an existing folder.

    Raises:
        ConversionError: the folder is damaged or does not fit, or holds numbers that are not finite.
        UserError: `run` exists, or the model or a dataset does not fit.
    """
    refuse_existing(run, overwrite=overwrite)
    opened = open_hugging_face(source, allow_pickle=allow_pickle)
    vocabulary = _vocabulary_of_datasets(opened.vocabulary, datasets)
    about = ImportedRun(
        config=opened.config,
        vocabulary=vocabulary,
        notes={"layout": opened.layout.name, "dialect": opened.dialect},
        companions=Path(source),
        vision=opened.vision(),
    )
    return write_run(
        run,
        opened.tensors(),
        about,
        precision=precision,
        parallel=parallel,
        datasets=datasets,
        overwrite=overwrite,
    )


@dataclass(frozen=True, kw_only=True)
class ImportedRun:
    """What a new run holds beside the weights."""

    config: ModelConfig
    vocabulary: Vocabulary
    notes: dict[str, Any]
    """Where it is from, kept in the checkpoint's record."""
    companions: Path
    """The Hugging Face folder."""
    keep_companions: bool = True
    """Keep its small files: they describe this model."""
    seed: int = 0
    vision: tuple[VisionTokenizerConfig, LazyTensors] | None = None

    def record(self, precision: str) -> dict[str, Any]:
        """What stands in the checkpoint's record where a trained one has its configuration."""
        return {
            "model": asdict(self.config),
            "seed": self.seed,
            "trainer": {"precision": precision},
            "imported": self.notes,
        }


def write_run(
    run: StrPath,
    weights: Converted,
    about: ImportedRun,
    *,
    precision: str | None = None,
    parallel: ParallelConfig | None = None,
    datasets: Sequence[Path] = (),
    overwrite: bool = False,
) -> Path:
    """Write weights as the first checkpoint of a new run folder; see `import_checkpoint`.

    Args:
        run: appears whole or not at all.
        weights: our tensors; a tensor that is not finite is refused.
        about: everything else.
        precision: ``fp32`` or ``bf16``; None keeps the type, which must then be the same everywhere.
        parallel: see `import_checkpoint`.
        datasets: see `import_checkpoint`.
        overwrite: replace an existing folder.

    Returns:
        The checkpoint folder.
    """
    parallel = parallel or ParallelConfig()
    about.config.validate(parallel)
    if precision not in (None, "fp32", "bf16"):
        raise UserError(f"precision {precision!r} must be fp32 or bf16")
    if precision is None:
        finite = Finite(weights)
        kept_type = one_dtype(str(about.companions), weights.source)
        # fp32 holds every number of half precision, bf16 does not
        precision = "bf16" if kept_type == torch.bfloat16 else "fp32"
    else:
        finite = Finite(Cast(weights, PRECISIONS[precision]))
    sources = name_datasets(list(datasets))
    checkpoint = step_folder(Path(run).absolute() / "checkpoints", 0)
    with publish_folder(run, overwrite=overwrite) as unfinished:
        folder = step_folder(unfinished / "checkpoints", 0)
        on_first(lambda: folder.mkdir(parents=True))
        sealed = write_checkpoint_tensors(
            folder, finite, weights.split_axis, num_layers=about.config.num_layers, parallel=parallel
        )
        problems = {name: what for part in together(lambda: finite.problems) for name, what in part.items()}
        refuse_problems(about.companions, problems)
        if about.vision is not None:
            on_first((unfinished / VISION).mkdir)
            write_vision_tokenizer(unfinished / VISION, *about.vision)

        def finish() -> None:
            if about.keep_companions:
                keep_companions(about.companions, unfinished)
            write_training_config(
                unfinished, checkpoint, about.config, precision=str(precision), datasets=sources
            )
            _commit(folder, sealed, about.vocabulary.to_dict(), about.record(str(precision)))

        on_first(finish)
    return step_folder(Path(run) / "checkpoints", 0)


def _vocabulary_of_datasets(vocabulary: Vocabulary, datasets: Sequence[Path]) -> Vocabulary:
    """The vocabulary under the name that the datasets give it; raises `UserError` when they have another."""
    for folder in datasets:
        found = Manifest.load(folder).vocabulary
        if replace(found, name=vocabulary.name) != vocabulary:
            raise UserError(
                f"{folder} is tokenized for another vocabulary ({found.text_size} text ids, "
                f"{found.codebook_size} codes) than the weights ({vocabulary.text_size}, "
                f"{vocabulary.codebook_size}); tokenize it for this model"
            )
        vocabulary = found
    return vocabulary


@contextmanager
def checkpoint_weights(
    checkpoint: Path, *, averaged: bool | None = None
) -> Iterator[tuple[LazyTensors, ModelConfig, Vocabulary]]:
    """Our tensors of a committed checkpoint, read one by one, in the precision of its run; adapters merged.

    They can be read inside the ``with``; those that were read stay valid after it.

    Raises:
        CheckpointError: it is damaged, or has no averaged weights and they are asked for.
    """
    record = Record.read(checkpoint)
    if averaged and not record.ema:
        raise CheckpointError(f"{checkpoint} holds no averaged weights (ema.decay was 0); leave averaged out")
    take = record.ema if averaged is None else averaged
    try:
        config, vocabulary = ModelConfig(**record.config["model"]), Vocabulary(**record.vocabulary)
        precision = record.config["trainer"]["precision"]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{checkpoint / RECORD} does not describe a model: {error}") from error
    with closing(StoredTensors(checkpoint, averaged=take)) as stored:
        weights: LazyTensors = stored
        if has_adapters(record.config):
            weights = Merged(weights, LoRAConfig(**record.config["lora"]))
        yield (Cast(weights, PRECISIONS[precision]) if take else weights), config, vocabulary


def check_files(checkpoint: Path) -> None:
    """Compare the files of a checkpoint with what was committed: tensor files by size, others by checksum.

    `StoredTensors` checks the rest of a tensor file when it reads it: one pass over the disk does for both.
    Raises `CheckpointError` that names every damaged file.
    """
    problems = [
        file_damage(checkpoint / name, written, checksums=not name.endswith(".distcp"))
        for name, written in sorted(sealed_files(checkpoint).items())
    ]
    if found := [problem for problem in problems if problem]:
        raise CheckpointError(f"{checkpoint} is damaged: {'; '.join(found)}; restore it from a copy")


def read_weights(source: StrPath, *, averaged: bool | None = None) -> dict[str, Tensor]:
    """Our tensors by name, of a run, a checkpoint or a Hugging Face folder; rows of padding are cut off."""
    if (Path(source) / "config.json").is_file():
        opened = open_hugging_face(source)
        vocabulary, weights = opened.vocabulary, dict(opened.weights())
    else:
        with checkpoint_weights(resolve(Path(source)), averaged=averaged) as (lazy, _, vocabulary):
            weights = dict(lazy)
    rows = {"embedding.word_embeddings.weight", "output_layer.weight"}
    return {name: t[: vocabulary.size] if name in rows else t for name, t in weights.items()}


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


def save_weights(
    model: torch.nn.Module, folder: Path, vocabulary: dict[str, Any], config: dict[str, Any]
) -> None:
    """Write the weights of a whole model in memory (one process) as a committed checkpoint."""
    folder.mkdir(parents=True)
    weights = InMemory(canonical_names(model.state_dict()))
    sealed = write_checkpoint_tensors(
        folder,
        weights,
        lambda name: (None, 1),
        num_layers=config["model"]["num_layers"],
        parallel=ParallelConfig(),
    )
    _commit(folder, sealed, vocabulary, config)


def _commit(
    folder: Path,
    sealed: dict[str, dict[str, int | str]],
    vocabulary: dict[str, Any],
    config: dict[str, Any],
) -> None:
    """Add the record to a checkpoint's tensor files, seal what is not sealed, commit."""
    record = Record(progress=Progress(), vocabulary=vocabulary, plan_fingerprint="", plan={}, config=config)
    write_json_atomic(folder / RECORD, asdict(record))
    rest = [path for path in payload(folder) if path.name not in sealed]
    commit(folder, dict(sorted({**sealed, **seal(folder, rest)}.items())), 0)
