"""Things in a dataset that are sound as files and yet hurt training."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from emu3_megatron.data.format import PROMPT_MODE, SPAN_MODE, TEXT_MODE
from emu3_megatron.data.reader import Kind, MultimodalDataset
from emu3_megatron.data.writer import Segment
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
    found: dict[str, _Found] = {}
    contents, names = _Distinct(), _Distinct()
    named = dataset.names()
    for first in range(0, len(dataset), 1 << 16):
        numbers = np.arange(first, min(first + (1 << 16), len(dataset)))
        if context_length is not None:
            what = f"documents with images or videos longer than a window of {context_length:,}"
            for number in _overlong(dataset, numbers, context_length):
                found.setdefault(what, _Found()).add(number)
        for number, name in zip(numbers.tolist(), named, strict=False):
            segments = dataset.document(number)
            contents.add(b"".join(ids.tobytes() + bytes([mode]) for ids, mode in segments))
            names.add(name["id"].encode())
            for what in _faults(segments, own):
                found.setdefault(what, _Found()).add(number)
    for what, distinct in (
        ("documents equal to an earlier one", contents),
        ("documents with the sample id of an earlier one", names),
    ):
        for number in distinct.repeated().tolist():
            found.setdefault(what, _Found()).add(number)
    for what, each in found.items():
        yield Finding(what, each.count, [dataset.sample_id(number) for number in each.first])


class _Found:
    """Documents that have one kind of trouble: how many, and the first of them."""

    def __init__(self) -> None:
        self.count = 0
        self.first: list[int] = []

    def add(self, number: int) -> None:
        self.count += 1
        if len(self.first) < NAMED:
            self.first.append(number)


class _Distinct:
    """Which of many contents were there before, in 16 bytes for each."""

    def __init__(self) -> None:
        self._digests = bytearray()

    def add(self, content: bytes) -> None:
        self._digests += hashlib.blake2b(content, digest_size=16).digest()

    def repeated(self) -> npt.NDArray[np.int64]:
        """Numbers of the contents equal to an earlier one, ascending."""
        left, right = np.frombuffer(self._digests, dtype=np.uint64).reshape(-1, 2).T
        order = np.lexsort((right, left))  # equal ones stay in their order
        same = (np.diff(left[order]) == 0) & (np.diff(right[order]) == 0)
        repeated: npt.NDArray[np.int64] = np.sort(order[1:][same])
        return repeated


def _overlong(dataset: MultimodalDataset, numbers: npt.NDArray[np.int64], context_length: int) -> list[int]:
    """Documents that may not be split and fit no window, with one of their captions at least."""
    long = np.zeros(len(numbers), dtype=np.bool_)
    for places, described in dataset.describe_captions(numbers):
        long[places] |= (described.length + 2 > context_length) & (described.kind != Kind.TEXT)
    found: list[int] = numbers[long].tolist()
    return found


def _faults(segments: Sequence[Segment], vocabulary: Vocabulary) -> Iterator[str]:
    """What is wrong with one document, whatever the others are."""
    modes = [mode for _, mode in segments]
    if modes and all(mode == SPAN_MODE for mode in modes):
        yield "documents without any text (no caption)"
    for ids, mode in segments:
        if PROMPT_MODE in modes and mode == TEXT_MODE and ids[-1] == vocabulary.eos:
            ids = ids[:-1]  # an answer's end, before the next question
        if len(ids) and mode != SPAN_MODE and int(ids.max()) >= vocabulary.text_size:
            yield "documents with control or vision ids in a text"
            break
