"""The loader: one integer of state; no layout and no number of workers changes the data."""

from __future__ import annotations

import hashlib
import itertools
import multiprocessing
import os
import random
import resource
import signal
import time
from collections.abc import Iterator
from dataclasses import fields
from multiprocessing.queues import SimpleQueue
from pathlib import Path

import pytest
import torch

from emu3_megatron.data import Mixture, Plan, Source
from emu3_megatron.data.loader import Batch, WindowLoader
from emu3_megatron.errors import UserError
from emu3_megatron.grammar import Modality

FORK = multiprocessing.get_context("fork")


@pytest.fixture
def plan(make_dataset) -> Plan:
    folders: tuple[Path, ...] = make_dataset("a", "p", 30), make_dataset("b", "t", 20, text=200)
    mixture = Mixture([Source(path=str(folder)) for folder in folders])
    return Plan(mixture, seed=1, context_length=128, block_draws=64, alignment=2)


def steps_of(plan: Plan, count: int, **options: int) -> list[list[Batch]]:
    return list(itertools.islice(WindowLoader(plan, global_batch_size=8, **options), count))


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_step_holds_the_same_windows_in_any_layout(
    plan: Plan, ranks: int, micro: int, workers: int
) -> None:
    loaded = [
        steps_of(
            plan, 3, micro_batch_size=micro, data_parallel_rank=rank, data_parallel_size=ranks,
            num_workers=workers if rank == 0 else 0,
        )
        for rank in range(ranks)
    ]  # fmt: skip
    for step in range(3):
        order = []
        for micro_batch in range(8 // (ranks * micro)):
            for rank in range(ranks):
                batch = loaded[rank][step][micro_batch]
                order += batch.windows
                for slot, index in enumerate(batch.windows):
                    window = plan.window(index)
                    here = slice(slot * 128, (slot + 1) * 128)
                    assert batch.tokens[0, here].tolist() == window.tokens.tolist()
                    assert batch.labels[0, here].tolist() == window.labels.tolist()
                    assert batch.modality[0, here].tolist() == window.modality.tolist()
        assert sorted(order) == list(range(step * 8, step * 8 + 8))


def test_kills_and_changed_layouts_change_no_step(plan: Plan) -> None:
    """Stopped at random steps and started again in another layout, over several epochs of both sources."""
    rng = random.Random(0)
    layouts = list(itertools.product((1, 2, 4), (1, 2), (0, 0, 0, 2)))
    first, consumed = 0, []
    while first < 320:
        ranks, micro, workers = rng.choice(layouts)
        stop = rng.randrange(1, 6)
        loaded = [
            steps_of(
                plan, stop, start=first, micro_batch_size=micro, data_parallel_rank=rank,
                data_parallel_size=ranks, num_workers=workers if rank == 0 else 0,
            )
            for rank in range(ranks)
        ]  # fmt: skip
        for step in range(stop):
            windows = sorted(index for rank in loaded for batch in rank[step] for index in batch.windows)
            consumed.append(windows)
        first += 8 * stop
    assert consumed == [list(range(start, start + 8)) for start in range(0, first, 8)]
    assert min(plan.statistics(first).epochs_per_source.values()) > 2


def segments_of(batch: Batch) -> Iterator[tuple[int, ...]]:
    """(window, place, source, document, length) of every segment of a batch of windows of 128 tokens."""
    borders = batch.cu_seqlens.tolist()
    for first, last, source, document in zip(
        borders, borders[1:], batch.source.tolist(), batch.document.tolist(), strict=False
    ):
        yield batch.windows[first // 128], first % 128, source, document, last - first


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize("workers", [0, 2])
def test_kills_keep_the_documents_of_every_step(plan: Plan, ranks: int, micro: int, workers: int) -> None:
    """Documents and their ranges, by step: killed at random steps, over the border of an epoch."""
    steps = 14
    expected = [
        sorted(segment for batch in step for segment in segments_of(batch)) for step in steps_of(plan, steps)
    ]
    rng = random.Random(ranks * 100 + micro * 10 + workers)
    kills = sorted(rng.sample(range(1, steps), 2))
    found: list[list[tuple[int, ...]]] = []
    for first, last in itertools.pairwise([0, *kills, steps]):
        loaded = [
            steps_of(
                plan, last - first, start=8 * first, micro_batch_size=micro, data_parallel_rank=rank,
                data_parallel_size=ranks, num_workers=workers if rank == 0 else 0,
            )
            for rank in range(ranks)
        ]  # fmt: skip
        for step in range(last - first):
            batches = [batch for rank in loaded for batch in rank[step]]
            found.append(sorted(segment for batch in batches for segment in segments_of(batch)))
    assert found == expected
    assert max(plan.statistics(8 * steps).epochs_per_source.values()) > 1


@pytest.mark.parametrize("workers", [0, 1])
def test_resume_is_one_integer(plan: Plan, workers: int) -> None:
    loader = WindowLoader(plan, global_batch_size=4, num_workers=workers)
    for _ in itertools.islice(loader, 5):
        pass
    assert loader.windows_consumed == 20
    resumed = WindowLoader(plan, start=20, global_batch_size=4)
    expected = [step[0].windows[0] for step in itertools.islice(resumed, 2)]
    assert [step[0].windows[0] for step in itertools.islice(loader, 2)] == expected == [20, 24]
    # Another batch size goes on at the same window.
    wider = WindowLoader(plan, start=20, global_batch_size=6, micro_batch_size=6)
    assert next(iter(wider))[0].windows == tuple(range(20, 26))


def test_batches_are_windows_end_to_end(plan: Plan) -> None:
    batch = steps_of(plan, 1, micro_batch_size=8)[0][0]
    windows = [plan.window(index) for index in range(8)]
    assert batch.tokens.shape == batch.labels.shape == batch.modality.shape == (1, 8 * 128)
    assert (batch.tokens.dtype, batch.labels.dtype) == (torch.int64, torch.int64)
    assert (batch.modality.dtype, batch.cu_seqlens.dtype) == (torch.uint8, torch.int32)
    assert batch.source.dtype == torch.int16
    assert batch.cu_seqlens[0] == 0
    assert batch.cu_seqlens[-1] == 8 * 128
    assert len(batch.source) == len(batch.cu_seqlens) - 1
    assert batch.max_seqlen == int(batch.cu_seqlens.diff().max())
    assert batch.padding_tokens == 8 * 128 - sum(int(window.length.sum()) for window in windows)
    assert batch.num_targets == int((batch.modality != Modality.PADDING).sum())
    assert batch.source_of_tokens.shape == batch.tokens.shape
    assert batch.num_documents == sum(int((window.source >= 0).sum()) for window in windows)
    assert set((batch.cu_seqlens % 128 == 0).nonzero().flatten().tolist()) >= {0}


@pytest.mark.parametrize("micro", [1, 4])
def test_a_step_of_many_micro_batches_needs_few_files(plan: Plan, micro: int) -> None:
    """Steps of 256 windows from two workers, under a limit of 96 descriptors: equal to the bit."""

    def digests(workers: int) -> list[str]:
        loader = WindowLoader(plan, global_batch_size=256, micro_batch_size=micro, num_workers=workers)
        held = list(itertools.islice(loader, 3))  # a trainer may keep what it was given
        return [digest_of(batch) for step in held for batch in step]

    def limited(answer: SimpleQueue[str]) -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (96, 96))
        answer.put("|".join(digests(2)))

    answer: SimpleQueue[str] = FORK.SimpleQueue()
    process = FORK.Process(target=limited, args=(answer,))
    process.start()
    process.join(60)
    process.kill()
    assert process.exitcode == 0
    assert answer.get() == "|".join(digests(0))


def digest_of(batch: Batch) -> str:
    """Of every field: type, shape, memory order and values."""
    digest = hashlib.sha256()
    for field in fields(Batch):
        value = getattr(batch, field.name)
        if isinstance(value, torch.Tensor):
            assert value.is_contiguous()
            value = (value.dtype, value.shape, value.numpy().tobytes())
        digest.update(repr((field.name, value)).encode())
    return digest.hexdigest()


def test_workers_ignore_the_signals_of_a_scheduler(plan: Plan) -> None:
    """SIGTERM, SIGINT and SIGUSR1 reach the process group; the workers go on until the trainer is done."""

    def children() -> set[int]:
        return set(map(int, Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()))

    others = children()
    steps = iter(WindowLoader(plan, global_batch_size=8, num_workers=2))
    next(steps)
    workers = children() - others
    assert len(workers) >= 2
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        for pid in workers:
            os.kill(pid, number)
    time.sleep(0.2)
    assert [next(steps)[0].windows[0] for _ in range(10)] == list(range(8, 88, 8))
    steps.close()  # type: ignore[attr-defined]
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}/stat").exists() for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}/stat").exists() for pid in workers), "the workers outlived their loader"


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_cannot_be_read_is_named_without_a_traceback(
    plan: Plan, tmp_path: Path, workers: int
) -> None:
    for path in list(tmp_path.glob("a/*.bin")):
        path.unlink()
        path.mkdir()  # it opens, and reading it fails
    with pytest.raises(OSError, match=r"^\[Errno 21\] Is a directory: '.*\.bin'$"):
        steps_of(plan, 3, num_workers=workers)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"micro_batch_size": 3}, "must be a multiple of micro_batch_size=3"),
        ({"data_parallel_rank": 2, "data_parallel_size": 2}, "data_parallel_rank=2"),
        ({"start": -1}, "start=-1"),
        ({"micro_batch_size": 0}, "at least 1"),
    ],
)
def test_bad_layouts_are_refused(plan: Plan, options: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        WindowLoader(plan, global_batch_size=8, **options)
