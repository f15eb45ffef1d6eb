"""Checking and describing datasets: what `tools/dataset.py` prints."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from math import ceil, floor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from emu3_megatron.data.format import (
    ALTERNATIVE_MODE,
    DATA_SUFFIXES,
    PROMPT_MODE,
    RECORD_SUFFIX,
    SPAN_MODE,
    TEXT_MODE,
)
from emu3_megatron.data.manifest import Manifest
from emu3_megatron.data.reader import DocumentShard, Kind, MultimodalDataset
from emu3_megatron.errors import UserError, one_line
from emu3_megatron.files import sha256_file

DESCRIBED_DOCUMENTS = 1 << 20
"""Documents described at a time."""

PERCENTILES = (0, 50, 90, 99, 100)

MODE_NAMES = {
    TEXT_MODE: "text",
    SPAN_MODE: "span",
    PROMPT_MODE: "prompt",
    ALTERNATIVE_MODE: "alternative caption",
}


def verify(folder: str | os.PathLike[str], progress: Callable[[str], None] | None = None) -> list[str]:
    """Read every byte of a dataset; returns one line for each fault, naming the file. Empty means sound.

    Every shard's record and every file's SHA-256 are compared with the manifest, so that a single changed
    byte is found; then every document is read, which names the sequence that holds it, and every name.

    Args:
        folder: The dataset.
        progress: Called with the name of each shard before it is read.

    Raises:
        UserError: there is no manifest, or it is damaged: nothing else can be said then.
    """
    manifest = Manifest.load(folder)
    faults: list[str] = []
    dataset = MultimodalDataset(Path(folder), manifest)
    for shard in dataset.shards:
        if progress is not None:
            progress(shard.record.shard)
        try:
            shard.record.check_sizes(Path(folder))
        except UserError as error:
            faults.append(one_line(error))
            continue
        faults += _changed(shard)
        faults += _unreadable(shard.document(number) for number in range(len(shard)))
        faults += _unreadable(shard.names)
    return faults


def _unreadable(parts: Iterable[object]) -> Iterator[str]:
    """The fault that ends the reading of some parts, if any does."""
    try:
        for _ in parts:
            pass
    except UserError as error:
        yield one_line(error)


def _changed(shard: DocumentShard) -> Iterator[str]:
    """The files of a shard that are not those that the manifest tells of."""
    for suffix in DATA_SUFFIXES:
        digest = sha256_file(shard.path(suffix))
        if digest != shard.record.files[suffix]["sha256"]:
            yield f"{shard.path(suffix)}: SHA-256 {digest[:12]} is not the manifest's; damaged or changed"
    path, record = shard.path(RECORD_SUFFIX), shard.record
    if not path.is_file():
        yield f"{path}: missing"
    elif path.read_bytes() not in (record.file_contents(), record.file_contents(checksum=False)):
        yield f"{path}: not the manifest's record of the shard; damaged or changed"


def describe(folder: str | os.PathLike[str]) -> Iterator[str]:
    """Lines that tell what a dataset holds: counts, sizes, fingerprints, lengths, provenance."""
    dataset = MultimodalDataset.open(folder)
    manifest = dataset.manifest
    text = sum(record.text_tokens for record in manifest.shards)
    size = sum(entry["bytes"] for record in manifest.shards for entry in record.files.values())
    vocabulary = manifest.vocabulary
    yield f"dataset      {manifest.name} in {folder}"
    yield f"shards       {len(manifest.shards)} ({size:,} bytes)"
    yield f"documents    {manifest.num_documents:,}"
    yield f"tokens       {manifest.num_tokens:,} ({text:,} of text, {manifest.num_tokens - text:,} of spans)"
    yield f"vocabulary   {vocabulary.name}: {vocabulary.size:,} ids, {vocabulary.fingerprint[:16]}"
    yield f"dialect      {manifest.dialect_name or '-'} {manifest.dialect_fingerprint[:16]}".rstrip()
    yield f"text         tokenizer {manifest.text_tokenizer_fingerprint[:16] or '-'}"
    yield f"vision       tokenizer {manifest.vision_tokenizer_fingerprint[:16] or '-'}"
    yield f"fingerprint  {dataset.fingerprint}"
    yield from _describe_lengths(dataset)
    for key, value in manifest.provenance.items():
        yield f"provenance   {key}: {value}"


def _describe_lengths(dataset: MultimodalDataset) -> Iterator[str]:
    lengths = {kind: Counted() for kind in Kind}
    captions = Counted()
    for first in range(0, len(dataset), DESCRIBED_DOCUMENTS):
        part = dataset.describe(np.arange(first, min(first + DESCRIBED_DOCUMENTS, len(dataset))))
        for kind, counted in lengths.items():
            counted.add(part.length[part.kind == kind])
        captions.add(part.captions[part.captions > 1])
    for kind, label in ((Kind.TEXT, "text only"), (Kind.PAIR, "caption + span"), (Kind.OTHER, "other")):
        counted = lengths[kind]
        if len(counted):
            values = ", ".join(f"p{each} {int(counted.percentile(each)):,}" for each in PERCENTILES)
            yield f"{label:12} {len(counted):,} documents, tokens each: {values}"
    if len(captions):
        least, most = captions.percentile(0), captions.percentile(100)
        yield (
            f"captions     {len(captions):,} documents have {least:.0f} to {most:.0f} to choose from, "
            f"{captions.mean:.1f} on average; their tokens above are with the first"
        )


class Counted:
    """How often each value occurs among many integers, of which none is kept."""

    def __init__(self) -> None:
        self._values = np.zeros(0, dtype=np.int64)
        self._counts = np.zeros(0, dtype=np.int64)

    def __len__(self) -> int:
        return int(self._counts.sum())

    def add(self, values: npt.NDArray[np.integer[Any]]) -> None:
        """Count more of them, ``[N]``."""
        new, counts = np.unique(values.astype(np.int64), return_counts=True)
        self._values, places = np.unique(np.concatenate([self._values, new]), return_inverse=True)
        total = np.zeros(len(self._values), dtype=np.int64)
        np.add.at(total, places, np.concatenate([self._counts, counts]))
        self._counts = total

    @property
    def mean(self) -> float:
        """Of all values; at least one must have been counted."""
        return float(self._values @ self._counts) / len(self)

    def percentile(self, percent: float) -> float:
        """As `numpy.percentile` of all values; at least one must have been counted."""
        stops = np.cumsum(self._counts)
        place = percent / 100 * (len(self) - 1)
        low, high = (
            self._values[np.searchsorted(stops, at, side="right")] for at in (floor(place), ceil(place))
        )
        return float(low + (high - low) * (place - floor(place)))


def show(folder: str | os.PathLike[str], which: str, limit: int = 16) -> Iterator[str]:
    """Lines that show one document: its name and its segments.

    Args:
        folder: The dataset.
        which: A document's number or its sample id.
        limit: Ids printed of each end of a long segment.

    Raises:
        UserError: there is no such document.
    """
    dataset = MultimodalDataset.open(folder)
    number = _find(dataset, which)
    name: dict[str, Any] = dataset.name(number)
    task = f", task {name['task']}" if name["task"] else ""
    yield f"document {number}: sample {name['id']}{task}"
    for place, (ids, mode) in enumerate(dataset.document(number)):
        kind, values = MODE_NAMES.get(mode, "text"), ids.tolist()
        if len(values) > 2 * limit:
            values = [*values[:limit], "...", *values[-limit:]]
        yield f"  segment {place}: {kind}, {len(ids)} tokens: {' '.join(map(str, values))}"


def _find(dataset: MultimodalDataset, which: str) -> int:
    if which.isdecimal() and int(which) < len(dataset):
        return int(which)
    for number, _ in dataset.find({which}):
        return number
    raise UserError(
        f"{dataset.folder}: no document {which!r}; give a number from 0 to {len(dataset) - 1} or a sample id"
    )
