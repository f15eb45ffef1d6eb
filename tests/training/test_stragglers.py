"""Who was slow; and attention over whole windows, whatever the layout."""

from __future__ import annotations

import math
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from emu3_megatron.data.loader import Batch
from emu3_megatron.training.callbacks.stragglers import spread, straggler
from emu3_megatron.training.metrics import EXTRAS, MetricsLayout
from emu3_megatron.training.step import attention_borders
from emu3_megatron.training.stopwatch import Stopwatch
from tests.training import layouts, runs


def test_every_rank_fills_a_place_of_its_own() -> None:
    layout = MetricsLayout(("a",), ranks=3)
    sums = torch.zeros(layout.cells * 3, dtype=torch.float64)
    vectors = [
        layout.vector(sums, {"signals": 1.0}, rank=rank, seconds=seconds)
        for rank, seconds in enumerate((0.5, 2.0, 0.25))
    ]
    assert all(len(vector) == layout.size for vector in vectors)
    totals = layout.totals(torch.stack(vectors).sum(0))
    assert totals.rank_seconds.tolist() == [0.5, 2.0, 0.25]
    assert totals.extras == {**dict.fromkeys(EXTRAS, 0.0), "signals": 3.0}


def test_the_slowest_rank_is_named_where_it_is_clearly_slower() -> None:
    assert spread(np.empty(0)) == {}
    assert spread(np.array([1.0, 3.0, 1.5])) == {
        "rank_seconds_min": 1.0,
        "rank_seconds_median": 1.5,
        "rank_seconds_max": 3.0,
        "slowest_rank": 1,
    }
    line = straggler(np.array([10.0, 10.0, 15.0, 10.0]), steps=10)
    assert line is not None
    assert "rank 2, 1.5 s" in line
    assert "50% over the median of 1 s" in line
    assert straggler(np.array([10.0, 10.1, 10.0]), steps=10) is None
    assert straggler(np.zeros(4), steps=10) is None


def test_the_stopwatch_stops_before_the_others_are_waited_for() -> None:
    watch = Stopwatch(on_gpu=False)
    watch.start()
    time.sleep(0.01)
    watch.stop()
    own = watch.seconds
    time.sleep(0.01)
    assert watch.seconds == own >= 0.01


def batch(cu_seqlens: list[int]) -> Batch:
    tokens = torch.zeros(1, cu_seqlens[-1], dtype=torch.long)
    return Batch(
        tokens=tokens,
        labels=tokens,
        modality=tokens.byte(),
        cu_seqlens=torch.tensor(cu_seqlens, dtype=torch.int32),
        max_seqlen=max(np.diff(cu_seqlens)),
        source=torch.zeros(len(cu_seqlens) - 1, dtype=torch.int16),
        document=torch.zeros(len(cu_seqlens) - 1, dtype=torch.int64),
        windows=(0, 1),
        padding_tokens=0,
    )


def test_attention_reaches_over_documents_or_windows() -> None:
    two_windows = batch([0, 3, 10, 16, 30, 32])
    borders, longest = attention_borders(two_windows, None)
    assert (borders.tolist(), longest) == ([0, 3, 10, 16, 30, 32], 14)
    borders, longest = attention_borders(two_windows, 16)
    assert (borders.tolist(), longest, borders.dtype) == ([0, 16, 32], 16, torch.int32)


@pytest.mark.slow
def test_whole_windows_under_two_layouts_and_every_ranks_time(tmp_path: Path, config_file: Path) -> None:
    further = ["--trainer.steps", "3", "--optimizer.warmup_steps", "1", "--logging.straggler_interval", "2"]
    jobs = {
        name: [*layouts.options(layouts.TWO[layout], distributed_optimizer=True), *further, *chosen]
        for name, layout, chosen in (
            ("dp2", "dp2", ["--data.attention", "window"]),
            ("cp2", "cp2", ["--data.attention", "window"]),
            ("documents", "dp2", []),
        )
    }
    runs.launch_layouts(tmp_path, config_file, jobs, processes=2, save=False)
    lines = {name: runs.metrics(tmp_path / name) for name in jobs}
    assert runs.largest_difference(lines["dp2"], lines["cp2"]) <= layouts.ALL_STEPS
    assert abs(lines["dp2"][0]["loss"] - lines["documents"][0]["loss"]) > 1e-6
    for line in lines["dp2"]:
        assert math.isfinite(line["loss"])
        assert line["slowest_rank"] in (0, 1)
        assert 0 < line["rank_seconds_min"] <= line["rank_seconds_max"] <= 1.05 * line["seconds"]
