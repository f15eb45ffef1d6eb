"""Near-duplicate pictures: perceptual hashes, and an index that finds every close one."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import imagehash
import numpy as np
from PIL import Image

from emu3_megatron.curation.config import DuplicatesConfig
from emu3_megatron.curation.frames import Picture, pictures_of
from emu3_megatron.curation.units import KEEP, Comparer, ComparingStage, Decision, Score, Unit, drop

HASH_BITS = 64
"""Length of a perceptual hash."""

CLIP_HASHES = 3
"""Frames of a clip that are hashed."""


def picture_hash(picture: Picture) -> int:
    """Perceptual hash (DCT) of a picture, 64 bits."""
    return int(str(imagehash.phash(Image.fromarray(np.asarray(picture)))), 16)


class HashIndex:
    """Finds all stored hashes within a distance: of ``distance + 1`` bands, one must be equal."""

    def __init__(self, max_distance: int) -> None:
        """`max_distance` in bits."""
        self._distance = max_distance
        edges = np.linspace(0, HASH_BITS, max_distance + 2).round().astype(int).tolist()
        self._bands = [(low, (1 << (high - low)) - 1) for low, high in itertools.pairwise(edges)]
        self._tables: list[dict[int, list[int]]] = [defaultdict(list) for _ in self._bands]
        self._hashes: list[int] = []
        self._names: list[str] = []

    def add(self, value: int, name: str) -> None:
        """Store a hash under a name."""
        place = len(self._hashes)
        self._hashes.append(value)
        self._names.append(name)
        for table, (low, mask) in zip(self._tables, self._bands, strict=True):
            table[value >> low & mask].append(place)

    def near(self, value: int) -> Iterator[tuple[int, str]]:
        """Distances and names of the stored hashes near `value`, nearest first, then oldest first."""
        places = {
            place
            for table, (low, mask) in zip(self._tables, self._bands, strict=True)
            for place in table.get(value >> low & mask, ())
        }
        distances = sorted(((self._hashes[place] ^ value).bit_count(), place) for place in places)
        yield from ((d, self._names[place]) for d, place in distances if d <= self._distance)


class DuplicatesStage(ComparingStage):
    """Of pictures that look alike keeps the one of the best quality; of clips, where all their frames do."""

    name = "duplicates"

    def __init__(self, config: DuplicatesConfig) -> None:
        """`config` has the distance."""
        self._config = config

    def settings(self) -> Mapping[str, Any]:
        """The hash."""
        return {"hash": f"phash {HASH_BITS}, imagehash {version('imagehash')}", "frames": CLIP_HASHES}

    def score(self, unit: Unit) -> Score:
        """The hashes, in hexadecimal."""
        return {"hashes": [f"{picture_hash(picture):016x}" for picture in pictures_of(unit, CLIP_HASHES)]}

    def comparer(self) -> Comparer:
        """An empty index."""
        return _PictureComparer(self._config.max_distance)


class _PictureComparer(Comparer):
    """Compares the first hash by the index, the others directly. The best unit of its like comes first."""

    def __init__(self, max_distance: int) -> None:
        self._distance = max_distance
        self._seen: list[tuple[float, str, Sequence[int]]] = []
        self._dropped: dict[str, str] | None = None

    def look_ahead(self, unit: Unit, score: Score, quality: float | None) -> None:
        """Remember the hashes."""
        self._seen.append((0.0 if quality is None else quality, unit.id, read_hashes(score)))

    def decide(self, unit: Unit, score: Score) -> Decision:
        """Keep what is like no better one that is kept; of equals the first in the manifest stays."""
        if self._dropped is None:
            self._dropped = self._compare()
        name = self._dropped.get(unit.id)
        return KEEP if name is None else drop("near-duplicate", f"of {name}")

    def _compare(self) -> dict[str, str]:
        """What is dropped, and the kept unit that it is like."""
        index, kept, dropped = HashIndex(self._distance), dict[str, Sequence[int]](), dict[str, str]()
        self._seen.sort(key=lambda seen: -seen[0])
        for _, name, hashes in self._seen:
            other = next(
                (o for _, o in index.near(hashes[0]) if _alike(hashes, kept[o], self._distance)), None
            )
            if other is not None:
                dropped[name] = other
                continue
            index.add(hashes[0], name)
            kept[name] = hashes
        self._seen.clear()
        return dropped


def _alike(hashes: Sequence[int], others: Sequence[int], distance: int) -> bool:
    """Whether all of two units' hashes are close."""
    return len(hashes) == len(others) and all(
        (a ^ b).bit_count() <= distance for a, b in zip(hashes, others, strict=True)
    )


def read_hashes(score: Score) -> Sequence[int]:
    """The hashes of a score."""
    return [int(value, 16) for value in score["hashes"]]
