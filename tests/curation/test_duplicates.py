"""Of pictures that look alike the best stays."""

from __future__ import annotations

import random

import pytest

from emu3_megatron.curation.config import DuplicatesConfig
from emu3_megatron.curation.duplicates import HASH_BITS, DuplicatesStage, read_hashes
from emu3_megatron.curation.units import Decision, Score, Unit

DISTANCE = 4
Row = tuple[str, Score, "float | None"]


def decide(rows: list[Row]) -> dict[str, Decision]:
    """Decisions of the stage over units with these hashes and qualities."""
    comparer = DuplicatesStage(DuplicatesConfig(max_distance=DISTANCE)).comparer()
    units = {name: Unit(id=name, kind="image", record={}, path=None) for name, _, _ in rows}
    for name, score, quality in rows:
        comparer.look_ahead(units[name], score, quality)
    return {name: comparer.decide(units[name], score) for name, score, _ in rows}


def near(one: Score, other: Score) -> bool:
    pairs = zip(read_hashes(one), read_hashes(other), strict=True)
    return all((a ^ b).bit_count() <= DISTANCE for a, b in pairs)


def families(seed: int, hashes: int) -> list[Row]:
    """Forty units of eight families, members up to four bits from their family's hashes."""
    generator = random.Random(seed)
    rows: list[Row] = []
    for family in range(8):
        parents = [generator.getrandbits(HASH_BITS) for _ in range(hashes)]
        for member in range(5):
            values = [value ^ (1 << generator.randrange(HASH_BITS)) for value in parents]
            score = {"hashes": [f"{value:016x}" for value in values]}
            rows.append((f"{family}-{member}", score, generator.uniform(0, 10)))
    generator.shuffle(rows)
    return rows


@pytest.mark.parametrize("hashes", [1, 3])
@pytest.mark.parametrize("seed", range(5))
def test_the_best_of_each_family_stays_whatever_the_order(seed: int, hashes: int) -> None:
    rows = families(seed, hashes)
    decisions = decide(rows)
    scores = {name: score for name, score, _ in rows}
    quality = {name: value for name, _, value in rows}
    kept = {name for name, decision in decisions.items() if decision.keep}
    best = {
        max((n for n in quality if n.startswith(f"{family}-")), key=lambda n: quality[n] or 0.0)
        for family in range(8)
    }
    assert kept == best
    for name, decision in decisions.items():
        if not decision.keep:
            other = decision.detail.removeprefix("of ")
            assert decision.reason == "near-duplicate"
            assert other in kept
            assert near(scores[name], scores[other])
    assert decide(rows[::-1]) == decisions


def test_of_equals_and_without_a_quality_the_first_stays() -> None:
    score = {"hashes": ["00ff00ff00ff00ff"]}
    for quality in (None, 3.0):
        decisions = decide([(name, score, quality) for name in ("b", "a", "c")])
        assert [name for name, decision in decisions.items() if decision.keep] == ["b"]
