"""Folders that are either whole or absent."""

from __future__ import annotations

import fcntl
import glob
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from emu3_megatron.conversion.processes import on_first, rank, together
from emu3_megatron.errors import UserError
from emu3_megatron.files import TEMPORARY_SUFFIX, fsync_directory, temporary_path

_MOVED = ".old"
"""Last part of the name of a folder while another takes its place."""


@contextmanager
def publish_folder(target: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Fill a hidden folder beside `target`; it takes the target's name when the block ends well.

    All processes of a conversion enter it together and fill the same folder. Every file is flushed to the
    disk before the rename. On an exception the unfinished folder is removed and whatever stood at `target`
    stays. What a killed process left is removed, and what it had moved out of the way is put back, by the
    next one that writes to the same `target`. Raises `UserError` when `target` exists, is not empty and
    `overwrite` is not set.
    """
    final = Path(target).absolute()
    lock = -1

    def prepare() -> Path:
        nonlocal lock
        _put_back(final)
        refuse_existing(target, overwrite=overwrite)
        final.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(final)
        unfinished = temporary_path(final)
        unfinished.mkdir()
        lock = os.open(unfinished, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return unfinished

    unfinished = on_first(prepare)
    try:
        yield unfinished
        together(lambda: None)  # no process may still be writing
        on_first(lambda: _finish(unfinished, final))
    except BaseException:
        if rank() == 0:
            shutil.rmtree(unfinished, ignore_errors=True)
        raise
    finally:
        if lock >= 0:
            os.close(lock)


def refuse_existing(target: str | os.PathLike[str], *, overwrite: bool) -> None:
    """Raise `UserError` when `target` exists, is not empty and may not be replaced."""
    final = Path(target)
    if final.exists() and not overwrite and (not final.is_dir() or any(final.iterdir())):
        raise UserError(f"{final} exists; choose another folder or pass --overwrite")


def _put_back(final: Path) -> None:
    """Undo half a `_swap`: what a killed process moved away returns, or goes if the new one is in place."""
    for old in final.parent.glob(f".{glob.escape(final.name)}.*{_MOVED}"):
        if not final.exists():
            os.rename(old, final)
        elif old.is_dir():
            shutil.rmtree(old, ignore_errors=True)


def _remove_abandoned(final: Path) -> None:
    """Delete what was left by processes that were killed: an unfinished folder whose lock nobody holds."""
    for folder in final.parent.glob(f".{glob.escape(final.name)}.*{TEMPORARY_SUFFIX}"):
        if not folder.is_dir():
            continue
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        except BlockingIOError:
            pass  # its process is at work
        finally:
            os.close(descriptor)


def _finish(unfinished: Path, final: Path) -> None:
    """Make every file and folder name durable, then give the folder its name."""
    for root, _, files in os.walk(unfinished):
        for name in files:
            with open(Path(root) / name, "rb") as stream:
                os.fsync(stream.fileno())
        fsync_directory(Path(root))
    _swap(unfinished, final)


def _swap(unfinished: Path, final: Path) -> None:
    """Rename, moving an old folder out of the way first: a rename cannot replace a folder with files.

    The old folder goes back where it was when the new one cannot take its place.
    """
    old = final.parent / f".{final.name}.{os.getpid()}{_MOVED}"
    if final.exists():
        os.rename(final, old)
    try:
        os.rename(unfinished, final)
    except BaseException:
        if old.exists():
            os.rename(old, final)
        raise
    fsync_directory(final.parent)
    if old.is_dir():
        shutil.rmtree(old, ignore_errors=True)
    else:
        old.unlink(missing_ok=True)
