"""A dataset in another dialect: spans are read and written again, no image is encoded."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from emu3_megatron.data import Manifest, MultimodalDataset, ShardWriter, write_manifest
from emu3_megatron.data.format import SPAN_MODE
from emu3_megatron.data.writer import Segment
from emu3_megatron.errors import UserError, one_line
from emu3_megatron.grammar import Dialect
from emu3_megatron.text import TextTokenizer, load_text_tokenizer


def convert(
    folder: str | os.PathLike[str],
    target: str | os.PathLike[str],
    dialect: str,
    text_tokenizer: str | os.PathLike[str],
    progress: Callable[[str], None] | None = None,
) -> Manifest:
    """Write a dataset's documents in another dialect; texts, names, tasks and shards stay.

    Args:
        folder: The dataset.
        target: Folder of the new one; not that of the old.
        dialect: Name of the new dialect.
        text_tokenizer: The dataset's, which spells the numbers in spans.
        progress: Called with the name of each shard before it is written.

    Raises:
        UserError: another text tokenizer, the same folder, a dataset of no dialect, or a span that the new
            dialect cannot write (no videos, or no frame rate to state); names the sample.
    """
    dataset = MultimodalDataset.open(folder)
    manifest = dataset.manifest
    if Path(folder).resolve() == Path(target).resolve():
        raise UserError(f"{target}: the new dataset needs a folder of its own")
    text = _text_tokenizer_of(folder, manifest, text_tokenizer)
    old = Dialect.preset(manifest.dialect_name, manifest.vocabulary, text)
    new = Dialect.preset(dialect, manifest.vocabulary, text)
    for number, shard in enumerate(dataset.shards):
        if progress is not None:
            progress(shard.record.shard)
        with ShardWriter(
            target,
            manifest.name,
            shard=number,
            num_shards=len(dataset.shards),
            vocabulary=manifest.vocabulary,
        ) as writer:
            for document, name in enumerate(shard.names):
                try:
                    segments = _rewritten(shard.document(document), old, new)
                except ValueError as error:
                    raise UserError(f"{folder}: sample {name['id']!r}: {one_line(error)}") from error
                writer.add_document(segments, name["id"], name["task"])
    return write_manifest(
        target,
        manifest.name,
        len(dataset.shards),
        vocabulary=manifest.vocabulary,
        dialect_name=dialect,
        dialect_fingerprint=new.fingerprint,
        text_tokenizer_fingerprint=text.fingerprint,
        vision_tokenizer_fingerprint=manifest.vision_tokenizer_fingerprint,
        provenance={**manifest.provenance, "converted from dialect": manifest.dialect_name},
    )


def _text_tokenizer_of(
    folder: str | os.PathLike[str], manifest: Manifest, text_tokenizer: str | os.PathLike[str]
) -> TextTokenizer:
    """The dataset's text tokenizer; raises `UserError` where its spans could not be read with it."""
    if not manifest.dialect_name:
        raise UserError(f"{folder}: its manifest names no dialect, so that its spans cannot be read")
    text = load_text_tokenizer(text_tokenizer)
    if manifest.text_tokenizer_fingerprint not in ("", text.fingerprint):
        raise UserError(
            f"{text_tokenizer} is not the text tokenizer of {folder} ({text.fingerprint[:12]}, not "
            f"{manifest.text_tokenizer_fingerprint[:12]}): give that one"
        )
    return text


def _rewritten(segments: Iterable[Segment], old: Dialect, new: Dialect) -> list[Segment]:
    """A document's segments, spans in the new dialect."""
    return [
        (new.encode_span(old.parse_span(ids)).astype(np.int32) if mode == SPAN_MODE else ids, mode)
        for ids, mode in segments
    ]
