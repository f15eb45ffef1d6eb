"""Looking at checkpoints without building a model: what one is, whether it is sound, how two differ.

Tensors are read one at a time by the names in the checkpoint, so nothing here depends on the layout it was
saved under, and memory is bounded by the largest tensor.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from emu3_megatron.training import checkpoint_files as files
from emu3_megatron.training.checkpoint import Record
from emu3_megatron.training.checkpoint_files import CheckpointError
from emu3_megatron.training.checkpoint_metadata import read_metadata
from emu3_megatron.training.resume import differences

OPTIMIZER_PREFIX = "optimizer."
AVERAGE_PREFIX = "ema."


class Tensors:
    """The tensors of a checkpoint folder, by name.

    Raises:
        CheckpointError: the folder's description of its tensors cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        metadata = read_metadata(folder)
        self.described: dict[str, TensorStorageMetadata] = {
            name: value
            for name, value in metadata.state_dict_metadata.items()
            if isinstance(value, TensorStorageMetadata)
        }
        """Name -> size and type."""

    def read(self, name: str) -> torch.Tensor:
        """One whole tensor."""
        described = self.described[name]
        target = {name: torch.empty(described.size, dtype=described.properties.dtype)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that a single process is what is meant
            load(target, checkpoint_id=self._folder, no_dist=True)
        return target[name]


def describe(path: str | Path) -> list[str]:
    """Lines about a checkpoint, or the newest of a run.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    folder = files.resolve(Path(path))
    record, tensors = Record.read(folder), Tensors(folder)
    count = {"weights": 0, "optimizer": 0, "averages": 0}
    for name, described in tensors.described.items():
        part = "optimizer" if name.startswith(OPTIMIZER_PREFIX) else "weights"
        part = "averages" if name.startswith(AVERAGE_PREFIX) else part
        count[part] += math.prod(described.size)
    size = sum(entry["bytes"] for entry in _commit(folder).values())
    progress, config = record.progress, record.config
    shape = {key: value for key, value in config["model"].items() if value is not None}
    lines = [
        f"checkpoint   {folder}",
        f"progress     step {progress.step:,}, windows {progress.windows:,}, updates {progress.updates:,}, "
        f"skipped {progress.skipped:,}",
        f"precision    {config['trainer']['precision']}",
        f"vocabulary   {record.vocabulary['name']}",
        f"plan         {record.plan_fingerprint[:16] or 'none'}",
        f"numbers      {count['weights']:,} weights, {count['optimizer']:,} of the optimizer, "
        f"{count['averages']:,} averaged",
        f"files        {len(_commit(folder))}, {size:,} bytes",
        f"model        {', '.join(f'{key}={value}' for key, value in shape.items())}",
    ]
    if layout := config.get("parallel"):
        degrees = ", ".join(f"{key}={value}" for key, value in layout.items() if value not in (None, False))
        lines.append(f"saved under  {degrees}")
    return lines


def verify(path: str | Path) -> list[str]:
    """Read every byte of a checkpoint, or of all committed ones of a run; one line for each fault.

    Raises:
        CheckpointError: there is no committed checkpoint.
    """
    path = Path(path)
    newest = files.resolve(path)
    folders = [newest] if newest == path else files.committed_folders(newest.parent)
    return [problem for folder in folders for problem in files.damage(folder, checksums=True)]


def compare(first: str | Path, second: str | Path) -> Iterator[str]:
    """Lines about what differs between two checkpoints: records, then tensors. None where all is equal.

    Raises:
        CheckpointError: one of them is missing or cannot be read.
    """
    folders = [files.resolve(Path(path)) for path in (first, second)]
    records = [Record.read(folder) for folder in folders]
    for part in ("progress", "vocabulary", "plan", "config"):
        one, two = (getattr(record, part) for record in records)
        if part == "progress":
            one, two = vars(one), vars(two)
        yield from differences(one, two, part)
    tensors = [Tensors(folder) for folder in folders]
    for name in sorted(tensors[0].described.keys() | tensors[1].described.keys()):
        if difference := _difference(name, *tensors):
            yield f"{name}: {difference}"


def _difference(name: str, first: Tensors, second: Tensors) -> str | None:
    """How one tensor differs, in words; None where it is equal bit by bit."""
    for tensors, other in ((first, "second"), (second, "first")):
        if name not in tensors.described:
            return f"only in the {other}"
    one, two = first.read(name), second.read(name)
    if one.shape != two.shape or one.dtype != two.dtype:
        return f"{list(one.shape)} {one.dtype} -> {list(two.shape)} {two.dtype}"
    if torch.equal(one.contiguous().view(torch.uint8), two.contiguous().view(torch.uint8)):
        return None
    gap = (two.double() - one.double()).abs()
    scale = one.double().norm().clamp_min(1e-300)
    return f"differs by at most {gap.max():.3g}, relative norm {gap.norm() / scale:.3g}"


def _commit(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / files.COMMIT).read_text())["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / files.COMMIT}: not readable ({error})") from error
