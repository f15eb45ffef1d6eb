"""Runs in forked processes: what takes long, importing, is done once; then every start takes a second.

The process that forks must have called `platform.install("cpu")` and must not be part of a process group.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

# What the trainer imports when it is made: in every fork again, if not here.
import megatron.core.dist_checkpointing
import megatron.core.distributed
import megatron.core.optimizer
import megatron.core.pipeline_parallel  # noqa: F401

import emu3_megatron.model.build  # noqa: F401
from emu3_megatron.parallel import platform
from emu3_megatron.training import command_line, trainer

FORK = multiprocessing.get_context("fork")


def train(arguments: list[str], environment: dict[str, str] | None = None) -> None:
    """Train on this rank to the end."""
    from emu3_megatron.parallel.groups import initialize_parallel
    from emu3_megatron.training.data import TrainingData

    os.environ.update(environment or {})
    settings = command_line.parse(arguments).config
    machine = platform.install("cpu")
    initialize_parallel(settings.parallel, machine, settings.seed)
    Path(settings.run).mkdir(parents=True, exist_ok=True)
    trainer.Trainer(settings, machine, TrainingData.open(settings)).fit()


def start(arguments: list[str], processes: int = 1) -> list[BaseProcess]:
    """Start a run over so many processes."""
    ranks: list[BaseProcess] = []
    port = free_port()
    for rank in range(processes):
        environment = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(processes),
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(port),
        }
        process = FORK.Process(target=train, args=(arguments, environment if processes > 1 else None))
        process.start()
        ranks.append(process)
    return ranks


def finish(ranks: list[BaseProcess]) -> bool:
    """Wait for the end of a run; whether all ranks ended well."""
    for process in ranks:
        process.join()
    return all(process.exitcode == 0 for process in ranks)


def kill(ranks: list[BaseProcess]) -> None:
    """kill -9 for every rank."""
    for process in ranks:
        if process.pid is not None and process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
    finish(ranks)


def wait_for_step(run: Path, step: int, ranks: list[BaseProcess]) -> bool:
    """Wait until a run that has just been started writes `step` to its metrics; False if it ended before."""
    path = run / "metrics.jsonl"
    before = path.stat().st_mtime_ns if path.exists() else 0  # lines of an earlier start do not count
    while not path.exists() or path.stat().st_mtime_ns == before or path.read_text().count("\n") < step:
        if not all(process.is_alive() for process in ranks):
            return False
        time.sleep(0.001)
    return True


def free_port() -> int:
    """A TCP port that nobody listens at."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return int(listener.getsockname()[1])
