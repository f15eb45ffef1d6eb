"""Takedown lists: samples that are named in a file, and never drawn."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from emu3_megatron.data.kept import keep_arrays, read_arrays
from emu3_megatron.data.manifest import canonical_sha256
from emu3_megatron.data.permutation import Integers
from emu3_megatron.data.reader import MultimodalDataset
from emu3_megatron.errors import UserError
from emu3_megatron.files import sha256_file

TAKEDOWN_VERSION = 1
"""Raised whenever the same list would name other documents."""

UNKNOWN_NAMED = 3
"""Ids that no dataset has, named in a report."""

KEPT = ("numbers", "starts", "fingerprints", "counts", "unknown")
"""Arrays in which an answer is kept."""

SLICE = 1 << 20
"""Documents whose bits are set at a time; a multiple of 8."""


class TakenDown:
    """The documents of one dataset that are never drawn.

    Args:
        numbers: Theirs, ascending, ``[N]``.
        size: Documents of the dataset.
        fingerprint: `fingerprint`, where it is known.
    """

    def __init__(self, numbers: Integers, size: int, fingerprint: str | None = None) -> None:
        self.numbers = numbers
        if fingerprint is None:
            fingerprint = canonical_sha256(numbers.tolist()) if len(numbers) else ""
        self.fingerprint = fingerprint
        """SHA-256 (hex) of the numbers; empty for none."""
        # A bit a document, of which the system backs only pages that hold one: a search among the numbers
        # takes ten times as long where a list names millions.
        self._bits = np.zeros(size // 8 + 1, dtype=np.uint8)
        borders = np.searchsorted(numbers, np.arange(0, size + SLICE, SLICE))
        for part in np.flatnonzero(np.diff(borders)).tolist():
            gone = np.zeros(SLICE, dtype=np.bool_)
            gone[numbers[borders[part] : borders[part + 1]] - part * SLICE] = True
            bits = self._bits[part * SLICE // 8 : (part + 1) * SLICE // 8]
            bits[:] = np.packbits(gone, bitorder="little")[: len(bits)]

    def __len__(self) -> int:
        return len(self.numbers)

    def remain(self, documents: Integers) -> npt.NDArray[np.bool_]:
        """Which of these documents are not taken down, ``[M]``."""
        remaining: npt.NDArray[np.bool_] = (self._bits[documents >> 3] & _bit(documents)) == 0
        return remaining


def _bit(numbers: Integers) -> npt.NDArray[np.uint8]:
    return np.left_shift(1, numbers & 7).astype(np.uint8)


@dataclass(frozen=True, kw_only=True)
class Takedown:
    """What a takedown list means for some datasets."""

    path: Path
    """The list."""
    taken_down: tuple[TakenDown, ...]
    """By dataset."""
    listed: int
    """Different ids on the list."""
    found: int
    """Of these, ids that a dataset has."""
    unknown: tuple[str, ...]
    """The first of the others, in the order of the list; `UNKNOWN_NAMED` at most."""

    def __str__(self) -> str:
        """One line."""
        documents = sum(map(len, self.taken_down))
        text = (
            f"takedown list {self.path}: {self.found:,} of {self.listed:,} ids found, {documents:,} documents"
        )
        more = ", ..." if self.listed - self.found > len(self.unknown) else ""
        return text + (f"; no source has {', '.join(self.unknown)}{more}" if self.unknown else "")


def read_takedown(path: str | os.PathLike[str]) -> Iterator[str]:
    """Sample ids of a takedown list: UTF-8, one a line; empty lines and ``#`` lines count for nothing.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        # Editors of some systems begin a file with a byte order mark, which is no part of the first id.
        with open(path, encoding="utf-8-sig") as stream:
            for line in (part for whole in stream for part in whole.splitlines()):
                if line.strip() and not line.startswith("#"):
                    yield line.strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"takedown list {path}: cannot be read ({error}); give a text file of sample ids"
        ) from error


def take_down(
    path: str | os.PathLike[str],
    datasets: Sequence[MultimodalDataset],
    cache: str | os.PathLike[str] | None = None,
) -> Takedown:
    """Find the documents that a list names.

    Reads the names of all documents, unless the answer is in the folder `cache`, where it is kept under the
    list's checksum and the datasets' fingerprints.

    Raises:
        UserError: the list cannot be read, or the names of a dataset are damaged; names the file.
    """
    try:
        digest = sha256_file(path)
    except OSError as error:
        raise UserError(
            f"takedown list {path}: cannot be read ({error}); give a text file of sample ids"
        ) from error
    question = [TAKEDOWN_VERSION, digest, [dataset.fingerprint for dataset in datasets]]
    kept = None if cache is None else Path(cache) / f"takedown-{canonical_sha256(question)[:32]}.npz"
    arrays = None if kept is None else read_arrays(kept, KEPT)
    if arrays is None:
        arrays = _find(path, datasets)
        if kept is not None:
            keep_arrays(kept, arrays)
    numbers = np.split(arrays["numbers"], arrays["starts"][1:-1])
    fingerprints = arrays["fingerprints"].tolist()
    listed, found = arrays["counts"].tolist()
    return Takedown(
        path=Path(path),
        taken_down=tuple(
            TakenDown(mine, len(dataset), fingerprint)
            for mine, dataset, fingerprint in zip(numbers, datasets, fingerprints, strict=True)
        ),
        listed=listed,
        found=found,
        unknown=tuple(arrays["unknown"].tolist()),
    )


def _find(
    path: str | os.PathLike[str], datasets: Sequence[MultimodalDataset]
) -> dict[str, npt.NDArray[np.generic]]:
    """The answer of `take_down` as arrays."""
    seen = dict.fromkeys(read_takedown(path), False)
    taken_down = []
    for dataset in datasets:
        numbers = []
        for number, name in dataset.find(seen) if seen else ():
            numbers.append(number)
            seen[name] = True
        taken_down.append(TakenDown(np.array(numbers, dtype=np.int64), len(dataset)))
    unknown = [name for name, found in seen.items() if not found]
    return {
        "numbers": np.concatenate([each.numbers for each in taken_down]),
        "starts": np.cumsum([0, *map(len, taken_down)]),
        "fingerprints": np.array([each.fingerprint for each in taken_down], dtype="U64"),
        "counts": np.array([len(seen), len(seen) - len(unknown)]),
        "unknown": np.array(unknown[:UNKNOWN_NAMED], dtype=np.str_),
    }
