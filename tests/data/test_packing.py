"""The packer equals its plain-Python reference, and both obey the rules."""

from __future__ import annotations

import threading
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emu3_megatron.data.packing import PackedWindows, pack
from emu3_megatron.data.packing_reference import pack_reference


@st.composite
def problems(draw: st.DrawFn) -> dict[str, object]:
    align = draw(st.sampled_from([1, 1, 2, 4, 8]))
    # From some thousand units on the online packer takes another way.
    capacity = align * draw(st.integers(1, 300) | st.integers(8_000, 20_000))
    longest = max(1, int(capacity * draw(st.sampled_from([0.2, 1, 1.1, 4]))))
    count = draw(st.integers(0, 40))
    return {
        "lengths": draw(st.lists(st.integers(1, longest), min_size=count, max_size=count)),
        "capacity": capacity,
        "splittable": draw(st.none() | st.lists(st.booleans(), min_size=count, max_size=count)),
        "align": align,
        "policy": draw(st.sampled_from(["online", "offline"])),
        "open_windows": draw(st.integers(1, 8)),
        "fill": draw(st.booleans()),
        "min_piece": draw(st.integers(1, 80)),
    }


def as_lists(packed: PackedWindows) -> list[list[tuple[int, int, int]]]:
    pieces = list(zip(packed.document.tolist(), packed.start.tolist(), packed.length.tolist(), strict=True))
    borders = packed.window_offsets.tolist()
    return [pieces[first:last] for first, last in pairwise(borders)]


@settings(max_examples=250, deadline=None)
@given(problems())
def test_packer_equals_reference(problem: dict[str, object]) -> None:
    packed = pack(**problem)  # type: ignore[arg-type]
    windows, dropped = pack_reference(**problem)  # type: ignore[arg-type]
    assert as_lists(packed) == windows
    assert packed.dropped.tolist() == dropped


@settings(max_examples=150, deadline=None)
@given(problems())
def test_rules(problem: dict[str, object]) -> None:
    packed = pack(**problem)  # type: ignore[arg-type]
    lengths: list[int] = problem["lengths"]  # type: ignore[assignment]
    capacity, align = int(problem["capacity"]), int(problem["align"])  # type: ignore[call-overload]
    splittable = problem["splittable"] or [False] * len(lengths)
    rounded = [-(-length // align) * align for length in lengths]
    windows = as_lists(packed)
    assert all(windows), "no window is empty"
    for window in windows:
        assert sum(-(-length // align) * align for _, _, length in window) <= capacity
    pieces: dict[int, list[tuple[int, int]]] = {}
    for document, start, length in sorted(piece for window in windows for piece in window):
        pieces.setdefault(document, []).append((start, length))
    for document, length in enumerate(lengths):
        mine = pieces.get(document, [])
        if document in packed.dropped:
            assert not splittable[document]  # type: ignore[index]
            assert rounded[document] > capacity
            assert mine == []
            continue
        # Every token stands in exactly one piece.
        assert [start for start, _ in mine] == [0, *np.cumsum([size for _, size in mine])[:-1].tolist()]
        assert sum(size for _, size in mine) == length
        if len(mine) > 1:
            assert splittable[document]  # type: ignore[index]
            least = min(int(problem["min_piece"]), capacity // align // 2)  # type: ignore[call-overload]
            assert min(size for _, size in mine) >= least
            assert problem["fill"] or rounded[document] > capacity


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 100), max_size=60), st.booleans())
def test_no_two_windows_could_be_one(lengths: list[int], fill: bool) -> None:
    """Best fit over all windows opens one only when nothing else has room: at most twice the minimum."""
    packed = pack(lengths, 100, policy="offline", fill=fill)
    used = np.add.reduceat(packed.length, packed.window_offsets[:-1]) if lengths else np.zeros(0)
    assert np.count_nonzero(used <= 50) <= 1


def drawn(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The length distribution of docs/packing.md: 40% text, 50% images, 10% video."""
    rng = np.random.default_rng(seed)
    kind = rng.choice(3, count, p=[0.4, 0.5, 0.1])
    text = np.exp(rng.normal(np.log(700) - 0.5, 1, count))
    video = np.exp(rng.uniform(np.log(4000), np.log(60000), count))
    lengths = np.choose(kind, [text, rng.normal(4300, 400, count), video])
    return np.maximum(1, lengths).astype(np.int32), kind == 0


@pytest.mark.parametrize(("capacity", "whole", "filled"), [(5120, 0.911, 0.945), (131_072, 0.9985, 0.9985)])
def test_fill(capacity: int, whole: float, filled: float) -> None:
    lengths, splittable = drawn(200_000)
    for policy in ("online", "offline"):
        for fill, least in ((False, whole), (True, filled)):
            packed = pack(lengths, capacity, splittable=splittable, policy=policy, fill=fill)  # type: ignore[arg-type]
            assert packed.length.sum() / (packed.num_windows * capacity) >= least, (policy, fill)


def test_online_keeps_the_mixture_where_offline_sorts_it() -> None:
    lengths, splittable = drawn(200_000)
    deviation = {}
    for policy in ("online", "offline"):
        packed = pack(lengths, 131_072, splittable=splittable, policy=policy)  # type: ignore[arg-type]
        tokens = packed.length.astype(np.int64)
        text = np.where(splittable[packed.document], tokens, 0)
        borders = packed.window_offsets[:-1]
        deviation[policy] = np.std(np.add.reduceat(text, borders) / np.add.reduceat(tokens, borders))
    assert deviation["online"] < deviation["offline"] / 2


def test_online_bounds_the_wait() -> None:
    """With one window open, documents stay in order."""
    lengths, _ = drawn(2000)
    packed = pack(np.minimum(lengths, 900), 1000, open_windows=1)
    assert packed.document.tolist() == list(range(2000))


def test_the_gil_is_released() -> None:
    lengths, splittable = drawn(1_000_000)
    ticks, stop = [0], threading.Event()

    def count() -> None:
        while not stop.is_set():
            ticks[0] += 1

    thread = threading.Thread(target=count)
    thread.start()
    try:
        before = ticks[0]
        pack(lengths, 5120, splittable=splittable, policy="offline", fill=True)
        assert ticks[0] > before
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lengths": [0]}, "length 0"),
        ({"lengths": [5, -1]}, "length -1"),
        ({"lengths": [[1]]}, "one dimension"),
        ({"lengths": [1.5]}, "integers"),
        ({"lengths": [2**31]}, "32 bits"),
        ({"capacity": 0}, "capacity=0"),
        ({"align": 3}, "multiple of align=3"),
        ({"align": 0}, "align=0"),
        ({"open_windows": 0}, "open_windows=0"),
        ({"min_piece": 0}, "min_piece=0"),
        ({"splittable": [True]}, "splittable has 1 entries for 2 lengths"),
        ({"policy": "best"}, "policy='best'"),
    ],
)
def test_bad_input_is_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack(**{"lengths": [1, 2], "capacity": 10, **arguments})  # type: ignore[arg-type]
