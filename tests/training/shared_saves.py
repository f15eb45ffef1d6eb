"""Saves the same moment twice: shared by the data-parallel ranks, and by the first of each group alone.

As a program, under torchrun: ``shared_saves.py CONFIG FOLDER LAYOUTS.json``, where the file has the options
of every layout by name; into ``FOLDER/NAME/shared`` and ``FOLDER/NAME/alone``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def _main(config: str, folder: str, layouts: str) -> None:
    from megatron.core import parallel_state

    from emu3_megatron.parallel import platform
    from emu3_megatron.parallel.groups import destroy_parallel, initialize_parallel
    from emu3_megatron.training import checkpoint_writer, command_line, log
    from emu3_megatron.training.data import TrainingData
    from emu3_megatron.training.trainer import Trainer

    log.set_up()
    for name, options in json.loads(Path(layouts).read_text()).items():
        run = ["--run", f"{folder}/{name}", "--trainer.steps", "2", "--optimizer.warmup_steps", "0"]
        settings = command_line.parse(["--config", config, *run, *options]).config
        initialize_parallel(settings.parallel, platform.install("cpu"), settings.seed)
        trainer = Trainer(settings, platform.install("cpu"), TrainingData.open(settings))
        trainer.fit()
        sharing = checkpoint_writer.FullyParallelSaveStrategyWrapper.apply_saving_parallelization
        for kind, share in (("shared", sharing), ("alone", lambda self, state: None)):
            checkpoint_writer.FullyParallelSaveStrategyWrapper.apply_saving_parallelization = share
            trainer._checkpointer.folder = Path(folder) / name / kind
            trainer._checkpointer.save(trainer._record())
        checkpoint_writer.FullyParallelSaveStrategyWrapper.apply_saving_parallelization = sharing
        parallel_state.destroy_model_parallel()
    destroy_parallel()


if __name__ == "__main__":
    from emu3_megatron.parallel import platform as _platform

    _platform.install("cpu")  # before anything imports megatron-core
    _main(*sys.argv[1:])
