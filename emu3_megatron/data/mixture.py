"""Mixtures: which datasets a run reads, and in which proportion of tokens."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from emu3_megatron.data.index import Captions, Described
from emu3_megatron.data.manifest import Manifest, canonical_sha256
from emu3_megatron.data.permutation import Integers, derive_key, permute
from emu3_megatron.data.reader import MultimodalDataset
from emu3_megatron.data.stock import StockDataset, is_stock, open_stock
from emu3_megatron.data.takedown import Takedown, TakenDown, take_down
from emu3_megatron.data.template import Decisions, Template, choose_captions
from emu3_megatron.data.window import Canvas, Pieces
from emu3_megatron.errors import UserError
from emu3_megatron.files import write_json_atomic
from emu3_megatron.vocabulary import Vocabulary

SCAN_DOCUMENTS = 1 << 20
"""Documents described at a time when a source is measured."""

MEASURE_VERSION = 1
"""Raised whenever a source's mean would come out differently."""

TOKENIZERS = ("text tokenizer", "vision tokenizer")
"""Parts of a dataset's identity that must be equal within a mixture."""

MAX_SOURCES = 2**15 - 1
"""Sources are numbered in int16."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """One dataset in a mixture."""

    path: str
    """Folder of the dataset (the one with manifest.json), or prefix of plain text in Megatron's format."""
    weight: float = 1.0
    """Share of the mixture's tokens, relative to the other sources' weights."""
    name: str = ""
    """Name in logs and metrics, and part of the seed; by default the dataset's."""
    template: Template | None = None
    """How its documents are rendered; by default the mixture's template."""


class OpenSource:
    """A source with its dataset open: an endless, shuffled stream of its documents, addressed by position.

    Position ``p`` is the ``p % len(dataset)``-th document of epoch ``p // len(dataset)``, in that epoch's
    order, so every epoch holds every document exactly once.
    """

    def __init__(
        self,
        source: Source,
        dataset: MultimodalDataset,
        template: Template,
    ) -> None:
        self.name = source.name or dataset.manifest.name
        self.weight = source.weight
        self.dataset = dataset
        self.template = source.template or template
        self.taken_down = TakenDown(np.zeros(0, dtype=np.int64), 0)
        """The documents that are never drawn."""

    @property
    def identity(self) -> dict[str, Any]:
        """What determines the documents this source gives, and their order."""
        identity: dict[str, Any] = {
            "name": self.name,
            "weight": self.weight,
            "template": asdict(self.template),
            "dataset": self.dataset.manifest.identity,
        }
        # Only where there are some, so that plans made before the list existed keep their fingerprint.
        if len(self.taken_down):
            identity["taken down"] = self.taken_down.fingerprint
        return identity

    def draw(self, first: int, last: int, *, seed: int, capacity: int) -> Drawn:
        """The documents at positions ``first`` to ``last - 1``, described and decided.

        Documents taken down keep their positions and are left out, so the others stay where they were.
        """
        size = len(self.dataset)
        parts = []
        position = first
        while position < last:
            epoch, offset = divmod(position, size)
            count = min(last - position, size - offset)
            here = permute(
                np.arange(offset, offset + count), size, derive_key("permutation", seed, self.name, epoch)
            )
            if len(self.taken_down):
                here = here[self.taken_down.remain(here)]
            described, chosen = self._describe(here, seed=seed, epoch=epoch)
            key = derive_key("template", seed, self.name, epoch)
            decided = self.template.decide(here, described, key=key, capacity=capacity)
            parts.append(Drawn(document=here, kind=described.kind, chosen=chosen, decided=decided))
            position += count
        return Drawn.concatenate(parts)

    def _describe(self, documents: Integers, *, seed: int, epoch: int) -> tuple[Described, Captions]:
        """Documents with the captions that this epoch shows, and which these are."""
        described = self.dataset.describe(documents)
        if not np.any(described.captions > 1):
            return described, np.zeros(len(documents), dtype=np.uint8)
        key = derive_key("captions", seed, self.name)
        chosen = choose_captions(documents, described.captions, key=key, epoch=epoch)
        return self.dataset.describe(documents, chosen), chosen

    def write(self, canvas: Canvas, pieces: Pieces, vocabulary: Vocabulary) -> None:
        """Read documents and write pieces of them into a window.

        Args:
            canvas: The window.
            pieces: Which tokens of which of its documents, with the template's decisions.
            vocabulary: Gives BOS, EOS and the classes of ids.

        Raises:
            UserError: damaged data; names the file.
        """
        template = self.template
        if not isinstance(self.dataset, StockDataset):
            writer = canvas.writer(vocabulary)
            self.dataset.write_pieces(writer, pieces, bos=template.bos, eos=template.eos)
            return
        for place, document in enumerate(pieces.document.tolist()):
            ids, modality = template.assemble(self.dataset.document(document), vocabulary)
            start, length, at = (int(column[place]) for column in (pieces.start, pieces.length, pieces.at))
            canvas.write(ids, modality, start=start, length=length, at=at)

    def mean_tokens(self, *, capacity: int, cache: str | os.PathLike[str] | None = None) -> float:
        """Mean tokens that a draw adds to the windows, over an epoch; what cannot fit counts as none.

        Reads the whole index once; the answer is kept in the folder `cache`, named after what determines it.

        Raises:
            UserError: no document fits a window.
        """
        question = {
            "version": MEASURE_VERSION,
            "template": asdict(self.template),
            "dataset": self.dataset.fingerprint,
            "taken down": self.taken_down.fingerprint,
            "capacity": capacity,
        }
        path = None if cache is None else Path(cache) / f"mean-{canonical_sha256(question)[:32]}.json"
        if path is not None:
            try:
                kept = json.loads(path.read_bytes())
                if kept.pop("checksum") == canonical_sha256(kept):
                    return float.fromhex(kept["mean_tokens"])
            except (OSError, ValueError, KeyError, TypeError, AttributeError):
                pass  # not there, or damaged: measured again
        mean = self._measure(capacity)
        if path is not None:
            answer = {**question, "mean_tokens": mean.hex()}
            write_json_atomic(path, {**answer, "checksum": canonical_sha256(answer)})
        return mean

    def _measure(self, capacity: int) -> float:
        total, least = 0.0, 0
        if len(self.taken_down) == len(self.dataset):
            raise UserError(
                f"source {self.name!r}: all its {len(self.dataset):,} documents are taken down: leave the "
                "source out, or correct the list"
            )
        for first in range(0, len(self.dataset), SCAN_DOCUMENTS):
            numbers = np.arange(first, min(first + SCAN_DOCUMENTS, len(self.dataset)))
            for places, described in self.dataset.describe_captions(numbers):
                expected = self.template.expected_tokens(described, capacity=capacity)
                expected /= np.maximum(described.captions, 1)  # each caption is shown in its share of epochs
                lengths = described.length
                if len(self.taken_down):
                    remaining = self.taken_down.remain(numbers[places])
                    expected[~remaining] = 0.0
                    lengths = lengths[remaining]
                total += float(expected.sum())
                if len(lengths):
                    shortest = int(lengths.min()) + self.template.bos + self.template.eos
                    least = min(least or shortest, shortest)
        if total == 0.0:
            raise UserError(
                f"source {self.name!r}: no document fits context_length={capacity} (the shortest takes "
                f"{least} tokens and may not be split): raise context_length or leave the source out"
            )
        return total / len(self.dataset)


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """Documents drawn from one source, ``[N]`` each."""

    document: Integers
    """Number in the dataset."""
    kind: Integers
    """`Kind` of each."""
    chosen: Captions
    """Which of its captions each pair shows."""
    decided: Decisions
    """What the template decided."""

    @classmethod
    def concatenate(cls, parts: Sequence[Drawn]) -> Drawn:
        """Put draws after each other."""
        if len(parts) == 1:
            return parts[0]

        def joined(arrays: list[npt.NDArray[Any]], dtype: Any) -> npt.NDArray[Any]:
            return np.concatenate([np.zeros(0, dtype=dtype), *arrays]).astype(dtype, copy=False)

        return cls(
            document=joined([part.document for part in parts], np.int64),
            kind=joined([part.kind for part in parts], np.int64),
            chosen=joined([part.chosen for part in parts], np.uint8),
            decided=Decisions(
                length=joined([part.decided.length for part in parts], np.int64),
                caption_after=joined([part.decided.caption_after for part in parts], np.bool_),
                caption_tokens=joined([part.decided.caption_tokens for part in parts], np.int64),
            ),
        )

    def take(self, order: Integers) -> Drawn:
        """These draws, in this order."""
        decided = self.decided
        return Drawn(
            document=self.document[order],
            kind=self.kind[order],
            chosen=self.chosen[order],
            decided=Decisions(
                length=decided.length[order],
                caption_after=decided.caption_after[order],
                caption_tokens=decided.caption_tokens[order],
            ),
        )


class Mixture:
    """Sources with their datasets open, all of one vocabulary.

    Args:
        sources: At least one, with distinct names and weights above 0.
        template: For sources without one of their own.
        vocabulary: Where given, every dataset must have it; else the first dataset's is required of all.
        takedown: File of sample ids, one a line; their documents are never drawn, whatever source has them.
        cache: Folder where the documents that the list names are kept, once found; a plan's.

    Raises:
        UserError: no source, a bad weight, names that repeat, an empty dataset, datasets of different
            vocabularies or tokenizers, or a dataset that cannot be opened.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        template: Template | None = None,
        vocabulary: Vocabulary | None = None,
        takedown: str | os.PathLike[str] | None = None,
        cache: str | os.PathLike[str] | None = None,
    ) -> None:
        if not 1 <= len(sources) <= MAX_SOURCES:
            raise UserError(f"a mixture needs 1 to {MAX_SOURCES} sources, got {len(sources)}")
        vocabulary = _vocabulary(sources) if vocabulary is None else vocabulary
        self.sources: list[OpenSource] = []
        for source in sources:
            if not 0 < source.weight < float("inf"):
                raise UserError(
                    f"source {source.path}: weight={source.weight} must be above 0; leave it out instead"
                )
            if is_stock(source.path):
                dataset = open_stock(source.path, vocabulary)
            else:
                dataset = MultimodalDataset.open(source.path, vocabulary=vocabulary)
            if len(dataset) == 0:
                raise UserError(f"source {source.path}: the dataset has no documents; leave it out")
            self.sources.append(OpenSource(source, dataset, template or Template()))
        self.takedown: Takedown | None = None
        """What the takedown list names, where there is one."""
        if takedown is not None:
            self.takedown = take_down(takedown, [source.dataset for source in self.sources], cache)
            for open_source, taken_down in zip(self.sources, self.takedown.taken_down, strict=True):
                open_source.taken_down = taken_down
        names = [source.name for source in self.sources]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise UserError(f"source names must differ, {', '.join(repeated)} repeats: give each a `name`")
        self.vocabulary = vocabulary
        self.tokenizers = self._same_tokenizers()
        """Fingerprints of the text and vision tokenizer, by the names in a manifest's identity."""

    @property
    def names(self) -> list[str]:
        """Names of the sources, in order; `Window.source` counts in this list."""
        return [source.name for source in self.sources]

    def _same_tokenizers(self) -> dict[str, str]:
        """Fingerprints of the tokenizers by kind: equal ids of different tokenizers mean different things."""
        known: dict[str, tuple[str, str]] = {}
        for source in self.sources:
            for kind in TOKENIZERS:
                fingerprint = source.dataset.manifest.identity[kind]
                name, first = known.setdefault(kind, (source.name, fingerprint)) if fingerprint else ("", "")
                if fingerprint != first:
                    raise UserError(
                        f"sources {name!r} and {source.name!r} were made with different {kind}s "
                        f"({first[:12]}, {fingerprint[:12]}): tokenize them again with one"
                    )
        return {kind: fingerprint for kind, (_, fingerprint) in known.items()}

    def draw_shares(self, *, capacity: int, cache: str | os.PathLike[str] | None = None) -> list[Fraction]:
        """Share of the draws that each source gets so that its share of tokens is its weight's.

        A draw adds on average `OpenSource.mean_tokens`, which is kept in the folder `cache`; both are exact
        over whole epochs.
        """
        rates = [
            Fraction(source.weight) / Fraction(source.mean_tokens(capacity=capacity, cache=cache))
            for source in self.sources
        ]
        total = sum(rates)
        return [rate / total for rate in rates]


def _vocabulary(sources: Sequence[Source]) -> Vocabulary:
    """The vocabulary of the first source that states one."""
    for source in sources:
        if not is_stock(source.path):
            return Manifest.load(source.path).vocabulary
    raise UserError(
        "files in Megatron's format do not say what their ids mean: a mixture of nothing else needs a "
        "`vocabulary`"
    )
