"""A rank's own part of a step: what it would take if it never waited for another replica."""

from __future__ import annotations

import time

import torch


class Stopwatch:
    """Seconds from the start of a step's first forward pass to this rank's own gradients.

    What follows, the reduction over data-parallel ranks, ends for all ranks when the slowest one has come; so
    only the time before it tells who that is. Exchanges inside a replica (tensor, context and pipeline
    parallelism) are in it: of the ranks of a slow replica all are slow.

    On a GPU the work is timed by events, without waiting for it; they are read a step later.

    Args:
        on_gpu: Whether the work is queued on a CUDA device.
    """

    def __init__(self, *, on_gpu: bool) -> None:
        self._on_gpu = on_gpu
        self._began = 0.0
        self._seconds = 0.0
        self._events: list[torch.cuda.Event] = []

    def start(self) -> None:
        """The step begins. On a GPU the step before must have ended."""
        if not self._on_gpu:
            self._began = time.perf_counter()
            return
        if len(self._events) == 2:
            self._seconds = self._events[0].elapsed_time(self._events[1]) / 1000
        self._events.clear()
        self._mark()

    def stop(self) -> None:
        """This rank has its gradients."""
        if self._on_gpu:
            self._mark()
        else:
            self._seconds = time.perf_counter() - self._began

    @property
    def seconds(self) -> float:
        """Of the step between the last `start` and `stop`; on a GPU of the step before it, at first 0."""
        return self._seconds

    def _mark(self) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._events.append(event)
