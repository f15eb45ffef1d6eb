"""The watchdog ends processes that are slow or stuck, whoever holds the interpreter lock."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from ctypes import PyDLL
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from emu3_megatron.parallel.config import ParallelConfig
from emu3_megatron.training import __main__ as program
from emu3_megatron.training.callbacks import watchdog
from emu3_megatron.training.config import GuardConfig

HANG = 1e-5
"""Minutes."""


def end(folder: Path, then: Callable[[], object]) -> tuple[int, str]:
    """Exit code, and the stacks that are left, of a process that does something under a watchdog."""
    child = os.fork()
    if child == 0:
        callback: Any = watchdog.HangWatchdog(folder, HANG)
        callback.on_start(None)
        then()
        os._exit(77)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), (folder / "rank-00000.txt").read_text()


def run_for_ever() -> None:
    """Frames come and go, those of generators on the heap."""

    def count(depth: int) -> int:
        return 1 + sum(count(depth - 1) for _ in range(2 if depth else 0))

    while True:
        count(8)


@pytest.fixture(autouse=True)
def _rank_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)


def test_threads_that_run_are_written_down_and_do_not_crash(tmp_path: Path) -> None:
    """Without the interpreter lock one of a hundred ended by a signal."""
    for number in range(300):
        code, stacks = end(tmp_path / str(number), run_for_ever)
        assert code == 1
        assert " in end" in stacks


def test_a_thread_that_waits(tmp_path: Path) -> None:
    code, stacks = end(tmp_path, lambda: time.sleep(60))
    assert code == 1
    assert "<lambda>" in stacks


def test_a_thread_that_keeps_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "LOCK_SECONDS", 0.5)
    code, stacks = end(tmp_path, lambda: PyDLL(None).sleep(60))
    assert code == 1
    assert "<lambda>" in stacks


def test_a_closed_watchdog_leaves_nothing(tmp_path: Path) -> None:
    callback: Any = watchdog.HangWatchdog(tmp_path, 60)
    callback.on_start(None)
    callback.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("minutes", [0.0, 1e-5, 60.0, 600.0])
def test_collectives_of_a_run_fail_only_after_the_watchdogs_time(
    minutes: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise they end a run that only waits long, and one that hangs without its stacks."""
    given: list[timedelta] = []

    class Met(Exception):
        pass

    def meet(_parallel: Any, _platform: Any, _seed: int, timeout: timedelta) -> None:
        given.append(timeout)
        raise Met

    monkeypatch.setattr(program, "initialize_parallel", meet)
    guard = GuardConfig(hang_minutes=minutes)
    config: Any = SimpleNamespace(platform="cpu", parallel=ParallelConfig(), seed=0, guard=guard)
    with pytest.raises(Met):
        program.train(config)
    assert given[0] >= timedelta(hours=2)
    assert given[0] > timedelta(minutes=minutes)
