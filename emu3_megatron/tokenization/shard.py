"""Making one shard: entries in, documents out, with a report of what was set aside."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field

import numpy as np
import numpy.typing as npt

from emu3_megatron.data import ShardWriter
from emu3_megatron.data.format import ALTERNATIVE_MODE, SPAN_MODE, TEXT_MODE
from emu3_megatron.errors import UserError
from emu3_megatron.grammar import Dialect, Image, Video
from emu3_megatron.tokenization.decode import Sample, SampleDecoder
from emu3_megatron.tokenization.encode import BucketEncoder, Codes
from emu3_megatron.tokenization.entries import BadEntry, Entry


@dataclass(kw_only=True)
class ShardReport:
    """What became of a shard's entries; kept as JSON beside the shards."""

    entries: int = 0
    """Entries of the asked split, bad ones included."""
    other_splits: int = 0
    """Entries left out for their split."""
    images: int = 0
    """Images written."""
    clips: int = 0
    """Clips written."""
    frames: int = 0
    """Frames of these clips."""
    texts: int = 0
    """Text documents written."""
    tokens: int = 0
    """Tokens written."""
    quarantine: list[dict[str, str | None]] = field(default_factory=list)
    """What was set aside: id, path, reason, error."""

    def set_aside(self, bad: BadEntry) -> None:
        """Add an entry to the quarantine list."""
        self.quarantine.append({key: value for key, value in asdict(bad).items() if key != "split"})


class ShardMaker:
    """Turns a shard's entries into documents.

    Args:
        dialect: writes captions and spans as ids.
        decoder: entries to pixels.
        encoder: pixels to codes; None where there is no vision tokenizer.
        split: take only entries of this split.
        on_entry: called after each entry, for a progress bar.
    """

    def __init__(
        self,
        dialect: Dialect,
        decoder: SampleDecoder,
        encoder: BucketEncoder | None,
        *,
        split: str | None,
        on_entry: Callable[[], object],
    ) -> None:
        self._dialect = dialect
        self._decoder = decoder
        self._encoder = encoder
        self._split = split
        self._on_entry = on_entry

    def make(self, entries: Iterable[Entry | BadEntry], writer: ShardWriter) -> ShardReport:
        """Decode, encode, and add every good entry to `writer`, in order.

        Raises:
            UserError: media without a vision tokenizer.
            OSError: a fault of the file system that did not pass.
        """
        report = ShardReport()
        samples = self._pass_through_encoder(entries, report)
        codes = self._encoder.finish() if self._encoder else {}
        for key, sample in enumerate(samples):
            self._write(sample, codes.get(key), writer, report)
        report.tokens = writer.num_tokens
        return report

    def _pass_through_encoder(
        self, entries: Iterable[Entry | BadEntry], report: ShardReport
    ) -> list[Sample | BadEntry]:
        """Feed the encoder with every picture; returns the samples without their pixels."""
        samples: list[Sample | BadEntry] = []
        for sample in self._decoder(self._of_split(entries, report)):
            if isinstance(sample, Sample) and sample.pixels is not None:
                if self._encoder is None:
                    raise UserError(
                        f"entry {sample.entry.id!r} has a picture: give --vision-tokenizer, "
                        "or a manifest of texts alone"
                    )
                self._encoder.add(len(samples), sample.pixels, video=sample.clip is not None)
                sample = Sample(entry=sample.entry, pixels=None, clip=sample.clip)
            samples.append(sample)
            self._on_entry()
        return samples

    def _of_split(
        self, entries: Iterable[Entry | BadEntry], report: ShardReport
    ) -> Iterable[Entry | BadEntry]:
        """Leave out entries of other splits; bad entries of an unknown split stay."""
        for entry in entries:
            known = entry.split is not None or isinstance(entry, Entry)
            if self._split is not None and known and entry.split != self._split:
                report.other_splits += 1
                self._on_entry()
            else:
                report.entries += 1
                yield entry

    def _write(
        self, sample: Sample | BadEntry, codes: Codes | None, writer: ShardWriter, report: ShardReport
    ) -> None:
        """Write one document, or set the entry aside."""
        if isinstance(sample, BadEntry):
            report.set_aside(sample)
            return
        entry = sample.entry
        texts = [self._dialect.encode_text(text) for text in (entry.text, *entry.alternatives) if text]
        texts = [ids for ids in texts if len(ids)]
        segments = [(ids, ALTERNATIVE_MODE if place else TEXT_MODE) for place, ids in enumerate(texts)]
        if not segments and entry.kind == "text":
            reason = "has no text left after normalisation"
            report.set_aside(BadEntry(id=entry.id, path=None, reason=reason, error="EntryError"))
            return
        if codes is not None:
            segments.append((self._span(sample, codes), SPAN_MODE))
        writer.add_document(segments, sample_id=entry.id, task=entry.task)
        report.images += entry.kind == "image"
        report.clips += entry.kind == "video"
        report.frames += len(sample.clip.indices) if sample.clip else 0
        report.texts += entry.kind == "text"

    def _span(self, sample: Sample, codes: Codes) -> npt.NDArray[np.int64]:
        """Ids of a picture."""
        if sample.clip is None:
            return self._dialect.encode_span(Image(codes))
        return self._dialect.encode_span(Video(codes, fps=sample.clip.fps, seconds=sample.clip.seconds))
