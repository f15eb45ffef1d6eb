"""Balance: every rank gets as many windows and nearly the same work; which windows a step holds stays."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emu3_megatron.data import Mixture, Plan, Source
from emu3_megatron.data.balance import attention_costs, spread
from emu3_megatron.data.loader import WindowLoader
from emu3_megatron.data.packing import pack
from tests.data.test_packing import drawn


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 8), st.integers(1, 6), st.integers(0, 2**32))
def test_every_window_goes_to_one_rank(ranks: int, each: int, seed: int) -> None:
    costs = np.random.default_rng(seed).integers(0, 1000, ranks * each)
    places = spread(costs, ranks)
    assert places.shape == (ranks, each)
    assert sorted(places.ravel().tolist()) == list(range(ranks * each))
    assert np.array_equal(np.sort(places, axis=1), places)
    assert np.array_equal(spread(costs, ranks), places)


def test_nothing_moves_where_nothing_can_be_won() -> None:
    """One rank, or one window a rank: the order of the plan, so that results are equal to the bit."""
    costs = np.array([5, 1, 9, 3])
    assert spread(costs, 1).tolist() == [[0, 1, 2, 3]]
    assert spread(costs, 4).tolist() == [[0], [1], [2], [3]]


def test_ranks_work_equally_long() -> None:
    """Mean over max of the work of 64 ranks with 4 windows of 131,072 tokens each."""
    lengths, splittable = drawn(60_000)
    packed = pack(lengths, 131_072, splittable=splittable, fill=True)
    costs = attention_costs(packed.length.astype(np.int64), packed.window_offsets)
    costs = np.random.default_rng(0).permutation(costs)
    for first in range(0, len(costs) - 256, 256):
        step = costs[first : first + 256]
        work = step[spread(step, 64)].sum(axis=1)
        # In an 8B model attention costs as much as all else at about 59,000 tokens.
        flops = work + 4 * 131_072 * 59_000
        assert flops.mean() / flops.max() >= 0.95


def test_costs_of_a_plan_are_those_of_its_windows(make_dataset) -> None:
    folders: tuple[Path, ...] = make_dataset("a", "p", 30), make_dataset("b", "t", 20, text=200)
    mixture = Mixture([Source(path=str(folder)) for folder in folders])
    plan = Plan(mixture, seed=1, context_length=128, block_draws=64, alignment=4)
    expected = [
        int(np.square(np.diff(plan.window(index).cu_seqlens), dtype=np.int64).sum()) for index in range(5, 90)
    ]
    assert plan.costs(5, 85).tolist() == expected


@pytest.mark.parametrize("micro", [1, 2])
def test_balance_changes_no_step(make_dataset, micro: int) -> None:
    folder = make_dataset("a", "pt", 40, text=100)
    plan = Plan(Mixture([Source(path=str(folder))]), seed=1, context_length=128, block_draws=64)
    steps = {}
    for balance in (False, True):
        loaders = [
            WindowLoader(
                plan, global_batch_size=16, micro_batch_size=micro, data_parallel_rank=rank,
                data_parallel_size=4, balance=balance,
            )
            for rank in range(4)
        ]  # fmt: skip
        steps[balance] = [
            [[number for batch in batches for number in batch.windows] for batches in islice(loader, 4)]
            for loader in loaders
        ]
    for step in range(4):
        windows = list(range(step * 16, step * 16 + 16))
        heaviest = {}
        for balance, ranks in steps.items():
            assert sorted(number for rank in ranks for number in rank[step]) == windows
            assert all(len(rank[step]) == 4 for rank in ranks)
            heaviest[balance] = max(sum(plan.costs(number, 1)[0] for number in rank[step]) for rank in ranks)
        assert heaviest[True] <= heaviest[False]
