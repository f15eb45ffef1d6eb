"""What a job dropped and why: counts, examples, tables."""

from __future__ import annotations

import heapq
import json
import zlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from emu3_megatron.curation.categories import category_of
from emu3_megatron.curation.contamination import CONTAMINATED
from emu3_megatron.curation.pipeline import UNUSABLE, Step
from emu3_megatron.curation.units import Unit
from emu3_megatron.files import atomic_write, write_json_atomic

KEPT = "kept"
"""Reason under which examples of what was kept are shown."""

CLIPS = "clips"
"""Stage under which the parts of a video are counted, apart from the videos that are split."""

MANIFEST = "manifest"
"""Stage of entries that are malformed."""


@dataclass(frozen=True)
class Example:
    """A unit to show."""

    unit: Unit
    text: str
    """Why, or its scores."""


@dataclass
class _Best:
    """Examples with the smallest digests: a sample that does not depend on the order."""

    limit: int
    heap: list[tuple[int, str, Example]] = field(default_factory=list)

    def offer(self, example: Example) -> None:
        """Take an example if it belongs to the sample."""
        digest = -zlib.crc32(example.unit.id.encode("utf-8", "surrogatepass"))
        entry = (digest, example.unit.id, example)
        if len(self.heap) < self.limit:
            heapq.heappush(self.heap, entry)
        elif self.heap and entry[:2] > self.heap[0][:2]:
            heapq.heapreplace(self.heap, entry)

    def examples(self) -> list[Example]:
        """The sample, by name."""
        return [example for _, _, example in sorted(self.heap, key=lambda entry: entry[1])]


class Report:
    """Counts what passes by."""

    def __init__(self, thumbnails: int) -> None:
        """Remember up to `thumbnails` examples of each reason."""
        self.entries: Counter[str] = Counter()
        self.entered: Counter[tuple[str, str]] = Counter()
        self.dropped: Counter[tuple[str, str, str]] = Counter()
        self.kept: Counter[str] = Counter()
        self.categories: dict[str, Counter[str]] = {"clips": Counter(), "seconds": Counter()}
        self.types: Counter[str] = Counter()
        self.languages: Counter[str] = Counter()
        self.contamination: list[dict[str, str]] = []
        self._examples: dict[tuple[str, str, str], _Best] = {}
        self._thumbnails = thumbnails

    def bad_entry(self) -> None:
        """Count a malformed entry."""
        self.entries["malformed"] += 1
        self.dropped["malformed", MANIFEST, UNUSABLE] += 1

    def step(self, step: Step) -> None:
        """Count a step."""
        unit, decision = step.unit, step.decision
        if step.stage is None:
            self._keep(step)
            return
        stage = CLIPS if step.made else step.stage.name
        self.entered[unit.kind, stage] += 1
        if decision.reason == CONTAMINATED:
            self.contamination.append({"id": unit.id, "kind": unit.kind, "found": decision.detail})
            self._show(unit, stage, decision.reason, decision.detail)
        if not decision.keep:
            self.dropped[unit.kind, stage, decision.reason] += 1
            if decision.reason != CONTAMINATED:
                self._show(unit, stage, decision.reason, decision.detail)

    def _keep(self, step: Step) -> None:
        unit = step.unit
        self.kept[unit.kind] += 1
        scores = headlines(step)
        self._show(unit, KEPT, KEPT, ", ".join(f"{key} {value}" for key, value in scores.items()))
        self.types.update([scores["type"]] if "type" in scores else [])
        self.languages.update([scores["language"]] if "language" in scores else [])
        if unit.kind == "video":
            category = category_of(unit.record)
            self.categories["clips"][category] += 1
            self.categories["seconds"][category] += round(1000 * step_seconds(step))

    def _show(self, unit: Unit, stage: str, reason: str, text: str) -> None:
        if self._thumbnails:
            key = (unit.kind, stage, reason)
            self._examples.setdefault(key, _Best(self._thumbnails)).offer(Example(unit, text))

    def examples(self) -> dict[tuple[str, str, str], list[Example]]:
        """Examples by kind, stage and reason."""
        return {key: best.examples() for key, best in sorted(self._examples.items())}

    def rows(self) -> list[tuple[str, str, str, int, int]]:
        """Kind, stage, reason, number dropped, number that came before the stage; in the order of stages."""
        order = {key: place for place, key in enumerate(self.entered)}
        keys = sorted(self.dropped, key=lambda key: (order.get(key[:2], -1), key))
        return [(*key, self.dropped[key], self.entered.get(key[:2], self.entries[key[0]])) for key in keys]

    def as_json(self) -> dict[str, Any]:
        """All counts."""
        clips, seconds = self.categories["clips"], self.categories["seconds"]
        return {
            "entries": dict(sorted(self.entries.items())),
            "kept": dict(sorted(self.kept.items())),
            "stages": [
                {"kind": kind, "stage": stage, "units": count}
                for (kind, stage), count in self.entered.items()
            ],
            "dropped": [
                {"kind": kind, "stage": stage, "reason": reason, "units": count, "of": total}
                for kind, stage, reason, count, total in self.rows()
            ],
            "video_categories": [
                {"category": name, "clips": clips[name], "seconds": seconds[name] / 1000}
                for name in sorted(clips)
            ],
            "image_types": dict(sorted(self.types.items())),
            "languages": dict(sorted(self.languages.items())),
            "contamination": len(self.contamination),
        }

    def write(self, folder: Path) -> None:
        """Write ``report.json``, ``report.md`` and ``contamination.jsonl``."""
        write_json_atomic(folder / "report.json", self.as_json())
        with atomic_write(folder / "report.md") as stream:
            stream.write(self.as_markdown().encode())
        with atomic_write(folder / "contamination.jsonl") as stream:
            for finding in self.contamination:
                stream.write(
                    json.dumps(finding, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
                )

    def as_markdown(self) -> str:
        """The tables, for people."""
        parts = [f"# {', '.join(f'{count} {kind}' for kind, count in sorted(self.entries.items()))}", ""]
        kept = ", ".join(f"{count} {kind}" for kind, count in sorted(self.kept.items())) or "nothing"
        parts += [f"Kept: {kept} (a video may give several clips).", ""]
        parts += table(
            ("kind", "stage", "reason", "dropped", "of", "share"),
            [
                (kind, stage, reason, str(count), str(total), f"{count / max(1, total):.1%}")
                for kind, stage, reason, count, total in self.rows()
            ],
        )
        balance = self.as_json()["video_categories"]
        if balance:
            total = sum(row["seconds"] for row in balance) or 1
            parts += ["", "## Video by category", ""]
            parts += table(
                ("category", "clips", "seconds", "share"),
                [
                    (
                        row["category"],
                        str(row["clips"]),
                        f"{row['seconds']:.1f}",
                        f"{row['seconds'] / total:.1%}",
                    )
                    for row in balance
                ],
            )
        for title, counts in (("Images by type", self.types), ("Texts by language", self.languages)):
            if counts:
                parts += ["", f"## {title}", ""]
                parts += table(("name", "kept"), [(name, str(counts[name])) for name in sorted(counts)])
        parts += ["", f"In the evaluation data: {len(self.contamination)} (see contamination.jsonl)."]
        return "\n".join(parts) + "\n"


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    """A Markdown table."""
    lines = [head, tuple("---" for _ in head), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


def headlines(step: Step) -> dict[str, Any]:
    """The scores of a kept unit that go into the clean manifest."""
    names = {
        "quality": "quality",
        "motion": "motion",
        "coverage": "text_coverage",
        "type": "type",
        "language": "language",
    }
    return {names[key]: value for before in step.path for key, value in before.score.items() if key in names}


def step_seconds(step: Step) -> float:
    """Duration of a kept clip or video."""
    if step.unit.interval is not None:
        return step.unit.interval[1] - step.unit.interval[0]
    return float(
        next(
            (
                before.score["seconds"]
                for before in step.path
                if before.stage and before.stage.name == "probe"
            ),
            0.0,
        )
    )
