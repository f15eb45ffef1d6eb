"""Train a model.

::

    torchrun --nproc-per-node 2 -m emu3_megatron.training --config examples/configs/tiny.yaml --trainer.steps
    50
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from emu3_megatron.errors import EXIT_USER_ERROR, UserError, one_line, run_main
from emu3_megatron.parallel import platform
from emu3_megatron.parallel.groups import destroy_parallel, initialize_parallel, is_first_to_report
from emu3_megatron.parallel.platform import Platform
from emu3_megatron.training import command_line, log
from emu3_megatron.training.capabilities import report
from emu3_megatron.training.config import TrainingConfig
from emu3_megatron.training.data import TrainingData
from emu3_megatron.training.estimate import describe
from emu3_megatron.training.objective import NextToken, ObjectiveFactory
from emu3_megatron.training.trainer import Trainer


def main() -> None:
    """Pre-train, or train on with other data and weights of the loss."""
    launch(TrainingConfig, NextToken.make)


DataOpener = Callable[[Any, Platform], TrainingData]
"""Opens what a configuration names; process groups exist by then."""


def open_data(config: TrainingConfig, _machine: Platform) -> TrainingData:
    """Windows of documents, as for pre-training."""
    return TrainingData.open(config)


def launch(kind: type[TrainingConfig], objective: ObjectiveFactory, data: DataOpener = open_data) -> None:
    """Report what the machine has, explain a configuration, or train: the whole command-line program.

    Args:
        kind: The configuration that the command line fills.
        objective: What the windows are trained for.
        data: Opens the windows.
    """
    if command_line.CAPABILITIES in sys.argv[1:]:
        print(report())
        return
    asked = command_line.parse_once(kind, sys.argv[1:])
    if asked.dry_run:
        vocabulary = TrainingData.vocabulary_if_ready(asked.config.data)
        sizes = (vocabulary.size, vocabulary.padded_size) if vocabulary else (None, None)
        print(command_line.to_yaml(asked.config))
        print(describe(asked.config, asked.world_size, *sizes))
        return
    log.set_up()
    try:
        train(asked.config, objective, data)
    except (ValueError, OSError) as error:
        if not is_first_to_report(one_line(error)):
            sys.exit(EXIT_USER_ERROR)
        raise


def train(
    config: TrainingConfig, objective: ObjectiveFactory = NextToken.make, data: DataOpener = open_data
) -> None:
    """One run on this rank, from its process groups to its last checkpoint."""
    try:
        machine = platform.install(config.platform)
    except platform.PlatformError as error:
        raise UserError(str(error)) from error
    initialize_parallel(config.parallel, machine, config.seed, config.guard.collective_timeout)
    Trainer(config, machine, data(config, machine), objective).fit()
    destroy_parallel()


if __name__ == "__main__":
    run_main(main)
