"""Computing the scores of a chunk, and the files that keep them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from emu3_megatron.curation.config import CurationConfig
from emu3_megatron.curation.manifest import BadEntry, RawManifest
from emu3_megatron.curation.pipeline import Pipeline
from emu3_megatron.curation.units import Score, Stage, Unit
from emu3_megatron.errors import UserError, one_line
from emu3_megatron.files import atomic_write
from emu3_megatron.media import MediaError

RETRY_SECONDS = (0.5, 2.0, 8.0)
"""Waits before a passing fault (a disk, a network, memory) is tried again; after the last the job stops."""

Key = tuple[str, str]
"""Key of a stage's scores, id of a unit."""

Announce = Callable[[Key | None], object]
"""Told what is about to be scored, and None when an entry is finished."""


class MissingScore(LookupError):
    """A score has not been computed."""


def scores_path(output: Path, chunk: int) -> Path:
    """File of a chunk's scores."""
    return output / "scores" / f"{chunk:07d}.jsonl"


def read_scores(output: Path, chunk: int) -> dict[Key, Score]:
    """All scores kept for a chunk, those of other settings too.

    Raises:
        UserError: the file is damaged.
    """
    path = scores_path(output, chunk)
    rows: dict[Key, Score] = {}
    if path.exists():
        try:
            for line in path.read_text(encoding="utf-8").splitlines():
                row = json.loads(line)
                rows[row["key"], row["id"]] = row["score"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}: is damaged ({error}); remove it, and its scores are made again"
            ) from error
    return rows


class ChunkScorer:
    """Computes the scores that a chunk lacks, and publishes them together."""

    def __init__(self, config: CurationConfig, manifest: RawManifest) -> None:
        """Load the stages' weights."""
        self._config, self._manifest = config, manifest
        self._pipeline = Pipeline(config)

    def __call__(self, task: int, announce: Announce, failures: Mapping[Key, Score]) -> None:
        """Score one chunk.

        Args:
            task: the chunk's number.
            announce: called before each score and after each entry.
            failures: scores to take for granted: what crashed the process before.

        Raises:
            OSError, MemoryError: a fault that did not pass; nothing of the chunk is published.
            UserError: the settings do not fit the models.
        """
        known = read_scores(self._config.output, task)
        if self._config.retry_unusable:
            known = {key: score for key, score in known.items() if "error" not in score}
        used: dict[Key, Score] = {}

        def score_of(stage: Stage, unit: Unit) -> Score:
            key = (stage.key, unit.id)
            if key not in known:
                announce(key)
                known[key] = failures[key] if key in failures else compute(stage, unit)
                used[key] = known[key]
            return known[key]

        for entry in self._manifest.entries(task):
            if not isinstance(entry, BadEntry):
                for _ in self._pipeline.walk(entry, score_of):
                    pass
            announce(None)
        if used or not scores_path(self._config.output, task).exists():
            self._publish(task, known)

    def _publish(self, chunk: int, known: Mapping[Key, Score]) -> None:
        """Write the scores, sorted, so that the bytes do not depend on the runs that made them."""
        with atomic_write(scores_path(self._config.output, chunk)) as stream:
            for key, name in sorted(known):
                row = {"key": key, "id": name, "score": known[key, name]}
                stream.write(json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")


def compute(stage: Stage, unit: Unit) -> Score:
    """The score of a unit, or ``error`` and ``class`` where its file is to blame.

    Raises:
        OSError, MemoryError: a fault that did not pass.
        UserError: the settings do not fit the model.
    """
    for wait in (*RETRY_SECONDS, None):
        try:
            return _plain(stage.score(unit))
        except MediaError as error:
            return failure(one_line(error), "MediaError")
        except UserError:
            raise
        except (OSError, MemoryError):
            if wait is None:
                raise
            time.sleep(wait)
        except Exception as error:  # a library tripped over this file; the others must not suffer
            return failure(f"{stage.name} fails: {one_line(error)}", type(error).__name__)
    raise AssertionError("the last wait is None")


def failure(reason: str, error: str) -> dict[str, str]:
    """The score of a unit that has none."""
    return {"error": reason, "class": error}


def _plain(score: Score) -> Score:
    """The score as JSON will give it back, so that a run and its rerun decide from the same values."""
    value: Any = json.loads(json.dumps(score))
    return value
