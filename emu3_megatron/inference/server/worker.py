"""The thread that owns the model, and the jobs that it works on.

Requests of all jobs share one session of the engine. The network's side (asyncio) sees a job as a stream of
events; nothing but `Worker.add`, `Job.cancel` and the events crosses between the two.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, Protocol

import torch

from emu3_megatron.errors import one_line
from emu3_megatron.inference.engine import Engine
from emu3_megatron.inference.request import Request
from emu3_megatron.inference.server.limits import Limits
from emu3_megatron.inference.session import OnTokens, Session, Ticket

log = logging.getLogger(__name__)

Event = dict[str, Any]
"""``{"type": ...}`` and more; the last of a job has the type ``done`` or ``error``."""

CLOSING = "the server is closing"
BROKEN = "the server is broken and must be restarted; its log has more"

PREVIEW_SHARE = 0.04
"""Most of the worker's time that goes into pictures of unfinished images."""


class Refused(Exception):
    """There are as many jobs as the server takes."""


class GivenUp(Exception):
    """Nobody waits for a job any more."""


class Down(Exception):
    """The server takes no jobs any more."""


class Work(Protocol):
    """What a job does on the worker's thread."""

    def requests(self, check: Callable[[], None]) -> list[tuple[Request, OnTokens]]:
        """What the engine has to do.

        `check` is called before every piece of work that takes long, and raises `GivenUp` where it is for
        nothing. Raises `ValueError` for what the client can put right.
        """
        ...

    def preview(self) -> Event | None:
        """What is new and dear to show, such as rows of a picture; None for nothing."""
        ...

    def news(self) -> Event | None:
        """What is new and costs nothing to tell."""
        ...

    def result(self, tickets: list[Ticket]) -> Event:
        """The last event, of the type ``done``."""
        ...


class Job:
    """One request of a client, seen from the network's side."""

    def __init__(self, work: Work, seconds: float) -> None:
        """`seconds`: it is given up after this time."""
        self.work = work
        self.tickets: list[Ticket] = []
        self.deadline = time.monotonic() + seconds
        self.cancelled = False
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()

    @property
    def given_up(self) -> bool:
        """Whether it was cancelled or took too long."""
        return self.cancelled or time.monotonic() > self.deadline

    def check(self) -> None:
        """Raise `GivenUp` where it is."""
        if self.given_up:
            raise GivenUp

    def cancel(self) -> None:
        """Give it up; the worker notices at its next step."""
        self.cancelled = True

    def tell(self, event: Event) -> None:
        """Pass an event to the network's side; from the worker's thread."""
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)
        except RuntimeError:  # the loop has ended, and nobody listens
            self.cancelled = True

    def fail(self, status: int, message: str) -> None:
        """Tell that there will be no result."""
        self.tell({"type": "error", "status": status, "message": message})

    async def events(self) -> AsyncIterator[Event]:
        """Everything the worker tells, up to the last event; who stops listening cancels the job."""
        try:
            while True:
                event = await self._events.get()
                yield event
                if event["type"] in ("done", "error"):
                    return
        finally:
            self.cancel()


class Worker:
    """Runs jobs until it is closed; `add` is called on the event loop, everything else here on its thread."""

    def __init__(self, engine: Engine, limits: Limits) -> None:
        self._engine = engine
        self._limits = limits
        self._session: Session = engine.session(max_rows=limits.rows, max_length=limits.length)
        self._wake = threading.Condition()
        self._new: list[Job] = []
        self._jobs: list[Job] = []
        self._open = 0
        self._closed = self._broken = False
        self._worked = self._previewed = self._last = 0.0
        self._thread = threading.Thread(target=self._run, name="generation", daemon=True)

    @property
    def jobs(self) -> int:
        """Jobs that run or wait."""
        return self._open

    @property
    def broken(self) -> bool:
        """Whether the thread has ended by a defect; nothing is generated until the server is restarted."""
        return self._broken

    def start(self) -> None:
        """Begin to work."""
        self._engine.model.eval()
        self._thread.start()

    def close(self) -> None:
        """Give up all jobs and end the thread."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()

    def add(self, job: Job) -> None:
        """Take a job. Raises `Refused` where there are too many, and `Down` where nobody would begin it."""
        with self._wake:
            if self._broken or self._closed:
                raise Down(BROKEN if self._broken else CLOSING)
            if self._open >= self._limits.jobs:
                raise Refused(
                    f"the server is busy with {self._open} requests, and takes no more than "
                    f"{self._limits.jobs}; try again later"
                )
            self._open += 1
            self._new.append(job)
            self._wake.notify()

    def _run(self) -> None:
        """Work until closed; however the thread ends, no job is left waiting for it."""
        reason = CLOSING
        try:
            self._work()
        except BaseException:  # who calls a thread hears of nothing
            reason = BROKEN
            log.exception("the server's thread has ended by a defect")
        finally:
            with self._wake:
                self._broken = reason == BROKEN
                left = [*self._jobs, *self._new]
                self._jobs, self._new, self._open = [], [], 0
            for job in left:
                job.fail(503, reason)

    @torch.no_grad()
    def _work(self) -> None:
        while True:
            with self._wake:
                while not (self._closed or self._new or self._jobs):
                    self._wake.wait()
                if self._closed:
                    return
                new, self._new = self._new, []
            for job in new:
                self._jobs.append(job)
                self._guarded(job, self._begin)
            self._give_up()
            self._step()
            for job in list(self._jobs):
                self._guarded(job, self._follow)

    def _begin(self, job: Job) -> None:
        try:
            job.check()
            for request, on_tokens in job.work.requests(job.check):
                job.tickets.append(self._session.submit(request, on_tokens))
        except GivenUp:
            pass  # `_give_up` comes next

    def _step(self) -> None:
        """One step of the engine for all; a defect in it ends every job, and not the server.

        Memory may be what was short, so that nothing is allocated anew: the session keeps its cache.
        """
        if not self._session.busy:
            return
        began = time.perf_counter()
        failed = False
        try:
            self._session.step()
        except Exception:
            log.exception("a step of generation failed")
            failed = True
        if failed:  # not above: the error would hold what the step had in memory
            for job in list(self._jobs):
                self._end(job)
                job.fail(500, "generation failed; the server's log has more")
            self._session.clear()
        self._worked += time.perf_counter() - began

    def _follow(self, job: Job) -> None:
        """Tell a job's news, and its result once there is one."""
        if (news := job.work.news()) is not None:
            job.tell(news)
        if all(ticket.done for ticket in job.tickets):
            result = job.work.result(job.tickets)
            self._end(job)
            job.tell(result)
        elif self._previewed + self._last <= PREVIEW_SHARE * self._worked:
            began = time.perf_counter()
            if (picture := job.work.preview()) is not None:
                job.tell(picture)
                cost = time.perf_counter() - began
                self._previewed += cost
                self._last = cost

    def _give_up(self) -> None:
        """End jobs that were cancelled or took too long."""
        for job in list(self._jobs):
            if job.given_up:
                self._end(job)
                job.fail(504, f"not ready within {self._limits.seconds:g} seconds; ask for less")

    def _guarded(self, job: Job, act: Callable[[Job], None]) -> None:
        """What goes wrong with one job is that job's."""
        try:
            act(job)
        except ValueError as error:
            self._end(job)
            job.fail(400, one_line(error))
        except Exception:
            log.exception("a request failed")
            self._end(job)
            job.fail(500, "the request failed; the server's log has more")

    def _end(self, job: Job) -> None:
        for ticket in job.tickets:
            self._session.cancel(ticket)
        self._jobs.remove(job)
        with self._wake:
            self._open -= 1
