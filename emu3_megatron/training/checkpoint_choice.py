"""Which checkpoint is taken: the one that was named, or the newest of a run, and never a damaged one.

torch and megatron-core read tensors without looking at any checksum, so whoever loads a checkpoint chooses it
here first. Looking costs one more reading of all its files, which the ranks share; a process does it once for
each checkpoint.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from emu3_megatron.training import checkpoint_files as files
from emu3_megatron.training.checkpoint_files import CheckpointError

logger = logging.getLogger(__name__)

_Known = tuple[int, int, tuple[tuple[str, int, int, int], ...]]
"""Rank and number of ranks; path, size, inode and time of change of every file of a checkpoint."""

_sound: set[_Known] = set()
"""Shares of checkpoints that this process has read and found sound. A run often starts from the checkpoint
that is its reference too."""


def newest_valid(checkpoints: Path, *, checksums: bool) -> Path | None:
    """The newest committed checkpoint of a folder without damage; damaged ones are reported and passed over.

    All ranks call it together; each checks a share of the files.

    Args:
        checkpoints: RUN/checkpoints.
        checksums: Read every byte; otherwise only sizes are compared.

    Returns:
        The folder; None where there is no committed checkpoint.

    Raises:
        CheckpointError: every committed checkpoint is damaged.
    """
    folders = _agreed(files.committed_folders(checkpoints))
    return _newest(folders, checkpoints, checksums=checksums) if folders else None


def sound_checkpoint(path: Path, *, checksums: bool = True) -> Path:
    """The committed checkpoint that `path` means, without damage: itself, or the newest such of a run.

    All ranks call it together; each checks a share of the files.

    Args:
        path: A committed folder, a run, or a run's `checkpoints`.
        checksums: As in `newest_valid`.

    Raises:
        CheckpointError: there is none, the one that was named is damaged, or every one of the run is.
    """
    folders = _agreed(files.candidates(path))
    if not folders:
        raise files.nothing_committed(path)
    return _newest(folders, path, checksums=checksums)


def _agreed(folders: list[Path]) -> list[Path]:
    """What rank 0 sees: on a network file system another rank may see less for a while."""
    listed: list[Any] = [folders]
    torch.distributed.broadcast_object_list(listed)
    return list(listed[0])


def _newest(folders: list[Path], path: Path, *, checksums: bool) -> Path:
    """The last of `folders` without damage; they are what `path` means."""
    for folder in reversed(folders):
        problems = _damage(folder, checksums=checksums)
        if not problems:
            return folder
        listed = "; ".join(problems)
        if folder == path:
            raise CheckpointError(
                f"{folder} is damaged: {listed}; restore it from a copy, or take an earlier one"
            )
        if torch.distributed.get_rank() == 0:
            logger.error("checkpoint %s is damaged and passed over: %s", folder.name, listed)
    raise CheckpointError(f"every checkpoint in {path} is damaged; see above, and restore one from a copy")


def _damage(folder: Path, *, checksums: bool) -> list[str]:
    """What is wrong with a checkpoint, the same on all ranks."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    known = (rank, world, _state(folder))
    own: list[str] = []
    if known not in _sound:
        own = list(files.damage(folder, checksums=checksums, part=slice(rank, None, world)))
        if checksums and not own:
            _sound.add(known)
    found: list[Any] = [None] * world
    torch.distributed.all_gather_object(found, own)
    return [problem for part in found for problem in part]


def _state(folder: Path) -> tuple[tuple[str, int, int, int], ...]:
    """What changes when a file of a checkpoint is written anew."""
    described = ((path, path.stat()) for path in [*files.payload(folder), folder / files.COMMIT])
    return tuple((str(path), stat.st_size, stat.st_ino, stat.st_mtime_ns) for path, stat in described)
