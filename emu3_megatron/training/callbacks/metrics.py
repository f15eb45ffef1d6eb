"""metrics.jsonl: one line a step."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import IO, TYPE_CHECKING

from emu3_megatron.files import atomic_write
from emu3_megatron.training.callbacks.base import Callback
from emu3_megatron.training.metrics import StepReport
from emu3_megatron.training.modules import is_rank_zero

if TYPE_CHECKING:
    from emu3_megatron.training.trainer import Trainer


class MetricsFile(Callback):
    """Writes ``RUN/metrics.jsonl`` on rank 0.

    After a resume the lines of steps that are taken again are dropped first, so the file holds every step
    once. Numbers that JSON does not have (NaN, infinities) are written as null.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stream: IO[str] | None = None

    def on_start(self, trainer: Trainer) -> None:
        """Open, cut back to the steps that are in the checkpoint."""
        if is_rank_zero():
            kept = [line for line in _lines(self._path) if _step(line) <= trainer.progress.step]
            with atomic_write(self._path) as stream:
                stream.write("".join(kept).encode())
            self._stream = open(self._path, "a", buffering=1)  # noqa: SIM115 - closed by `close`

    def on_step(self, trainer: Trainer, report: StepReport) -> None:
        """Append a line."""
        if self._stream is not None:
            values = {name: _json_number(value) for name, value in report.values.items()}
            self._stream.write(json.dumps(values) + "\n")

    def close(self) -> None:
        """Close the file."""
        if self._stream is not None:
            self._stream.close()


def _lines(path: Path) -> list[str]:
    if not path.exists():
        return []
    # A line without its end was cut by a crash.
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def _step(line: str) -> int:
    return int(json.loads(line)["step"])


def _json_number(value: float | int) -> float | int | None:
    return value if math.isfinite(value) else None
