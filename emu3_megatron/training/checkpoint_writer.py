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
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from emu3_megatron.training import checkpoint_files as files
from emu3_megatron.training.checkpoint_files import CheckpointError
from emu3_megatron.training.modules import is_rank_zero


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
    _share(folder, problem)


def _share(folder: Path, problem: str | None) -> None:
    """Tell all ranks what rank 0 could not do, if anything; raise it on all."""
    shared = [problem]
    torch.distributed.broadcast_object_list(shared)
    if shared[0] is not None:
        raise CheckpointError(
            f"{folder} could not be written (rank 0: {shared[0]}); make room or repair the disk"
        )


class _Strategy(TorchDistSaveShardedStrategy):
    """megatron-core's way to save, shared by the ranks that hold equal copies, with its end left to us.

    Its own end leaves all other ranks waiting where rank 0 cannot write a file.
    """

    def __init__(self) -> None:
        super().__init__("torch_dist", 1)
        self.is_asked = False
        """Rank 0 has written what stands before the tensors, and has told so."""
        self.planned: Any = None
        """What came of planning: (writer, global metadata, ...)."""

    def async_save(self, sharded_state_dict: Any, checkpoint_dir: Any) -> Any:
        self.is_asked = True
        _share(Path(checkpoint_dir), None)
        # Left alone, the first rank of every data-parallel group would write all that the group holds.
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        FullyParallelSaveStrategyWrapper(self, group).apply_saving_parallelization(sharded_state_dict)
        return super().async_save(sharded_state_dict, checkpoint_dir)

    def _get_save_and_finalize_callbacks(self, writer: Any, save_state_dict_ret: Any) -> Any:
        self.planned = save_state_dict_ret
        return super()._get_save_and_finalize_callbacks(writer, save_state_dict_ret)


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
        self._strategy = _Strategy()
        self._sealed: dict[str, dict[str, int | str]] = {}
        self._results: list[Any] = []
        self._problem: str | None = None
        # megatron-core would start a process to hold this queue; nothing is put into it here.
        filesystem_async._results_queue = queue.Queue()
        live = _host_storages(state)
        request = self._plan(state, content_metadata)
        self._thread: threading.Thread | None = None
        if request.async_fn is not None:
            transforms = request.async_fn.args[0]
            buckets = [_own_copy(bucket, live) for bucket in request.async_fn_args[1]]
            # No daemon: ended half way through torch's C++, it would abort the process (see BlockStore).
            self._thread = threading.Thread(target=self._write, args=(transforms, buckets), name="checkpoint")
            self._thread.start()
        self._strategy.planned[0].write_buckets = None  # or the writer would hold tensors until the end

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
        on_rank_zero(self.folder, lambda: self._describe([results for results, _ in written or []]))
        return {name: entry for _, sealed in written or [] for name, entry in sealed.items()}

    def _plan(self, state: dict[str, Any], content_metadata: dict[str, Any]) -> Any:
        """Agree with all ranks on who writes what; rank 0 writes megatron-core's file of plain values."""
        try:
            return dist_checkpointing.save(
                state,
                str(self.folder),
                self._strategy,
                async_sharded_save=True,
                content_metadata=content_metadata,
            )
        except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
            if self._strategy.is_asked or not is_rank_zero():
                raise
            _share(self.folder, str(error))
            raise

    def _describe(self, results: list[list[Any]]) -> None:
        """Write megatron-core's two files about the files of all ranks."""
        writer, metadata, *_ = self._strategy.planned
        writer.finish(metadata, results)
        save_config(CheckpointingConfig(self._strategy.backend, self._strategy.version), str(self.folder))

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
