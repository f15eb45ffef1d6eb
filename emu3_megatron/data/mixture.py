"""Mixtures: which datasets a run reads, and in which proportion of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from emu3_megatron.data.manifest import Manifest
from emu3_megatron.data.permutation import Integers, derive_key, permute
from emu3_megatron.data.reader import MultimodalDataset
from emu3_megatron.data.template import Decisions, Template
from emu3_megatron.errors import UserError
from emu3_megatron.vocabulary import Vocabulary

SCAN_DOCUMENTS = 1 << 20
"""Documents described at a time when a source is measured."""

TOKENIZERS = ("text tokenizer", "vision tokenizer")
"""Parts of a dataset's identity that must be equal within a mixture."""

MAX_SOURCES = 2**15 - 1
"""Sources are numbered in int16."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """One dataset in a mixture."""

    path: str
    """Folder of the dataset (the one with manifest.json)."""
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

    def __init__(self, source: Source, dataset: MultimodalDataset, template: Template) -> None:
        self.name = source.name or dataset.manifest.name
        self.weight = source.weight
        self.dataset = dataset
        self.template = source.template or template

    @property
    def identity(self) -> dict[str, Any]:
        """What determines the documents this source gives, and their order."""
        return {
            "name": self.name,
            "weight": self.weight,
            "template": asdict(self.template),
            "dataset": self.dataset.manifest.identity,
        }

    def draw(self, first: int, last: int, *, seed: int, capacity: int) -> Drawn:
        """The documents at positions ``first`` to ``last - 1``, described and decided."""
        size = len(self.dataset)
        documents = np.empty(last - first, dtype=np.int64)
        parts = []
        position = first
        while position < last:
            epoch, offset = divmod(position, size)
            count = min(last - position, size - offset)
            here = permute(
                np.arange(offset, offset + count), size, derive_key("permutation", seed, self.name, epoch)
            )
            documents[position - first : position - first + count] = here
            described = self.dataset.describe(here)
            key = derive_key("template", seed, self.name, epoch)
            decided = self.template.decide(here, described, key=key, capacity=capacity)
            parts.append((described[2], decided))
            position += count
        return Drawn.join(documents, parts)

    def mean_tokens(self, *, capacity: int) -> float:
        """Mean tokens that a draw adds to the windows, over an epoch; what cannot fit counts as none.

        Raises:
            UserError: no document fits a window.
        """
        total, least = 0.0, 0
        for first in range(0, len(self.dataset), SCAN_DOCUMENTS):
            described = self.dataset.describe(
                np.arange(first, min(first + SCAN_DOCUMENTS, len(self.dataset)))
            )
            total += float(self.template.expected_tokens(described, capacity=capacity).sum())
            shortest = int(described[0].min()) + self.template.bos + self.template.eos
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
    decided: Decisions
    """What the template decided."""

    @classmethod
    def join(cls, documents: Integers, parts: Sequence[tuple[Integers, Decisions]]) -> Drawn:
        """Put the epochs' parts after each other."""

        def joined(arrays: list[npt.NDArray[Any]], dtype: Any) -> npt.NDArray[Any]:
            return np.concatenate([np.zeros(0, dtype=dtype), *arrays]).astype(dtype, copy=False)

        return cls(
            document=documents,
            kind=joined([kind for kind, _ in parts], np.int64),
            decided=Decisions(
                length=joined([decided.length for _, decided in parts], np.int64),
                caption_after=joined([decided.caption_after for _, decided in parts], np.bool_),
                caption_tokens=joined([decided.caption_tokens for _, decided in parts], np.int64),
            ),
        )


class Mixture:
    """Sources with their datasets open, all of one vocabulary.

    Args:
        sources: At least one, with distinct names and weights above 0.
        template: For sources without one of their own.
        vocabulary: Where given, every dataset must have it; else the first dataset's is required of all.

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
    ) -> None:
        if not 1 <= len(sources) <= MAX_SOURCES:
            raise UserError(f"a mixture needs 1 to {MAX_SOURCES} sources, got {len(sources)}")
        self.sources: list[OpenSource] = []
        for source in sources:
            if not 0 < source.weight < float("inf"):
                raise UserError(
                    f"source {source.path}: weight={source.weight} must be above 0; leave it out instead"
                )
            if vocabulary is None:
                vocabulary = Manifest.load(source.path).vocabulary
            dataset = MultimodalDataset.open(source.path, vocabulary=vocabulary)
            if len(dataset) == 0:
                raise UserError(f"source {source.path}: the dataset has no documents; leave it out")
            self.sources.append(OpenSource(source, dataset, template or Template()))
        names = [source.name for source in self.sources]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise UserError(f"source names must differ, {', '.join(repeated)} repeats: give each a `name`")
        if vocabulary is None:
            raise UserError("a mixture needs a vocabulary")
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

    def draw_shares(self, *, capacity: int) -> list[Fraction]:
        """Share of the draws that each source gets so that its share of tokens is its weight's.

        A draw adds on average `OpenSource.mean_tokens`; both are exact over whole epochs.
        """
        rates = [
            Fraction(source.weight) / Fraction(source.mean_tokens(capacity=capacity))
            for source in self.sources
        ]
        total = sum(rates)
        return [rate / total for rate in rates]
