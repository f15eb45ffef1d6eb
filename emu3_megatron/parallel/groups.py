"""Process groups and random states."""

from __future__ import annotations

import atexit
import hashlib
from datetime import timedelta

import torch

from emu3_megatron import processes
from emu3_megatron.parallel.config import ParallelConfig
from emu3_megatron.parallel.platform import Platform

_SEED_STRIDE_DATA = 10_007
_SEED_STRIDE_PIPELINE = 101


def initialize_parallel(
    parallel: ParallelConfig, platform: Platform, seed: int, timeout: timedelta = processes.LONGEST_WAIT
) -> None:
    """Start torch.distributed if needed, build megatron-core's groups, seed the random states.

    Processes find one another by ``MASTER_ADDR``, ``MASTER_PORT``, ``RANK`` and ``WORLD_SIZE``, which
    torchrun sets and the SLURM scripts too. A single process needs no launcher: without them a world of one
    is made.
    Dropout draws differ between data-, context- and pipeline-parallel ranks (they hold other tokens or other
    layers), are equal on tensor-parallel ranks for what they hold in common, and differ for what they split.

    Args:
        parallel: The layout.
        platform: What `platform.install` returned.
        seed: Base of the random states of dropout. Initial weights do not depend on them.
        timeout: How long a collective of any group waits for the others before it fails.

    Raises:
        LayoutError: the layout is invalid or does not fit the number of processes.
    """
    from megatron.core import parallel_state, tensor_parallel

    parallel.validate()
    if not torch.distributed.is_initialized():
        processes.join(platform.backend, timeout)
        if platform.backend == "gloo":
            atexit.register(destroy_parallel)
    parallel.data_parallel_size(torch.distributed.get_world_size())
    parallel_state.initialize_model_parallel(
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.virtual_pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        distributed_timeout_minutes=timeout.total_seconds() / 60,  # torch's default is not megatron-core's
    )
    data_rank = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    pipeline_rank = parallel_state.get_pipeline_model_parallel_rank()
    own_seed = seed + _SEED_STRIDE_DATA * data_rank + _SEED_STRIDE_PIPELINE * pipeline_rank
    torch.manual_seed(own_seed)
    tensor_parallel.model_parallel_cuda_manual_seed(own_seed)


def is_first_to_report(message: str) -> bool:
    """Whether no other process has asked this with the same message; True where they cannot be asked.

    An error that all ranks find is so reported once, and one that a single rank finds is not lost.
    """
    if not torch.distributed.is_initialized():
        return True
    key = "reported/" + hashlib.sha256(message.encode()).hexdigest()
    try:
        return torch.distributed.distributed_c10d._get_default_store().add(key, 1) == 1
    except RuntimeError:  # the process that holds the store is gone
        return True


def destroy_parallel() -> None:
    """Undo `initialize_parallel`, torch.distributed included; does nothing where nothing was begun."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    # It forgets some groups, and the threads of a group end with its last reference.
    for name, value in vars(parallel_state).items():
        if isinstance(value, torch.distributed.ProcessGroup):
            setattr(parallel_state, name, None)
    processes.leave()
