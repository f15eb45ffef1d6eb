"""Worker processes that survive their files: what crashes or hangs a decoder is set aside, not the job."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Protocol

from emu3_megatron.curation.scoring import Key, failure
from emu3_megatron.curation.units import Score
from emu3_megatron.errors import MachineFault, UserError, one_line

ATTEMPTS = 2
"""Times that an entry may end its process, or stop it, before it is set aside; the first may be another's
fault (memory, a file system that stalls)."""


class Handler(Protocol):
    """Does one task."""

    def __call__(
        self, task: Any, announce: Callable[[Key | None], object], failures: Mapping[Key, Score]
    ) -> Any:
        """Do `task`, announcing each step; steps in `failures` have failed before."""
        ...


class _Worker:
    """One process and what it is at."""

    def __init__(self, make: Callable[[], Handler]) -> None:
        context = multiprocessing.get_context("spawn")  # decoders do not survive a fork
        self.connection, remote = context.Pipe()
        self.process: BaseProcess = context.Process(target=_serve, args=(remote, make), daemon=True)
        self.process.start()
        remote.close()
        self.task: Any = None
        self.at: Key | None = None
        self.since = time.monotonic()
        self.ready = False

    def end(self) -> None:
        """Kill the process."""
        self.connection.close()
        self.process.kill()
        self.process.join()


def run_tasks(
    tasks: Iterable[Any],
    make: Callable[[], Handler],
    *,
    processes: int,
    timeout: float,
    on_step: Callable[[], object] = lambda: None,
    on_result: Callable[[Any], object] = lambda result: None,
) -> dict[Any, Any]:
    """Do all tasks.

    Args:
        tasks: hashable, picklable.
        make: builds a handler in each process; picklable.
        processes: how many; 0 does the tasks here.
        timeout: seconds that may pass from one announcement to the next.
        on_step: called for every announcement of None.
        on_result: called with what the handler returned for a task; what it raises ends all.

    Returns:
        What the handler returned for each task.

    Raises:
        UserError: a handler raised one, or its process cannot start.
        OSError: a handler met a fault that did not pass.
    """
    if processes == 0:
        handler = make()
        results: dict[Any, Any] = {}
        for task in tasks:
            results[task] = handler(task, lambda key: on_step() if key is None else None, {})
            on_result(results[task])
        return results
    waiting = deque(tasks)
    if not waiting:
        return {}
    pool = _Pool(waiting, make, timeout, on_step, on_result)
    try:
        return pool.run(min(processes, len(waiting)))
    finally:
        for worker in pool.workers:
            worker.end()


class _Pool:
    """The tasks that wait, and the workers."""

    def __init__(
        self,
        waiting: deque[Any],
        make: Callable[[], Handler],
        timeout: float,
        on_step: Callable[[], object],
        on_result: Callable[[Any], object],
    ) -> None:
        self.workers: list[_Worker] = []
        self._waiting, self._make, self._timeout = waiting, make, timeout
        self._on_step, self._on_result = on_step, on_result
        self._results: dict[Any, Any] = {}
        self._failures: dict[Any, dict[Key, Score]] = {}
        self._attempts: dict[tuple[Any, Key], int] = {}

    def run(self, processes: int) -> dict[Any, Any]:
        """Do all tasks; see `run_tasks`."""
        self.workers = [_Worker(self._make) for _ in range(processes)]
        while self._waiting or any(worker.task is not None for worker in self.workers):
            for worker in self.workers:
                if worker.ready and worker.task is None and self._waiting:
                    worker.task = self._waiting.popleft()
                    worker.since = time.monotonic()
                    worker.connection.send((worker.task, self._failures.get(worker.task, {})))
            for connection in wait([worker.connection for worker in self.workers], timeout=1.0):
                self._listen(next(worker for worker in self.workers if worker.connection is connection))
            for worker in list(self.workers):
                if worker.at is not None and time.monotonic() - worker.since > self._timeout:
                    reason = f"made no progress for {self._timeout:g} s and was given up, {ATTEMPTS} times"
                    self._replace(worker, reason, "TimeoutError")
        return self._results

    def _listen(self, worker: _Worker) -> None:
        """Take one message."""
        try:
            kind, value = worker.connection.recv()
        except (EOFError, ConnectionError):
            worker.process.join(5)
            reason = f"ends the process that reads it ({_ending(worker.process.exitcode)})"
            self._replace(worker, reason, "ProcessError")
            return
        if kind == "ready":
            worker.ready = True
        elif kind == "at":
            worker.at, worker.since = value, time.monotonic()
            if value is None:
                self._on_step()
        elif kind == "done":
            self._results[worker.task] = value
            worker.task = worker.at = None
            self._on_result(value)
        else:
            raise value

    def _replace(self, worker: _Worker, reason: str, error: str) -> None:
        """Start another process for the task, without the step that ended this one if it is to blame."""
        worker.end()
        task, at = worker.task, worker.at
        if task is None or at is None:
            raise UserError(
                f"a worker process ended before its work ({_ending(worker.process.exitcode)}); "
                "see what it wrote above, or run with --processes 0"
            )
        count = self._attempts[task, at] = self._attempts.get((task, at), 0) + 1
        if count >= ATTEMPTS:
            self._failures.setdefault(task, {})[at] = failure(reason, error)
        self._waiting.appendleft(task)
        self.workers[self.workers.index(worker)] = _Worker(self._make)


def _ending(code: int | None) -> str:
    """How a process ended, in words."""
    if code is not None and code < 0:
        return f"signal {signal.Signals(-code).name}"
    return f"exit code {code}"


def _serve(connection: Connection, make: Callable[[], Handler]) -> None:
    """Be a worker: take tasks until the other side is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    try:
        handler = make()
        connection.send(("ready", None))
        while True:
            task, failures = connection.recv()
            result = handler(task, lambda key: connection.send(("at", key)), failures)
            connection.send(("done", result))
    except (EOFError, BrokenPipeError, ConnectionError):
        return
    except (UserError, OSError, MemoryError) as error:
        connection.send(("failed", _plain_error(error)))


def _plain_error(error: Exception) -> Exception:
    """An error that can be sent between processes."""
    if isinstance(error, UserError):
        return UserError(one_line(error))
    return MachineFault(f"{one_line(error)} (a fault that did not pass; finished work is kept, run again)")
