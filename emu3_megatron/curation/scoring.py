"""Computing the scores of a chunk, and the files that keep them."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from emu3_megatron.curation.config import CurationConfig
from emu3_megatron.curation.manifest import BadEntry, RawManifest
from emu3_megatron.curation.pipeline import Pipeline, Step
from emu3_megatron.curation.progress import listening
from emu3_megatron.curation.units import Score, Stage, Unit
from emu3_megatron.errors import MachineFault, UserError, one_line
from emu3_megatron.files import atomic_write, printable
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
            with open(path, "rb") as stream:  # bytes: a name may hold what ends a line of text, as U+2028
                for line in stream:
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

    def __call__(self, task: int, announce: Announce, failures: Mapping[Key, Score]) -> list[BadEntry]:
        """Score one chunk.

        Args:
            task: the chunk's number.
            announce: called before each score, now and then while frames come, and after each entry.
            failures: scores to take for granted: what crashed the process before.

        Returns:
            The entries that cannot be used, or of which a clip cannot.

        Raises:
            OSError: a fault that did not pass; nothing of the chunk is published.
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
                with listening(lambda: announce(key)):
                    known[key] = failures[key] if key in failures else compute(stage, unit)
                used[key] = known[key]
            return known[key]

        bad: list[BadEntry] = []
        for entry in self._manifest.entries(task):
            if isinstance(entry, BadEntry):
                bad.append(entry)
            else:
                bad += list(unusable(self._pipeline.walk(entry, score_of)))[:1]
            announce(None)
        if used or not scores_path(self._config.output, task).exists():
            self._publish(task, known)
        return bad

    def _publish(self, chunk: int, known: Mapping[Key, Score]) -> None:
        """Write the scores, sorted, so that the bytes do not depend on the runs that made them."""
        with atomic_write(scores_path(self._config.output, chunk)) as stream:
            for key, name in sorted(known):
                row = {"key": key, "id": name, "score": known[key, name]}
                stream.write(json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")


def unusable(steps: Iterable[Step]) -> Iterator[BadEntry]:
    """Those of an entry's steps where the file cannot be used."""
    for step in steps:
        if step.stage is not None and "error" in step.score:
            yield set_aside(step.unit, step.score["error"], step.score["class"], step.stage.name)


def set_aside(unit: Unit, reason: str, error: str, stage: str) -> BadEntry:
    """The line about a unit that cannot be used."""
    return BadEntry(unit.id, printable(str(unit.path)) if unit.path else None, reason, error, stage)


def compute(stage: Stage, unit: Unit) -> Score:
    """The score of a unit, or ``error`` and ``class`` where its file is to blame.

    Raises:
        OSError: a fault of the machine that did not pass; it names the file.
        UserError: the settings do not fit the model, or a package is missing.
    """
    for wait in (*RETRY_SECONDS, None):
        try:
            return _plain(stage.score(unit))
        except MediaError as error:
            return failure(one_line(error), "MediaError")
        except UserError:
            raise
        except ImportError as error:
            raise UserError(
                f"{stage.name} cannot import what it needs: {one_line(error)}; pip install -e '.[curation]'"
            ) from error
        except Exception as error:
            if not of_machine(error, unit):  # a library tripped over this file; the others must not suffer
                return failure(f"{stage.name} fails: {one_line(error)}", type(error).__name__)
            if wait is None:
                raise MachineFault(f"{stage.name} of {unit.path or unit.id}: {one_line(error)}") from error
            _release_memory()
            time.sleep(wait)
    raise AssertionError("the last wait is None")


def of_machine(error: Exception, unit: Unit) -> bool:
    """Whether an error tells of the machine (its disk, memory or GPU) and not of the unit's file."""
    if isinstance(error, (OSError, MemoryError)):
        return True
    library = type(error).__module__.partition(".")[0]
    if not isinstance(error, RuntimeError) and library not in ("onnxruntime", "cv2"):
        return False
    return bool(_MACHINE.search(str(error).replace(str(unit.path), "")))


_MACHINE = re.compile(
    r"CUDA|cuda|CUBLAS|cuBLAS|CUDNN|cuDNN|HIP error|NCCL"
    r"|out of memory|allocate memory|enough memory|[Ii]nsufficient memory|bad allocation|bad_alloc"
)
"""What RuntimeErrors, and errors of ONNX Runtime and OpenCV, say of memory and of a GPU."""


def _release_memory() -> None:
    """Give back what torch keeps of the GPU's memory for itself, where torch is in use."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        with suppress(RuntimeError):  # a lost device has nothing to give back
            torch.cuda.empty_cache()


def failure(reason: str, error: str) -> dict[str, str]:
    """The score of a unit that has none."""
    return {"error": reason, "class": error}


def _plain(score: Score) -> Score:
    """The score as JSON will give it back, so that a run and its rerun decide from the same values."""
    value: Any = json.loads(json.dumps(score))
    return value
