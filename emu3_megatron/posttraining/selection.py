"""Choosing data for quality fine-tuning by the average of several preference scores.

The paper (section 3.3.1) ranks images by the average of three scores (HPSv2.1, MPS, LAION-Aesthetics). They
have different scales, so each is first brought to one: by its mean and deviation over the manifest, or by its
rank.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from emu3_megatron.errors import UserError, one_line
from emu3_megatron.files import atomic_write, entry_id

MEDIA = ("image", "video")
"""Keys of a manifest that hold a path."""

PREFERENCE = "preference"
"""Name, among an entry's `scores`, of the average that it was chosen by."""

NAMED = 5
"""Entries without scores that an error names."""


@dataclass(frozen=True, kw_only=True)
class SelectionConfig:
    """What to choose, and from what. Raises `UserError` on construction where a value is out of range."""

    manifest: tuple[Path, ...]
    """JSON Lines manifests, in order; every entry holds ``scores``, an object of finite numbers by name."""
    output: Path
    """Manifest of the chosen entries; the order stays."""
    scores: tuple[str, ...] = ("hps", "mps", "aesthetic")
    """Names of the scores that are averaged; higher is better."""
    scale: Literal["deviation", "rank", "none"] = "deviation"
    """How scores are made comparable: less their mean, over their standard deviation; their rank as a share
    of the entries, equal scores alike; as they are (ours: the paper says only that they are averaged)."""
    share: float | None = None
    """Share of the entries to choose, the best first."""
    least: float | None = None
    """Choose what has at least this average."""
    left_out: Path | None = None
    """File for the ids of the others, one a line: `data.takedown` of a run on a dataset that holds all."""
    skip_unscored: bool = False
    """Leave out entries that lack a score, instead of refusing the manifest."""

    def __post_init__(self) -> None:
        """Check the values."""
        if not self.manifest or not self.scores:
            raise UserError("manifest and scores must each name at least one")
        if (self.share is None) == (self.least is None):
            raise UserError("give either share or least: how much to choose, or from which average on")
        if self.share is not None and not 0 < self.share <= 1:
            raise UserError(f"share={self.share} must lie above 0 and at most at 1")


@dataclass(frozen=True)
class Selection:
    """What was chosen."""

    entries: int
    """Entries of all manifests."""
    chosen: int
    """Of these, chosen."""
    unscored: int
    """Of these, left out because a score is missing or not finite."""
    least: float
    """Smallest average that was chosen; NaN where none was."""


def select(config: SelectionConfig) -> Selection:
    """Write the manifest of the chosen entries.

    Raises:
        UserError: a manifest cannot be read, a line is no entry, a score is missing, or the name of an entry
            does not fit into `left_out`.
    """
    averages = averaged(_scores(config), config.scale)
    chosen = _chosen(averages, config)
    left: list[str] = []
    with atomic_write(config.output) as stream:
        for number, (path, line, entry) in enumerate(_entries(config.manifest)):
            if not chosen[number]:
                left.append(entry_id(entry, f"{path.name}:{line}"))
                continue
            moved = {
                key: os.path.relpath(path.parent / entry[key], config.output.parent)
                for key in MEDIA
                if isinstance(entry.get(key), str)
            }
            scores = {**entry["scores"], PREFERENCE: round(float(averages[number]), 6)}
            record = {**entry, **moved, "scores": scores}
            stream.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        if config.left_out is not None:
            _check_names(left)
    if config.left_out is not None:
        with atomic_write(config.left_out) as stream:
            stream.writelines(f"{name}\n".encode() for name in left)
    least = float(averages[chosen].min()) if chosen.any() else math.nan
    return Selection(len(averages), int(chosen.sum()), int(np.isnan(averages).sum()), least)


def _check_names(names: list[str]) -> None:
    """Refuse names that a takedown list, read by `data.takedown.read_takedown`, would not give back."""
    for name in names:
        if [name] != name.splitlines() or name != name.strip() or name.startswith("#"):
            raise UserError(
                f"the entry {name!r} cannot be named in left_out, which has an id on each line: an id there "
                "has no line break, does not begin or end with a space, and does not begin with #; change it"
            )


def averaged(scores: npt.NDArray[np.float64], scale: str) -> npt.NDArray[np.float64]:
    """Mean of the scores of each entry, ``[N]``, brought to one scale; NaN where one is missing.

    Args:
        scores: ``[N, K]``; NaN where missing. Entries without all scores take no part in the scale.
        scale: As in `SelectionConfig`.
    """
    whole = ~np.isnan(scores).any(axis=1)
    result = np.full(len(scores), np.nan)
    known = scores[whole]
    if scale == "deviation" and len(known):
        deviation = known.std(axis=0)
        known = (known - known.mean(axis=0)) / np.where(deviation > 0, deviation, 1.0)
    elif scale == "rank":
        known = np.stack([_ranks(column) for column in known.T], axis=1)
    result[whole] = known.mean(axis=1)
    return result


def _ranks(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Share of the values that are smaller, plus half of those that are equal."""
    ordered = np.sort(values)
    below, upto = (np.searchsorted(ordered, values, side=side) for side in ("left", "right"))
    return (below + upto) / (2 * max(1, len(values)))


def _chosen(averages: npt.NDArray[np.float64], config: SelectionConfig) -> npt.NDArray[np.bool_]:
    """Which entries are chosen; of equal averages at the border, the first ones."""
    if config.least is not None:
        return np.nan_to_num(averages, nan=-np.inf) >= config.least
    assert config.share is not None
    chosen = np.zeros(len(averages), dtype=bool)
    best_first = np.argsort(np.where(np.isnan(averages), np.inf, -averages), kind="stable")
    count = min(math.ceil(config.share * len(averages)), int((~np.isnan(averages)).sum()))
    chosen[best_first[:count]] = True
    return chosen


def _scores(config: SelectionConfig) -> npt.NDArray[np.float64]:
    """Scores of every entry, ``[N, K]``."""
    rows: list[list[float]] = []
    missing: list[str] = []
    for path, line, entry in _entries(config.manifest):
        held = entry.get("scores")
        held = held if isinstance(held, dict) else {}
        row = [_number(held.get(name)) for name in config.scores]
        rows.append(row)
        if any(math.isnan(value) for value in row) and len(missing) <= NAMED:
            lacking = [name for name, value in zip(config.scores, row, strict=True) if math.isnan(value)]
            missing.append(f"{path}:{line} lacks a finite {', '.join(lacking)}")
    if missing and not config.skip_unscored:
        more = ", ..." if len(missing) > NAMED else ""
        raise UserError(
            f"entries without scores: {'; '.join(missing[:NAMED])}{more}; score them, or leave them out with "
            "skip_unscored=true"
        )
    return np.array(rows, dtype=np.float64).reshape(-1, len(config.scores))


def _number(value: Any) -> float:
    """A score; NaN where there is none, or none that a mean can be taken with."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if number and abs(value) <= sys.float_info.max else math.nan


def _entries(paths: tuple[Path, ...]) -> Iterator[tuple[Path, int, dict[str, Any]]]:
    """File, line and contents of every entry; blank lines do not count."""
    for path in paths:
        try:
            with open(path, "rb") as stream:
                for number, line in enumerate(stream, 1):
                    if not line.strip():
                        continue
                    yield path, number, _entry(line, f"{path}:{number}")
        except OSError as error:
            raise UserError(f"{path}: cannot read the manifest ({error.strerror})") from error


def _entry(line: bytes, place: str) -> dict[str, Any]:
    """A line of a manifest; `place` is for messages."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: is not valid JSON ({one_line(error)}); repair the line") from error
    if not isinstance(entry, dict):
        raise UserError(f"{place}: is a JSON {type(entry).__name__}, not an entry")
    return entry
