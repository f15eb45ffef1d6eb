"""Joining the processes of a launch, and leaving them before the interpreter ends."""

from __future__ import annotations

import atexit
import gc
import os
from datetime import timedelta
from typing import Any, cast

import torch

LONGEST_WAIT = timedelta(hours=2)
"""How long a collective waits for the others where nothing else is said: rank 0 may be hashing or writing
for longer than torch's own 10 (NCCL) or 30 minutes (gloo)."""


def join(backend: str, timeout: timedelta = LONGEST_WAIT) -> None:
    """Start torch.distributed: with the others of the launch, or as a world of one where there is no launch.

    The end of the process leaves it again, however that end comes, see `leave`.

    Args:
        backend: ``nccl`` or ``gloo``.
        timeout: How long a collective, and the start itself, waits for the others before it fails.
    """
    # Parameters of its functions have the default group of the time of their import as their default value,
    # which would keep the group, and its threads, beyond `leave`. torch.optim imports it at the first step.
    import torch.distributed.nn.functional

    if "RANK" in os.environ and "MASTER_ADDR" in os.environ:
        torch.distributed.init_process_group(backend, timeout=timeout)
    else:
        store = cast(Any, torch.distributed).HashStore()
        torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
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
