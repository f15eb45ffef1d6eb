"""Writes a checkpoint's tensors behind the training loop.

Tensors are copied to host memory at once, so that training may go on and change them; a thread then writes,
flushes and checksums this rank's files. megatron-core's own way forks a process for each file and another for
a queue between them: a fork of a process with communication threads may hang, and starting them takes longer
than writing a small checkpoint.
"""

from __future__ import annotations

import queue
import threading
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from torch.distributed.checkpoint.api import CheckpointException

from emu3_megatron.training import checkpoint_files as files
from emu3_megatron.training.checkpoint_files import CheckpointError


class BackgroundWrite:
    """The writing of one checkpoint, seen from one rank. All ranks make and finish it together.

    Args:
        state: megatron-core's sharded state; its tensors may change once this returns.
        folder: Where to write; it exists and is empty.
        content_metadata: What megatron-core keeps of the content.
    """

    def __init__(self, state: dict[str, Any], folder: Path, content_metadata: dict[str, Any]) -> None:
        self.folder = folder
        self.sealed: dict[str, dict[str, int | str]] = {}
        """This rank's files, once written: see `checkpoint_files.seal`."""
        # megatron-core would start a process to hold this queue; between threads a plain one will do.
        filesystem_async._results_queue = queue.Queue()
        self._request = dist_checkpointing.save(
            state, str(folder), async_sharded_save=True, content_metadata=content_metadata
        )
        self._thread: threading.Thread | None = None
        if self._request.async_fn is not None:
            transforms = self._request.async_fn.args[0]
            _, live, results = self._request.async_fn_args
            buckets = [_own_copy(bucket) for bucket in live]
            # No daemon: ended half way through torch's C++, it would abort the process (see BlockStore).
            self._thread = threading.Thread(
                target=self._write, args=(transforms, buckets, results), name="checkpoint"
            )
            self._thread.start()

    @property
    def is_writing(self) -> bool:
        """Whether this rank's thread is still at work."""
        return self._thread is not None and self._thread.is_alive()

    def finish(self) -> None:
        """Wait for this rank's files, then write what describes the files of all ranks.

        Raises:
            CheckpointError: some rank could not write; all ranks raise it.
        """
        if self._thread is not None:
            self._thread.join()
        try:
            for finalize in self._request.finalize_fns:
                finalize()
        except CheckpointException as error:
            causes = "; ".join(f"rank {rank}: {failure[0]}" for rank, failure in error.failures.items())
            raise CheckpointError(
                f"{self.folder} could not be written ({causes or 'see the first rank'}); "
                f"make room or repair the disk"
            ) from error

    def _write(self, transforms: list[Any], buckets: list[Any], results: queue.Queue[Any]) -> None:
        """The thread: every file of this rank, one after another."""
        try:
            written = {}
            for number, bucket in enumerate(buckets):
                outcome = _write_bucket(transforms, number, bucket)
                if isinstance(outcome, Exception):
                    raise outcome
                written[number] = outcome
            self.sealed = files.seal(self.folder, [Path(name) for name, _, _ in buckets])
            results.put(written)
        except Exception as error:
            results.put(error)  # `finish` tells it to all ranks


def _own_copy(bucket: Any) -> Any:
    """A bucket whose tensors are in host memory that nothing else writes to."""
    name, key, (plain, tensors) = bucket
    copies = [(item, tensor.clone() if tensor.is_cpu else tensor.cpu()) for item, tensor in tensors]
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
