"""What a checkpoint holds, and how it is saved, resumed under any layout, and loaded for inference.

Tensors are in megatron-core's torch_dist format and named by parameter: weights by their own name, Adam's
moments as ``optimizer.state.exp_avg.NAME`` and ``.exp_avg_sq.NAME``, fp32 master weights of a bf16 run as
``optimizer.state.fp32_param.NAME``, averaged weights as ``ema.NAME``. Nothing in them depends on the layout,
nor on whether the optimizer was distributed. Everything else is in ``emu3.json``: see `Record`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from emu3_megatron.files import write_json_atomic
from emu3_megatron.model import LoRAConfig, ModelConfig
from emu3_megatron.model.config import ADAPTER_SUFFIX, AttentionBackend
from emu3_megatron.parallel.config import ParallelConfig
from emu3_megatron.training import checkpoint_files as files
from emu3_megatron.training.checkpoint_choice import sound_checkpoint
from emu3_megatron.training.checkpoint_files import CheckpointError
from emu3_megatron.training.config import Precision
from emu3_megatron.training.modules import unwrap
from emu3_megatron.training.optimizer import Optimizer, buffered_parameters
from emu3_megatron.vocabulary import Vocabulary

if TYPE_CHECKING:
    from emu3_megatron.training.checkpoint_writer import BackgroundWrite

FORMAT = 2
"""Version of ``emu3.json``. 2 has the spike guard's means in `Progress`; without them it begins anew."""


@dataclass(kw_only=True)
class Progress:
    """How far a run has come; with the plan, all that a resume needs besides tensors.

    Random numbers need no state: dropout is seeded from (seed, step) at every step.
    """

    step: int = 0
    """Steps taken, skipped ones included."""
    windows: int = 0
    """Windows consumed: the next window's number in the plan."""
    updates: int = 0
    """Optimizer updates made; Adam's bias correction counts these."""
    skipped: int = 0
    """Steps whose update was left out."""
    skipped_in_a_row: int = 0
    """Of these, the last ones, without an update between them."""
    judged: int = 0
    """Steps in the running means that spikes are measured against."""
    mean_loss: float = 0.0
    """Running mean of the loss, before it is corrected for its beginning at zero."""
    mean_grad_norm: float = 0.0
    """That of the gradient norm."""


@dataclass(kw_only=True)
class Record:
    """Contents of ``emu3.json``."""

    progress: Progress
    vocabulary: dict[str, Any]
    """`Vocabulary.to_dict()`."""
    plan_fingerprint: str
    """Identity of the order of windows."""
    plan: dict[str, Any]
    """What the fingerprint covers, in readable form, to name what changed."""
    config: dict[str, Any]
    """The resolved configuration."""
    ema: bool = False
    """Averaged weights are in the checkpoint."""
    format: int = FORMAT

    @classmethod
    def read(cls, folder: Path) -> Record:
        """The record of a checkpoint folder.

        Raises:
            CheckpointError: it is missing, unreadable, or of a newer format.
        """
        path = folder / files.RECORD
        try:
            fields = json.loads(path.read_text())
            if fields["format"] > FORMAT:
                raise CheckpointError(
                    f"{path}: format {fields['format']} is newer than {FORMAT}, the newest "
                    f"this version reads; update"
                )
            return cls(**{**fields, "progress": Progress(**fields["progress"])})
        except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise CheckpointError(f"{path}: not a readable checkpoint record ({error})") from error


class Checkpointer:
    """Saves and restores one run.

    Args:
        folder: RUN/checkpoints.
        keep: Committed checkpoints to keep.
        chunks: Wrapped chunks of this rank.
        optimizer: Its optimizer.
        precision: Of the model's parameters.
        averages: Averaged weights, one list of tensors for each chunk in the order of its parameters, or
            None.
    """

    def __init__(
        self,
        folder: Path,
        keep: int,
        chunks: Sequence[Any],
        optimizer: Optimizer,
        *,
        precision: str,
        averages: Sequence[dict[str, torch.Tensor]] | None = None,
    ) -> None:
        self.folder = folder
        self._keep = keep
        self._chunks = [unwrap(chunk) for chunk in chunks]
        self._optimizer = optimizer
        self._precision = precision
        self._averages = averages
        self._writing: tuple[BackgroundWrite, dict[str, Any]] | None = None

    def save(self, record: Record) -> Path:
        """Write, commit, and prune; returns the committed folder. All ranks call it together."""
        self.begin(record)
        return self.finish()

    def begin(self, record: Record) -> None:
        """Copy everything to host memory and start writing it; training may go on. All ranks call it
        together.

        Raises:
            CheckpointError: the save before is not finished, or rank 0 cannot make the folder or its first
                file; all ranks raise it.
        """
        from emu3_megatron.training.checkpoint_writer import BackgroundWrite, on_rank_zero

        if self._writing is not None:
            raise CheckpointError(f"{self._writing[0].folder} is still being written; finish it first")
        folder = files.step_folder(self.folder, record.progress.step)

        def make() -> None:
            files.remove(folder)  # what an interrupted save of the same step left
            folder.mkdir(parents=True)

        on_rank_zero(folder, make)
        state, models = self._model_state()
        if record.progress.updates:
            state["optimizer"] = self._optimizer_state(models, is_loading=False)[0]
        # As plain values: the run's progress moves on while files are written.
        self._writing = (BackgroundWrite(state, folder, CONTENT_METADATA), asdict(record))

    @property
    def is_writing(self) -> bool:
        """Whether this rank still writes files of the save that `begin` started."""
        return self._writing is not None and self._writing[0].is_writing

    def finish(self) -> Path:
        """Wait for the save that `begin` started, commit it, and prune. All ranks call it together.

        Raises:
            CheckpointError: nothing was begun, or a rank could not write its files; all ranks raise it.
        """
        if self._writing is None:
            raise CheckpointError("no save was begun")
        from emu3_megatron.training.checkpoint_writer import on_rank_zero

        (write, record), self._writing = self._writing, None
        sealed, folder = write.finish(), write.folder

        def commit() -> None:
            write_json_atomic(folder / files.RECORD, record)
            rest = [path for path in files.payload(folder) if str(path.relative_to(folder)) not in sealed]
            sealed.update(files.seal(folder, rest))
            files.commit(folder, dict(sorted(sealed.items())), record["progress"]["step"])
            files.prune(self.folder, self._keep)

        on_rank_zero(folder, commit)
        return folder

    def restore(self, folder: Path, record: Record) -> None:
        """Load weights, optimizer and averages of a checkpoint of this run, saved under any layout."""
        from megatron.core import dist_checkpointing

        from emu3_megatron.training.checkpoint_metadata import refuse_code

        refuse_code(folder)
        state, models = self._model_state(averages=record.ema)
        plain: dict[str, Any] = {}
        if record.progress.updates:
            state["optimizer"], plain = self._optimizer_state(models, is_loading=True)
        loaded = dist_checkpointing.load(state, str(folder))
        for name, chunk in name_chunks(self._chunks):
            chunk.load_state_dict(loaded[name])
        if record.progress.updates:
            self._load_optimizer(plain, loaded["optimizer"], record.progress.updates)
        else:
            self._optimizer.megatron.reload_model_params()
        if self._averages is not None and record.ema:
            for average, (name, _) in zip(self._averages, name_chunks(self._chunks), strict=True):
                for key, tensor in average.items():
                    tensor.copy_(loaded[f"ema_{name}"][key])

    def load_weights(self, folder: Path) -> None:
        """Start from another checkpoint's weights; nothing else of it is taken.

        Adapters that the checkpoint does not have keep their initial values, which change nothing.
        """
        load_weights(self._chunks, folder)
        self._optimizer.megatron.reload_model_params()

    def _model_state(self, *, averages: bool = True) -> tuple[dict[str, Any], dict[str, Any]]:
        """The sharded state of weights and averages, and of the weights alone."""
        models = model_state(self._chunks)
        state = dict(models)
        if self._averages is not None and averages:
            for average, (name, sharded) in zip(self._averages, models.items(), strict=True):
                state[f"ema_{name}"] = {
                    key: replace_data(sharded[key], f"ema.{sharded[key].key}", tensor)
                    for key, tensor in average.items()
                }
        return state, models

    def _optimizer_state(
        self, models: dict[str, Any], *, is_loading: bool
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Sharded tensors of every part under layout-free names, and plain values, which are not saved.

        Master weights get one name for both kinds of optimizer. In an fp32 run they are the weights: they are
        not saved again, and when loading they are among the plain values, as the weights themselves.
        """
        from megatron.core.dist_checkpointing.dict_utils import extract_matching_values
        from megatron.core.dist_checkpointing.mapping import ShardedBase

        tensors: dict[str, Any] = {}
        plain: dict[str, Any] = {}
        for number, part in enumerate(self._optimizer.parts):
            state = part.sharded_state_dict(
                models["model"] if len(models) == 1 else models,
                is_loading=is_loading,
                metadata=sharding_metadata(),
            )
            sharded, rest = extract_matching_values(
                state, lambda value: isinstance(value, ShardedBase), return_lists_as_dicts=True
            )
            if self._precision == "fp32" and "param_state" in sharded:
                for index, weight in enumerate(buffered_parameters(part)):
                    del sharded["param_state"][index]["param"]
                    rest.setdefault("param_state", {})[index] = {"param": weight.data}
            tensors[str(number)], plain[str(number)] = _map_values(sharded, _with_common_name), rest
        return tensors, plain

    def _load_optimizer(self, plain: dict[str, Any], tensors: dict[str, Any], updates: int) -> None:
        from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, merge
        from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject

        dict_list_map_inplace(lambda v: v.unwrap() if isinstance(v, LocalNonpersistentObject) else v, plain)
        for number, part in enumerate(self._optimizer.parts):
            state = merge(plain[str(number)], tensors[str(number)])
            inner = state.get("optimizer", state)
            inner["param_groups"] = _as_list(inner["param_groups"])
            if "fp32_from_fp16_params" in state:
                state["fp32_from_fp16_params"] = [
                    _as_list(group) for group in _as_list(state["fp32_from_fp16_params"])
                ]
            for group in inner["param_groups"]:
                group["step"] = updates
            with torch.no_grad():
                part.load_state_dict(state)


_DISTRIBUTED_MASTER = "optimizer.state.param."
_PLAIN_MASTER = "optimizer.state.fp32_param."


def _with_common_name(value: Any) -> Any:
    """A master weight of the distributed optimizer under the plain one's name; other tensors as they are."""
    if not value.key.startswith(_DISTRIBUTED_MASTER):
        return value
    return replace(value, key=_PLAIN_MASTER + value.key.removeprefix(_DISTRIBUTED_MASTER))


def _map_values(tree: dict[Any, Any], change: Callable[[Any], Any]) -> dict[Any, Any]:
    """Nested dicts with every leaf changed."""
    return {
        key: _map_values(value, change) if isinstance(value, dict) else change(value)
        for key, value in tree.items()
    }


def _as_list(numbered: Any) -> list[Any]:
    """A list that was taken apart into a dict by position."""
    return [numbered[index] for index in range(len(numbered))]


CONTENT_METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "singleton_local_shards": False,
    "chained_optim_avoid_prefix": True,
}
"""The only combination of megatron-core 0.16 that loads under any TP, PP, CP and DP."""


def sharding_metadata() -> dict[str, Any]:
    """`CONTENT_METADATA` and the group whose replicas are equal."""
    from megatron.core import parallel_state

    return {
        **CONTENT_METADATA,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def name_chunks(chunks: Sequence[Any]) -> list[tuple[str, Any]]:
    """Chunks under the names that megatron-core's optimizer expects."""
    if len(chunks) == 1:
        return [("model", chunks[0])]
    return [(f"model{index}", chunk) for index, chunk in enumerate(chunks)]


def model_state(chunks: Sequence[Any]) -> dict[str, Any]:
    """Sharded weights of every chunk, and no states of modules beside them.

    Transformer Engine keeps the scales of FP8 in pickles, which `refuse_code` lets nobody load; a run that
    goes on finds them again. An empty tensor is its own way of saying that there are none.
    """
    state = {
        name: chunk.sharded_state_dict(metadata=sharding_metadata()) for name, chunk in name_chunks(chunks)
    }
    for sharded in state.values():
        for key, value in sharded.items():
            if key.endswith("_extra_state") and torch.is_tensor(value.data):
                sharded[key] = replace(value, data=torch.empty(0, dtype=torch.uint8))
    return state


def load_weights(chunks: Sequence[Any], folder: Path, *, averaged: bool = False) -> None:
    """Fill unwrapped `chunks` with a checkpoint's weights, or with its averaged weights; see
    `Checkpointer.load_weights` for adapters."""
    from megatron.core import dist_checkpointing

    from emu3_megatron.training.checkpoint_metadata import refuse_code

    refuse_code(folder)
    state = model_state(chunks)
    without_adapters = not has_adapters(Record.read(folder).config)
    if without_adapters:
        state = {
            name: {key: value for key, value in sharded.items() if ADAPTER_SUFFIX not in key}
            for name, sharded in state.items()
        }
    if averaged:
        for sharded in state.values():
            for key, value in sharded.items():
                if hasattr(value, "key") and torch.is_tensor(value.data):
                    sharded[key] = replace_data(value, f"ema.{value.key}", value.data.float())
    loaded = dist_checkpointing.load(state, str(folder))
    for name, chunk in name_chunks(chunks):
        missing, unexpected = chunk.load_state_dict(loaded[name], strict=False)
        missing = [key for key in missing if not (without_adapters and ADAPTER_SUFFIX in key)]
        if missing or unexpected:
            raise CheckpointError(f"{folder}: missing {missing[:5]}, unexpected {unexpected[:5]}")


def has_adapters(config: dict[str, Any]) -> bool:
    """Whether a run of this resolved configuration has adapters; files of before they existed do not say."""
    return bool(config.get("lora", {}).get("rank"))


def replace_data(sharded: Any, key: str, data: torch.Tensor) -> Any:
    """The same place in the global tensor, with another name and other values."""
    changes: dict[str, Any] = {"key": key, "data": data}
    if hasattr(sharded, "dtype"):
        changes["dtype"] = data.dtype
    return replace(sharded, **changes)


def load_model_for_inference(
    checkpoint: str | Path,
    parallel: ParallelConfig | None = None,
    *,
    averaged: bool | None = None,
    merge: bool = True,
    precision: Precision | None = None,
    verify: bool = True,
    backend: AttentionBackend | None = None,
) -> tuple[list[Any], ModelConfig, Vocabulary]:
    """Build the model of a checkpoint under any layout, with its weights, in evaluation mode.

    Call it after `emu3_megatron.parallel.initialize_parallel`.

    Args:
        checkpoint: A committed folder, or a run (its newest one without damage is taken).
        parallel: Layout to load into; a single process where not given.
        averaged: Take the averaged weights; where not given, they are taken if the checkpoint has them.
        merge: Add adapters (LoRA) to the weights, so that the model is a plain one.
        precision: Of the parameters; the run's where not given.
        verify: Check the checksum of every file first, as `CheckpointConfig.verify`.
        backend: Of the layers; the run's where not given. Checkpoints name weights alike for all.

    Returns:
        The chunks of this rank, the model's configuration, its vocabulary.

    Raises:
        CheckpointError: there is no checkpoint, it is damaged, or it has no averaged weights and they are
            asked for.
    """
    from emu3_megatron.model import build_model

    folder = sound_checkpoint(Path(checkpoint), checksums=verify)
    record = Record.read(folder)
    if averaged and not record.ema:
        raise CheckpointError(f"{folder} holds no averaged weights (ema.decay was 0); leave averaged out")
    parallel = parallel or ParallelConfig()
    model = ModelConfig(**record.config["model"])
    vocabulary = Vocabulary(**record.vocabulary)
    chunks = build_model(
        replace(model, attention_backend=backend or model.attention_backend),
        vocabulary_padded_size=vocabulary.padded_size,
        vocabulary_size=vocabulary.size,
        parallel=parallel,
        seed=record.config["seed"],
        precision=precision or record.config["trainer"]["precision"],
        initialize=False,
    )
    adapted = has_adapters(record.config)
    if adapted:
        from emu3_megatron.model.lora import add_adapters, merge_adapters

        for chunk in chunks:
            add_adapters(chunk, LoRAConfig(**record.config["lora"]), seed=0)
    load_weights(chunks, folder, averaged=record.ema if averaged is None else averaged)
    for chunk in chunks:
        chunk.eval()
        if adapted and merge:
            merge_adapters(chunk)
    return chunks, model, vocabulary
