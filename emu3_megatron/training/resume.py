"""Whether a checkpoint belongs to this run: same model, same vocabulary, same order of data."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from emu3_megatron.model import ModelConfig
from emu3_megatron.training.checkpoint import Record
from emu3_megatron.training.checkpoint_files import CheckpointError
from emu3_megatron.training.modules import is_rank_zero

logger = logging.getLogger(__name__)

FREE_MODEL_FIELDS = (
    "embedding_dropout",
    "attention_dropout",
    "hidden_dropout",
    "init_method_std",
    "scaled_output_init",
    "attention_backend",
    "recompute",
    "max_position_embeddings",
)
"""Fields of the model that may change between a checkpoint and the run that loads it: no tensor depends on
them."""

START_FIELDS = ("rotary_base",)
"""Fields that a new run may change besides, for no tensor depends on them either: it learns on with another
meaning of positions, as with a larger base for longer windows. In the middle of a run they stay."""


def differences(old: Any, new: Any, name: str = "") -> list[str]:
    """Leaves that differ between two nested values, as ``name: old -> new``; names are dotted."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in sorted(old.keys() | new.keys(), key=str):
            inner = f"{name}.{key}" if name else str(key)
            found += differences(old.get(key), new.get(key), inner)
        return found
    return [] if old == new else [f"{name}: {old!r} -> {new!r}"]


def check_start(folder: Path, old: Record, new: Record) -> None:
    """Refuse a checkpoint whose weights a new run cannot start from, and say what it changes of the model.

    Raises:
        CheckpointError: it has another shape or vocabulary; names every field that differs.
    """
    check_weights_fit(folder, old, new, may_change=START_FIELDS)
    before, after = ({name: _shape(record)[name] for name in START_FIELDS} for record in (old, new))
    if (changed := differences(before, after, "model")) and is_rank_zero():
        logger.warning("starting from %s with another %s", folder, "; ".join(changed))


def check_weights_fit(folder: Path, old: Record, new: Record, *, may_change: Sequence[str] = ()) -> None:
    """Refuse a checkpoint of another shape or vocabulary.

    Args:
        folder: The checkpoint, for messages.
        old: Its record.
        new: What this run would write.
        may_change: Fields of the model besides `FREE_MODEL_FIELDS` that may differ.

    Raises:
        CheckpointError: naming every field that differs.
    """
    if changed := differences(old.vocabulary, new.vocabulary, "vocabulary"):
        raise CheckpointError(
            f"{folder} was trained with another vocabulary ({'; '.join(changed)}); use its datasets"
        )
    before, after = (
        {name: value for name, value in _shape(record).items() if name not in may_change}
        for record in (old, new)
    )
    if changed := differences(before, after, "model"):
        rest = "" if may_change else ", or use a new `run`"
        raise CheckpointError(f"{folder} holds another model ({'; '.join(changed)}); set these back{rest}")
    if old.config.get("lora", {}).get("rank") and (
        changed := differences(_adapters(old), _adapters(new), "lora")
    ):
        raise CheckpointError(
            f"{folder} holds other adapters ({'; '.join(changed)}); set these back, or merge them into its "
            f"weights first (tools/lora.py merge)"
        )


def _adapters(record: Record) -> dict[str, Any]:
    return {name: record.config["lora"][name] for name in ("rank", "alpha", "targets")}


def _shape(record: Record) -> dict[str, Any]:
    # Fields that came after a checkpoint was written have their defaults in it.
    model = asdict(ModelConfig(**record.config["model"]))
    return {key: value for key, value in model.items() if key not in FREE_MODEL_FIELDS}


def check_resumable(folder: Path, old: Record, new: Record, *, accept_changed_data: bool) -> None:
    """Refuse to go on from a checkpoint whose run was a different one.

    Args:
        folder: The checkpoint, for messages.
        old: Its record.
        new: What this run would write.
        accept_changed_data: Go on although the plan changed, with a warning.

    Raises:
        CheckpointError: another model, vocabulary, precision, optimizer, or (unless accepted) another plan.
    """
    check_weights_fit(folder, old, new)
    if (new.config["lora"]["rank"] > 0) != bool(old.config.get("lora", {}).get("rank")):
        raise CheckpointError(
            f"{folder}: adapters (lora.rank) cannot be switched on or off in the middle of a run; start a "
            f"new `run` with checkpoint.load={folder}"
        )
    before, now = (record.config["trainer"]["precision"] for record in (old, new))
    if before != now:
        raise CheckpointError(
            f"{folder} was trained with trainer.precision={before}, this run has {now}; set it back, or "
            f"start a new `run` with checkpoint.load={folder}"
        )
    # Files of before there was a choice do not say.
    before, now = (record.config["optimizer"].get("kind", "adam") for record in (old, new))
    if before != now:
        raise CheckpointError(
            f"{folder} was trained with optimizer.kind={before}, this run has {now}; set it back, or "
            f"start a new `run` with checkpoint.load={folder}"
        )
    if old.plan_fingerprint == new.plan_fingerprint:
        return
    changed = "; ".join(differences(old.plan, new.plan, "data")) or "the planner itself, by another version"
    if not accept_changed_data:
        raise CheckpointError(
            f"{folder}: the order of the data changed ({changed}); put it back, or go on with other data by "
            f"checkpoint.accept_changed_data=true"
        )
    if is_rank_zero():
        logger.warning("resuming with changed data from window %d on: %s", old.progress.windows, changed)
