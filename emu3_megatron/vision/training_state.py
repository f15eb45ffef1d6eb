"""The saved state of a vision training: one file, and the check that it belongs to the run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from emu3_megatron.files import atomic_write
from emu3_megatron.vision.training_config import VisionTrainingConfig

STATE_FILE = "training_state.pt"

FREE_TO_CHANGE = frozenset(
    {
        "output",
        "checkpoint_every",
        "log_every",
        "tensorboard",
        "sample_every",
        "data.cache_mib",
        "data.workers",
        "loss.perceptual_weights",
    }
)
"""Settings that a resumed run may have changed: they are no part of the result."""


def write_state(folder: Path, config: VisionTrainingConfig, state: Mapping[str, Any]) -> None:
    """Write `state` and the configuration, atomically."""
    with atomic_write(folder / STATE_FILE) as stream:
        torch.save({"config": asdict(config), **state}, stream)


def read_state(folder: Path, config: VisionTrainingConfig, device: torch.device) -> dict[str, Any] | None:
    """Read what `write_state` wrote; None where there is nothing.

    Raises `ValueError` where it belongs to a run of another configuration.
    """
    path = folder / STATE_FILE
    if not path.is_file():
        return None
    state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    # A state of an older version lacks newer settings, whose defaults change nothing.
    theirs = {**_flat(asdict(VisionTrainingConfig())), **_flat(state["config"])}
    ours = _flat(asdict(config))
    changed = [key for key in ours if key not in FREE_TO_CHANGE and theirs[key] != ours[key]]
    if changed:
        raise ValueError(
            f"{path} was saved with another {', '.join(changed)}: use the same configuration, another "
            "output, or delete the file"
        )
    return state


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
