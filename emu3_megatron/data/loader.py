"""From windows to batches of tensors: any layout, any number of workers, the same data."""

from __future__ import annotations

import atexit
import itertools
import signal
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from emu3_megatron.data.balance import spread
from emu3_megatron.data.plan import Plan
from emu3_megatron.data.window import NO_SOURCE, Window
from emu3_megatron.errors import UserError
from emu3_megatron.grammar import Modality

IGNORED_BY_WORKERS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""A scheduler signals the whole process group; the trainer decides what to do, and its workers live on until
it has saved."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """A micro-batch of B windows of S tokens, laid end to end: CPU tensors."""

    tokens: torch.Tensor
    """int64 ``[1, B * S]``."""
    labels: torch.Tensor
    """int64 ``[1, B * S]``: the next token of the same document; 0 where there is none."""
    modality: torch.Tensor
    """uint8 ``[1, B * S]``: `Modality` of the label; PADDING where there is none."""
    cu_seqlens: torch.Tensor
    """int32 ``[D + 1]``: borders of the segments over all B windows; attention stays within them."""
    max_seqlen: int
    """Tokens of the longest segment."""
    source: torch.Tensor
    """int16 ``[D]``: source of each segment, as in `Mixture.names`; -1 for padding."""
    document: torch.Tensor
    """int64 ``[D]``: number of each segment's document in its source's dataset; -1 for padding."""
    windows: tuple[int, ...]
    """Numbers of the B windows in the plan."""
    padding_tokens: int
    """Places without a document's token: alignment and ends of windows."""

    @classmethod
    def collate(cls, windows: list[Window]) -> Batch:
        """Lay windows end to end."""
        size = len(windows[0].tokens)
        borders = [np.zeros(1, dtype=np.int32)]
        borders += [window.cu_seqlens[1:] + place * size for place, window in enumerate(windows)]
        cu_seqlens = np.concatenate(borders)

        def row(name: str) -> torch.Tensor:
            return torch.from_numpy(np.concatenate([getattr(window, name) for window in windows]))[None]

        return cls(
            tokens=row("tokens"),
            labels=row("labels"),
            modality=row("modality"),
            cu_seqlens=torch.from_numpy(cu_seqlens.astype(np.int32, copy=False)),
            max_seqlen=int(np.diff(cu_seqlens).max()),
            source=row("source")[0],
            document=row("document")[0],
            windows=tuple(window.index for window in windows),
            padding_tokens=sum(size - int(window.length.sum()) for window in windows),
        )

    @property
    def num_targets(self) -> int:
        """Places that have a label."""
        return int((self.modality != Modality.PADDING).sum())

    @property
    def source_of_tokens(self) -> torch.Tensor:
        """int16 ``[1, B * S]``: source of every place; -1 for the padding at the ends of windows."""
        return torch.repeat_interleave(self.source, self.cu_seqlens.diff().long())[None]

    @property
    def num_documents(self) -> int:
        """Segments that hold documents."""
        return int((self.source != NO_SOURCE).sum())


@dataclass(frozen=True, kw_only=True, eq=False)
class _Step:
    """The micro-batches of a step, joined: how a worker sends them.

    Every tensor that crosses a process costs a descriptor for as long as it lives, and a handshake; a step of
    512 micro-batches would have 3,072 of them.
    """

    fields: dict[str, torch.Tensor]
    """Each tensor of `Batch`, over all micro-batches along its last dimension."""
    sizes: dict[str, list[int]]
    """Its length in each of them."""
    rest: list[dict[str, Any]]
    """What else each of them holds."""

    @classmethod
    def join(cls, batches: list[Batch]) -> _Step:
        """Lay micro-batches end to end."""
        tensors: dict[str, list[torch.Tensor]] = {}
        rest: list[dict[str, Any]] = [{} for _ in batches]
        for batch, others in zip(batches, rest, strict=True):
            for field in fields(Batch):
                value = getattr(batch, field.name)
                if isinstance(value, torch.Tensor):
                    tensors.setdefault(field.name, []).append(value)
                else:
                    others[field.name] = value
        return cls(
            fields={name: torch.cat(parts, dim=-1) for name, parts in tensors.items()},
            sizes={name: [part.shape[-1] for part in parts] for name, parts in tensors.items()},
            rest=rest,
        )

    def split(self) -> list[Batch]:
        """The micro-batches, as views."""
        names = list(self.fields)
        parts = [self.fields[name].split(self.sizes[name], dim=-1) for name in names]
        return [
            Batch(**dict(zip(names, tensors, strict=True)), **others)
            for tensors, others in zip(zip(*parts, strict=True), self.rest, strict=True)
        ]


class WindowLoader:
    """Iterates optimizer steps; yields for each the list of micro-batches of one data-parallel rank.

    Step ``k`` (from 0) uses the windows ``start + k * G`` to ``start + (k + 1) * G - 1`` of the plan, where G
    is the global batch size. So the windows of a step depend on nothing but the plan, `start` and G. The
    whole state is `windows_consumed`: give it as `start` to go on, with any other layout.

    Within a step, `balance.spread` gives every rank as many windows and, as nearly as possible, the same
    work. With one rank, or one window a rank, there is nothing to spread: micro-batch ``j`` of rank ``r``
    then holds the windows from ``(j * DP + r) * B`` on.

    Args:
        plan: The windows.
        start: Windows consumed before, over all ranks.
        global_batch_size: Windows of a step, over all ranks; a multiple of micro batch times ranks.
        micro_batch_size: Windows of a micro-batch.
        data_parallel_rank: This rank.
        data_parallel_size: Number of ranks.
        num_workers: Processes that build batches ahead; 0 builds them in the caller.
        prefetch_steps: Steps that each worker builds ahead.
        balance: Spread heavy windows over the ranks; without it micro-batches keep the plan's order.

    Raises:
        UserError: sizes that do not divide, or a rank out of range.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        start: int = 0,
        global_batch_size: int,
        micro_batch_size: int = 1,
        data_parallel_rank: int = 0,
        data_parallel_size: int = 1,
        num_workers: int = 0,
        prefetch_steps: int = 2,
        balance: bool = True,
    ) -> None:
        if min(global_batch_size, micro_batch_size, data_parallel_size, prefetch_steps) < 1:
            raise UserError(
                f"global_batch_size={global_batch_size}, micro_batch_size={micro_batch_size}, "
                f"data_parallel_size={data_parallel_size}, prefetch_steps={prefetch_steps}: all at least 1"
            )
        if global_batch_size % (micro_batch_size * data_parallel_size):
            raise UserError(
                f"global_batch_size={global_batch_size} must be a multiple of micro_batch_size="
                f"{micro_batch_size} times data_parallel_size={data_parallel_size}: change one of them"
            )
        if not 0 <= data_parallel_rank < data_parallel_size:
            raise UserError(f"data_parallel_rank={data_parallel_rank} must lie in [0, {data_parallel_size})")
        if start < 0 or num_workers < 0:
            raise UserError(f"start={start} and num_workers={num_workers} must not be negative")
        self.windows_consumed = start
        """Windows that all ranks have been given: the state to save, and the `start` to resume with."""
        self._step_windows = global_batch_size
        self._reader = _StepReader(
            plan,
            global_batch_size,
            micro_batch_size,
            rank=data_parallel_rank,
            ranks=data_parallel_size,
            balance=balance,
        )
        self._num_workers, self._prefetch_steps = num_workers, prefetch_steps

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches per step and rank."""
        return self._reader.num_micro_batches

    def __iter__(self) -> Iterator[list[Batch]]:
        """Steps without end, from `windows_consumed` on."""
        steps = itertools.count(self.windows_consumed, self._step_windows)
        if self._num_workers == 0:
            for first in steps:
                self.windows_consumed += self._step_windows
                yield self._reader.read(first)
            return
        # A thread that builds blocks must not be half way through one when the workers are forked.
        self._reader.plan.finish_background()
        loader = DataLoader(
            self._reader,
            sampler=steps,
            batch_size=None,
            num_workers=self._num_workers,
            prefetch_factor=self._prefetch_steps,
            worker_init_fn=_start_worker,
        )
        iterator: Any = iter(loader)
        # A worker ignores the signal by which multiprocessing would end it. Where an error holds this
        # generator to the very end of the process, only this hook keeps the process from waiting for ever.
        atexit.register(iterator._shutdown_workers)
        try:
            for step in iterator:
                if isinstance(step, Exception):
                    raise step
                self.windows_consumed += self._step_windows
                yield step.split()
        finally:
            atexit.unregister(iterator._shutdown_workers)
            iterator._shutdown_workers()


class _StepReader(Dataset["_Step | UserError | OSError"]):
    """What the workers hold: the first window of a step in, this rank's micro-batches out."""

    def __init__(
        self, plan: Plan, step_windows: int, micro_batch_size: int, *, rank: int, ranks: int, balance: bool
    ) -> None:
        self.plan = plan
        self._step_windows, self._micro_batch_size = step_windows, micro_batch_size
        self._rank, self._ranks, self._balance = rank, ranks, balance
        self.num_micro_batches = step_windows // (micro_batch_size * ranks)

    def windows(self, first: int) -> list[list[int]]:
        """Numbers of the windows of each micro-batch."""
        size, count = self._micro_batch_size, self.num_micro_batches
        if self._balance and self._ranks > 1 and size * count > 1:
            places = spread(self.plan.costs(first, self._step_windows), self._ranks)[self._rank]
            return (first + places).reshape(count, size).tolist()
        starts = [first + (micro_batch * self._ranks + self._rank) * size for micro_batch in range(count)]
        return [list(range(start, start + size)) for start in starts]

    def read(self, first: int) -> list[Batch]:
        """The micro-batches of the step that begins with window `first`."""
        numbers = self.windows(first)
        windows = self.plan.windows(list(itertools.chain.from_iterable(numbers)))
        batches = [Batch.collate(list(itertools.islice(windows, len(each)))) for each in numbers]
        self.plan.build_ahead(first + self._step_windows)
        return batches

    def __getitem__(self, first: Any) -> _Step | UserError | OSError:
        try:
            return _Step.join(self.read(first))
        except (UserError, OSError) as error:
            return error  # as a value: the loader would put a worker's traceback into the message


def _start_worker(_: int) -> None:
    """Leave signals to the trainer: a worker ends when its loader, or the trainer's process, does."""
    for number in IGNORED_BY_WORKERS:
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
