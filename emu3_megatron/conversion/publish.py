"""Folders that are either whole or absent."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from emu3_megatron.errors import UserError
from emu3_megatron.files import fsync_directory, temporary_path


@contextmanager
def publish_folder(target: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Fill a hidden folder beside `target`; it takes the target's name when the block ends well.

    Every file is flushed to the disk before the rename. On an exception the unfinished folder is removed and
    whatever stood at `target` stays. Raises `UserError` when `target` exists, is not empty and `overwrite` is
    not set.
    """
    final = Path(target)
    refuse_existing(final, overwrite=overwrite)
    final.parent.mkdir(parents=True, exist_ok=True)
    unfinished = temporary_path(final.absolute())
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    try:
        yield unfinished
        _flush(unfinished)
        _swap(unfinished, final.absolute())
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def refuse_existing(target: str | os.PathLike[str], *, overwrite: bool) -> None:
    """Raise `UserError` when `target` exists, is not empty and may not be replaced."""
    final = Path(target)
    if final.exists() and not overwrite and (not final.is_dir() or any(final.iterdir())):
        raise UserError(f"{final} exists; choose another folder or pass --overwrite")


def _flush(folder: Path) -> None:
    """Make every file and folder name durable."""
    for root, _, files in os.walk(folder):
        for name in files:
            with open(Path(root) / name, "rb") as stream:
                os.fsync(stream.fileno())
        fsync_directory(Path(root))


def _swap(unfinished: Path, final: Path) -> None:
    """Rename, moving an old folder out of the way first: a rename cannot replace a folder with files."""
    old = final.parent / f".{final.name}.{os.getpid()}.old.tmp"
    if final.exists():
        os.rename(final, old)
    os.rename(unfinished, final)
    fsync_directory(final.parent)
    if old.is_dir():
        shutil.rmtree(old, ignore_errors=True)
    else:
        old.unlink(missing_ok=True)
