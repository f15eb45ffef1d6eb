"""The processes that share one conversion: they succeed together or fail together."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from emu3_megatron import processes

Result = TypeVar("Result")


def start() -> None:
    """Meet the other processes of a torchrun; one process alone needs no groups."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        processes.join("gloo")


def rank() -> int:
    """Number of this process; 0 without process groups."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def world_size() -> int:
    """Number of processes; 1 without process groups."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def together(work: Callable[[], Result]) -> list[Result]:
    """Do `work` on every process; the results of all, by rank.

    Raises:
        Exception: that of the first process that failed, on every process.
    """
    if world_size() == 1:
        return [work()]
    outcome: tuple[Any, Exception | None]
    try:
        outcome = (work(), None)
    except Exception as error:
        outcome = (None, _portable(error))
    gathered: list[Any] = [None] * world_size()
    torch.distributed.all_gather_object(gathered, outcome)
    for _, failure in gathered:
        if failure is not None:
            raise failure
    return [result for result, _ in gathered]


def on_first(work: Callable[[], Result]) -> Result:
    """Do `work` on rank 0; its result, or its exception, everywhere."""
    return together(lambda: work() if rank() == 0 else None)[0]  # type: ignore[return-value]


def _portable(error: Exception) -> Exception:
    """An exception that can be sent to another process: without what hangs on it."""
    kind = type(error)
    try:
        return kind(*error.args)
    except TypeError:
        return RuntimeError(f"{kind.__name__}: {error}")


def share(weights: list[int]) -> range:
    """The consecutive items that fall to this process when items of these weights are divided evenly."""
    total, size, own = sum(weights), world_size(), rank()
    bounds, passed, process = [0], 0, 0
    for index, weight in enumerate(weights):
        while process < size - 1 and (passed + weight / 2) * size >= total * (process + 1):
            bounds.append(index)
            process += 1
        passed += weight
    bounds += [len(weights)] * (size + 1 - len(bounds))
    return range(bounds[own], bounds[own + 1])
