"""Things in a dataset that are sound as files and yet hurt training."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from emu3_megatron.data.format import PROMPT_MODE, SPAN_MODE, TEXT_MODE, crc32c
from emu3_megatron.data.reader import Kind, MultimodalDataset
from emu3_megatron.vocabulary import Vocabulary

NAMED = 10
"""Documents named for each finding."""


@dataclass(frozen=True)
class Finding:
    """One kind of trouble, and the documents that have it."""

    what: str
    count: int
    names: list[str]
    """Sample ids of the first `NAMED`."""

    def __str__(self) -> str:
        """One line."""
        more = ", ..." if self.count > len(self.names) else ""
        return f"{self.count:,} {self.what}" + (f": {', '.join(self.names)}{more}" if self.names else "")


def lint(
    folder: str | os.PathLike[str], *, context_length: int | None = None, vocabulary: Vocabulary | None = None
) -> Iterator[Finding]:
    """Read a whole dataset and yield what will hurt training, nothing where all is well.

    Args:
        folder: The dataset.
        context_length: Where given, documents that fit no window of so many tokens are found (BOS and EOS
            counted).
        vocabulary: Where given, a dataset of another vocabulary is found.

    Raises:
        UserError: the dataset is damaged.
    """
    dataset = MultimodalDataset.open(folder)
    own = dataset.vocabulary
    if vocabulary is not None and vocabulary.fingerprint != own.fingerprint:
        yield Finding(
            f"vocabulary mismatch: the dataset has {own.name!r} ({own.size:,} ids), not {vocabulary.name!r} "
            f"({vocabulary.size:,})",
            1,
            [],
        )
    trouble: dict[str, list[int]] = {}
    seen: set[tuple[int, int, int]] = set()
    names: set[str] = set()
    for first in range(0, len(dataset), 1 << 16):
        numbers = np.arange(first, min(first + (1 << 16), len(dataset)))
        if context_length is not None:
            what = f"documents with images or videos longer than a window of {context_length:,}"
            trouble.setdefault(what, []).extend(_overlong(dataset, numbers, context_length))
        for number in numbers.tolist():
            for what in _faults(dataset, number, seen, names):
                trouble.setdefault(what, []).append(number)
    for what, found in trouble.items():
        if found:
            yield Finding(what, len(found), [dataset.sample_id(number) for number in found[:NAMED]])


def _overlong(dataset: MultimodalDataset, numbers: npt.NDArray[np.int64], context_length: int) -> list[int]:
    """Documents that may not be split and fit no window, with one of their captions at least."""
    long = np.zeros(len(numbers), dtype=np.bool_)
    for places, described in dataset.describe_captions(numbers):
        long[places] |= (described.length + 2 > context_length) & (described.kind != Kind.TEXT)
    found: list[int] = numbers[long].tolist()
    return found


def _faults(
    dataset: MultimodalDataset, number: int, seen: set[tuple[int, int, int]], names: set[str]
) -> Iterator[str]:
    """What is wrong with one document; `seen` and `names` remember those before."""
    segments = dataset.document(number)
    data = b"".join(ids.tobytes() + bytes([mode]) for ids, mode in segments)
    # Read from both ends, so that documents differ in one checksum where they agree in the other.
    key = (len(data), crc32c(data), crc32c(data[::-1]))
    if key in seen:
        yield "documents equal to an earlier one"
    seen.add(key)
    name = dataset.sample_id(number)
    if name in names:
        yield "documents with the sample id of an earlier one"
    names.add(name)
    modes = [mode for _, mode in segments]
    if modes and all(mode == SPAN_MODE for mode in modes):
        yield "documents without any text (no caption)"
    vocabulary = dataset.vocabulary
    for ids, mode in segments:
        if PROMPT_MODE in modes and mode == TEXT_MODE and ids[-1] == vocabulary.eos:
            ids = ids[:-1]  # an answer's end, before the next question
        if len(ids) and mode != SPAN_MODE and int(ids.max()) >= vocabulary.text_size:
            yield "documents with control or vision ids in a text"
            break
