"""Joining the processes of a launch, and leaving them before the interpreter ends."""

from __future__ import annotations

import atexit
import gc
import os
from typing import Any, cast

import torch


def join(backend: str) -> None:
    """Start torch.distributed: with the others of the launch, or as a world of one where there is no launch.

    The end of the process leaves it again, however that end comes, see `leave`.

    Args:
        backend: ``nccl`` or ``gloo``.
    """
    # Parameters of its functions have the default group of the time of their import as their default value,
    # which would keep the group, and its threads, beyond `leave`. torch.optim imports it at the first step.
    import torch.distributed.nn.functional

    if "RANK" in os.environ and "MASTER_ADDR" in os.environ:
        torch.distributed.init_process_group(backend)
    else:
        store = cast(Any, torch.distributed).HashStore()
        torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    # NCCL's threads hold no Python objects, and after an error might wait for the others.
    if backend == "gloo":
        atexit.register(leave)


def leave() -> None:
    """End torch.distributed; does nothing where it was not begun.

    A thread of gloo may still hold the last collective's tensors, which are Python objects. Freed while the
    interpreter shuts down they abort the process ("terminate called without an active exception"). The
    threads of a group end with the last reference to it.
    """
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        gc.collect()
