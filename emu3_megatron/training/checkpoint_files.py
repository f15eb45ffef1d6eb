"""Checkpoints as folders: names, the commit marker, integrity, retention. Knows nothing of what is inside.

::

    RUN/checkpoints/step-00000100/    torch_dist files of megatron-core
                      emu3.json       what the run was: see `checkpoint`
                      COMMIT          written last: size and CRC-32C of every other file
    RUN/checkpoints/latest            name of the newest committed folder, written after its COMMIT

A folder without COMMIT is the rest of a save that was interrupted; it is never read, and the next save
removes it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import google_crc32c

from emu3_megatron.errors import UserError
from emu3_megatron.files import atomic_write, fsync_directory, write_json_atomic

COMMIT = "COMMIT"
LATEST = "latest"
RECORD = "emu3.json"
READ_BYTES = 1 << 22

_STEP_FOLDER = re.compile(r"step-(\d{8,})")


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, or does not fit; the message names the file and the remedy."""


def step_folder(checkpoints: Path, step: int) -> Path:
    """``checkpoints/step-00000100``."""
    return checkpoints / f"step-{step:08d}"


def committed_folders(checkpoints: Path) -> list[Path]:
    """Complete checkpoints, oldest first; empty where `checkpoints` does not exist."""
    return [folder for folder in _step_folders(checkpoints) if (folder / COMMIT).is_file()]


def _step_folders(checkpoints: Path) -> list[Path]:
    if not checkpoints.is_dir():
        return []
    steps = [
        (int(match[1]), path)
        for path in checkpoints.iterdir()
        if (match := _STEP_FOLDER.fullmatch(path.name)) and path.is_dir()
    ]
    return [path for _, path in sorted(steps)]


def candidates(path: Path) -> list[Path]:
    """The committed checkpoints that `path` may mean, oldest first: itself alone, or those of a run or of its
    `checkpoints` folder; empty where there is none."""
    if (path / COMMIT).is_file():
        return [path]
    return committed_folders(path) or committed_folders(path / "checkpoints")


def nothing_committed(path: Path) -> CheckpointError:
    """The error of a path without `candidates`."""
    return CheckpointError(
        f"{path} holds no committed checkpoint: expected a file {COMMIT} in it, or step-* "
        f"folders that have one"
    )


def resolve(path: Path) -> Path:
    """The last of `candidates`, damaged or not; who loads it takes `checkpoint_choice` instead.

    Raises:
        CheckpointError: there is none.
    """
    if not (found := candidates(path)):
        raise nothing_committed(path)
    return found[-1]


def payload(folder: Path) -> list[Path]:
    """Every file that COMMIT vouches for, in a fixed order."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != COMMIT)


def checksum(path: Path) -> str:
    """CRC-32C of a file, eight hexadecimal digits; reads in bounded memory."""
    value = 0
    with open(path, "rb") as stream:
        while block := stream.read(READ_BYTES):
            value = google_crc32c.extend(value, block)
    return f"{value:08x}"


def seal(folder: Path, files: Iterable[Path]) -> dict[str, dict[str, int | str]]:
    """Flush `files` to disk and describe them: name in `folder` -> size and checksum."""
    sealed: dict[str, dict[str, int | str]] = {}
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        sealed[str(path.relative_to(folder))] = {"bytes": path.stat().st_size, "crc32c": checksum(path)}
    return sealed


def commit(folder: Path, sealed: dict[str, dict[str, int | str]], step: int) -> None:
    """Declare `folder` complete, then point `latest` at it. Every file must be sealed before."""
    fsync_directory(folder)
    write_json_atomic(folder / COMMIT, {"step": step, "files": sealed})
    with atomic_write(folder.parent / LATEST) as stream:
        stream.write(f"{folder.name}\n".encode())


def sealed_files(folder: Path) -> dict[str, dict[str, int | str]]:
    """Size and checksum of every file of a committed folder, by name.

    Raises `CheckpointError` when COMMIT cannot be read.
    """
    try:
        files: dict[str, dict[str, int | str]] = json.loads((folder / COMMIT).read_text())["files"]
        return dict(files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder / COMMIT}: not readable as JSON with `files`") from error


def damage(folder: Path, *, checksums: bool, part: slice = slice(None)) -> Iterator[str]:
    """Yield a description of every file of a committed folder that is not as it was written.

    Args:
        folder: A committed checkpoint.
        checksums: Read every byte; otherwise only sizes are compared.
        part: Share of the files to check, for ranks that divide the work.
    """
    try:
        files = sealed_files(folder)
    except CheckpointError as error:
        yield str(error)
        return
    for name, written in sorted(files.items())[part]:
        if problem := file_damage(folder / name, written, checksums=checksums):
            yield problem


def file_damage(path: Path, written: dict[str, int | str], *, checksums: bool) -> str | None:
    """How a file differs from what COMMIT says of it, in words; None where it does not."""
    if not path.is_file():
        return f"{path}: missing"
    if path.stat().st_size != written["bytes"]:
        return f"{path}: {path.stat().st_size} bytes, written with {written['bytes']}"
    if checksums and (found := checksum(path)) != written["crc32c"]:
        return f"{path}: CRC-32C {found}, written with {written['crc32c']}"
    return None


def prune(checkpoints: Path, keep: int) -> None:
    """Remove what is not needed: interrupted saves, and all but the newest `keep` committed folders.

    Call it while no save is under way.
    """
    committed = committed_folders(checkpoints)
    for folder in _step_folders(checkpoints):
        if folder not in committed[-keep:]:
            remove(folder)


def remove(folder: Path) -> None:
    """Delete a checkpoint; it stops being one before its first file goes."""
    (folder / COMMIT).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
