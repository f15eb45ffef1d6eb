"""Add a callback: stop a run once its loss is low enough.

python examples/guides/callback.py --config examples/configs/tiny.yaml --trainer.steps 20
"""

from __future__ import annotations

import sys

from emu3_megatron.errors import run_main
from emu3_megatron.parallel import platform
from emu3_megatron.parallel.groups import destroy_parallel, initialize_parallel
from emu3_megatron.training import command_line
from emu3_megatron.training.callbacks import Callback
from emu3_megatron.training.data import TrainingData
from emu3_megatron.training.metrics import StepReport
from emu3_megatron.training.trainer import Trainer


# --8<-- [start:callback]
class StopWhenGood(Callback):
    """Save and end the run when the loss of a step is below `loss` (in nats)."""

    def __init__(self, loss: float) -> None:
        self.loss = loss
        self.stopped_at: int | None = None

    def on_step(self, trainer: Trainer, report: StepReport) -> None:
        """`report` is the same on all ranks, so all of them stop at the same step."""
        loss = report.values["loss"]
        if loss is not None and loss < self.loss:
            self.stopped_at = trainer.progress.step
            trainer.stop()


# --8<-- [end:callback]


# --8<-- [start:main]
def train(arguments: list[str], callback: Callback) -> None:
    """A run with one more callback; every other part is as `python -m emu3_megatron.training` has it."""
    config = command_line.parse(arguments).config
    machine = platform.install(config.platform)
    initialize_parallel(config.parallel, machine, config.seed)
    Trainer(config, machine, TrainingData.open(config), callbacks=[callback]).fit()
    destroy_parallel()


# --8<-- [end:main]

if __name__ == "__main__":
    run_main(lambda: train(sys.argv[1:], StopWhenGood(5.0)))
