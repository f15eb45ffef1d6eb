"""Writes a checkpoint's tensors behind the training loop.

Tensors are copied to host memory at once, so that training may go on and change them; a thread then writes,
flushes and checksums this rank's files. megatron-core's own way forks a process for each file and another for
a queue between them: a fork of a process with communication threads may hang, and starting them takes longer
than writing a small checkpoint.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing import state_dict_utils
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies import torch as torch_dist
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.state_dict_saver import save_state_dict_async_plan

from emu3_megatron.training import checkpoint_files as files
from emu3_megatron.training.checkpoint_files import CheckpointError
from emu3_megatron.training.checkpoint_metadata import SHARDED_BACKEND, write_format
from emu3_megatron.training.modules import is_rank_zero

FILES_PER_RANK = 2
"""Files over which a rank spreads its tensors."""


def on_rank_zero(folder: Path, act: Callable[[], None]) -> None:
    """Let rank 0 do what is done once for a checkpoint; all ranks call it together.

    Raises:
        CheckpointError: it could not; all ranks raise it, so that none waits for another.
    """
    problem = None
    if is_rank_zero():
        try:
            act()
        except OSError as error:
            problem = str(error)
    shared = [problem]
    torch.distributed.broadcast_object_list(shared)
    if shared[0] is not None:
        raise CheckpointError(
            f"{folder} could not be written (rank 0: {shared[0]}); make room or repair the disk"
        )


class BackgroundWrite:
    """The writing of one checkpoint, seen from one rank. All ranks make and finish it together.

    Args:
        state: megatron-core's sharded state; its tensors may change once this returns.
        folder: Where to write; it exists and is empty.
        content_metadata: What megatron-core keeps of the content.

    Raises:
        CheckpointError: rank 0 could not write what stands before the tensors; all ranks raise it.
    """

    def __init__(self, state: dict[str, Any], folder: Path, content_metadata: dict[str, Any]) -> None:
        self.folder = folder
        self._sealed: dict[str, dict[str, int | str]] = {}
        self._results: list[Any] = []
        self._problem: str | None = None
        on_rank_zero(folder, lambda: write_format(folder, content_metadata))
        live = _host_storages(state)
        self._writer, self._metadata = _plan(state, folder)
        write, _, arguments = self._writer.get_save_function_and_args()
        self._writer.write_buckets = None  # or it would hold tensors until the end
        self._thread: threading.Thread | None = None
        if write is not None:
            transforms = write.args[0]
            buckets = [_own_copy(bucket, live) for bucket in arguments[1]]
            del arguments  # the thread drops each tensor once it is written
            # No daemon: ended half way through torch's C++, it would abort the process (see BlockStore).
            self._thread = threading.Thread(target=self._write, args=(transforms, buckets), name="checkpoint")
            self._thread.start()

    @property
    def is_writing(self) -> bool:
        """Whether this rank's thread is still at work."""
        return self._thread is not None and self._thread.is_alive()

    def finish(self) -> dict[str, dict[str, int | str]]:
        """Wait for the files of all ranks, then write what describes them.

        Returns:
            On rank 0, what all ranks wrote and sealed: see `checkpoint_files.seal`.

        Raises:
            CheckpointError: some rank could not write; all ranks raise it.
        """
        if self._thread is not None:
            self._thread.join()
        problems: list[str | None] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(problems, self._problem)
        causes = [f"rank {rank}: {problem}" for rank, problem in enumerate(problems) if problem is not None]
        if causes:
            raise CheckpointError(
                f"{self.folder} could not be written ({'; '.join(causes)}); make room or repair the disk"
            )
        written: list[Any] | None = [None] * len(problems) if is_rank_zero() else None
        torch.distributed.gather_object((self._results, self._sealed), written)
        on_rank_zero(
            self.folder,
            lambda: self._writer.finish(self._metadata, [results for results, _ in written or []]),
        )
        return {name: entry for _, sealed in written or [] for name, entry in sealed.items()}

    def _write(self, transforms: list[Any], buckets: list[Any]) -> None:
        """The thread: every file of this rank, one after another."""
        try:
            paths = [Path(name) for name, _, _ in buckets]
            for number in range(len(paths)):
                outcome = _write_bucket(transforms, number, buckets.pop(0))  # gone once it is written
                if isinstance(outcome, Exception):
                    raise outcome
                self._results += outcome
            self._sealed = files.seal(self.folder, paths)
        except Exception as error:
            self._problem = str(error) or type(error).__name__  # `finish` tells it to all ranks


def _plan(state: dict[str, Any], folder: Path) -> tuple[Any, Any]:
    """Agree with all ranks on who writes what.

    These are the parts that megatron-core's own `save` consists of, which are the same in every version that
    we support; `save` itself stores plain values where each of them wants, and asks for packages of its own.

    Returns:
        megatron-core's writer of this rank's tensors, and on rank 0 the description of all tensors.
    """
    sharded, _ = state_dict_utils.save_preprocess(state)
    # Left alone, the first rank of every data-parallel group would write all that the group holds.
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    strategy = torch_dist.TorchDistSaveShardedStrategy(*SHARDED_BACKEND)
    FullyParallelSaveStrategyWrapper(strategy, group).apply_saving_parallelization(sharded)
    by_key, _, _ = torch_dist._replace_state_dict_keys_with_sharded_keys(sharded, keep_only_main_replica=True)
    # megatron-core would start a process to hold this queue; nothing is put into it here.
    filesystem_async._results_queue = queue.Queue()
    writer = filesystem_async.FileSystemWriterAsync(folder, thread_count=FILES_PER_RANK)
    (_, metadata, _), *_ = save_state_dict_async_plan(
        torch_dist.mcore_to_pyt_state_dict(by_key),
        writer,
        planner=torch_dist.MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
    )
    return writer, metadata


def _host_storages(state: dict[str, Any]) -> set[int]:
    """Addresses of host memory that training may write to after the save began.

    Where weights are on a GPU there is none: what is in host memory then was gathered there for the save.
    """
    data = (getattr(value, "data", None) for value in nested_values(state))
    tensors = [tensor for tensor in data if isinstance(tensor, torch.Tensor)]
    if any(tensor.is_cuda for tensor in tensors):
        return set()
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


def _own_copy(bucket: Any, live: set[int]) -> Any:
    """A bucket whose tensors are in host memory that nothing else writes to.

    megatron-core has copied those already that were a part of a larger piece of host memory.
    """
    name, key, (plain, tensors) = bucket
    copies = [
        (item, tensor.clone() if tensor.untyped_storage().data_ptr() in live else tensor.cpu())
        for item, tensor in tensors
    ]
    return name, key, (plain, copies)


def _write_bucket(transforms: list[Any], number: int, bucket: Any) -> Any:
    """Write one file with megatron-core's writer; what it wrote, or its exception."""
    outcome: queue.Queue[Any] = queue.Queue()
    count: queue.Queue[int] = queue.Queue()
    count.put(number)
    filesystem_async.FileSystemWriterAsync.write_preloaded_data(
        transforms, number, bucket, outcome, count, use_fsync=True
    )
    return outcome.get()[1]
