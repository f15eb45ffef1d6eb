"""Which windows the steps of a run take, or took: the batch may grow, and may be another after a resume."""

from __future__ import annotations

import json
from bisect import bisect_right
from pathlib import Path

from emu3_megatron.errors import UserError
from emu3_megatron.training.config import TrainerConfig

METRICS_FILE = "metrics.jsonl"
"""In a run's folder: a line for each step, with the windows taken up to it."""


class ConsumedWindows:
    """Windows taken by the steps of a run: from its metrics as far as they go, then from its configuration.

    Args:
        folder: Of the run; it need not have metrics.
        trainer: The run's configuration of today.

    Raises:
        UserError: a line of the metrics is damaged; names the file.
    """

    def __init__(self, folder: Path, trainer: TrainerConfig) -> None:
        self._trainer = trainer
        recorded = {0: 0, **_recorded(folder / METRICS_FILE)}
        self._steps = sorted(recorded)
        self._windows = [recorded[step] for step in self._steps]
        self.last_step = max(trainer.steps, self._steps[-1])
        """The last step that the run took or will take, from 1."""

    def up_to(self, step: int) -> int:
        """Windows of the first `step` steps together."""
        place = bisect_right(self._steps, step) - 1
        rest = range(self._steps[place], step)  # the configuration counts steps from 0
        return self._windows[place] + sum(map(self._trainer.batch_size, rest))

    def of_step(self, step: int) -> range:
        """Numbers of the windows of a step, counted from 1 as in the log.

        Raises:
            UserError: the run has no such step.
        """
        if not 1 <= step <= self.last_step:
            raise UserError(
                f"step {step}: steps count from 1, as in the log, and the run ends with step "
                f"{self.last_step} (trainer.steps)"
            )
        return range(self.up_to(step - 1), self.up_to(step))


def _recorded(path: Path) -> dict[int, int]:
    """Windows taken up to each step, by step."""
    if not path.is_file():
        return {}
    recorded = {}
    with open(path, "rb") as stream:
        for line in stream:
            if not line.endswith(b"\n"):
                break  # cut by a crash, or not yet written
            try:
                values = json.loads(line)
                recorded[int(values["step"])] = int(values["windows"])
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{path}: line {line[:60]!r} is damaged ({error}): move it away") from error
    return recorded
