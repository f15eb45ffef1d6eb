"""Checking and describing datasets: what `tools/dataset.py` prints."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from emu3_megatron.data.format import (
    ALTERNATIVE_MODE,
    DATA_SUFFIXES,
    PROMPT_MODE,
    RECORD_SUFFIX,
    SPAN_MODE,
    TEXT_MODE,
)
from emu3_megatron.data.manifest import Manifest
from emu3_megatron.data.reader import Kind, MultimodalDataset
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

    Every file's SHA-256 is compared with the manifest, so that a single changed byte is found; then every
    document is read, which names the sequence that holds it.

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
        for suffix in DATA_SUFFIXES:
            digest = sha256_file(shard.path(suffix))
            if digest != shard.record.files[suffix]["sha256"]:
                faults.append(
                    f"{shard.path(suffix)}: SHA-256 {digest[:12]} is not the manifest's; damaged or changed"
                )
        if not shard.path(RECORD_SUFFIX).is_file():
            faults.append(f"{shard.path(RECORD_SUFFIX)}: missing")
        try:
            for number in range(len(shard)):
                shard.document(number)
                shard.name(number)
        except UserError as error:
            faults.append(one_line(error))
    return faults


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
    if len(dataset) == 0:
        return
    parts = [
        dataset.describe(np.arange(first, min(first + DESCRIBED_DOCUMENTS, len(dataset))))
        for first in range(0, len(dataset), DESCRIBED_DOCUMENTS)
    ]
    length = np.concatenate([part.length for part in parts])
    kind = np.concatenate([part.kind for part in parts])
    captions = np.concatenate([part.captions for part in parts])
    for number, label in ((Kind.TEXT, "text only"), (Kind.PAIR, "caption + span"), (Kind.OTHER, "other")):
        chosen = length[kind == number]
        if len(chosen):
            values = ", ".join(f"p{each} {int(np.percentile(chosen, each)):,}" for each in PERCENTILES)
            yield f"{label:12} {len(chosen):,} documents, tokens each: {values}"
    several = captions[captions > 1]
    if len(several):
        yield (
            f"captions     {len(several):,} documents have {several.min()} to {several.max()} to choose "
            f"from, {several.mean():.1f} on average; their tokens above are with the first"
        )


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
    for number in range(len(dataset)):
        if dataset.sample_id(number) == which:
            return number
    raise UserError(
        f"{dataset.folder}: no document {which!r}; give a number from 0 to {len(dataset) - 1} or a sample id"
    )
