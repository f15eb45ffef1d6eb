"""A run in which rank 0, and it alone, cannot write one file of each of its first saves.

As a program, under torchrun: ``failing_saves.py CONFIG RUN FILE ...``. It saves at every step; the first save
fails at the first of the files, and so on.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def _main(config: str, run: str, names: Sequence[str]) -> None:
    from emu3_megatron.parallel import platform
    from emu3_megatron.training import __main__ as training
    from emu3_megatron.training import command_line, log
    from emu3_megatron.training.checkpoint import Checkpointer

    left = [None, *names]
    begin = Checkpointer.begin

    def begin_the_next(self: Checkpointer, record: Any) -> None:
        if left:
            left.pop(0)
        begin(self, record)

    def refuse(event: str, arguments: tuple[Any, ...]) -> None:
        if event != "open" or not left or left[0] is None or not isinstance(arguments[0], str):
            return
        path, is_written = Path(arguments[0]), arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if is_written and left[0] in path.name and "checkpoints" in path.parts:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    if os.environ["RANK"] == "0":
        Checkpointer.begin = begin_the_next  # type: ignore[method-assign]
        sys.addaudithook(refuse)
    log.set_up()
    options = ["--checkpoint.interval", "1", "--checkpoint.keep", "100"]
    options += ["--trainer.steps", str(len(names) + 1)]
    platform.install("cpu")
    training.train(command_line.parse(["--config", config, "--run", run, *options]).config)


if __name__ == "__main__":
    _main(sys.argv[1], sys.argv[2], sys.argv[3:])
