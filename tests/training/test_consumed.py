"""The windows of a step are those that the run read, whatever its batch was and is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emu3_megatron.errors import UserError
from emu3_megatron.training.config import TrainerConfig
from emu3_megatron.training.consumed import ConsumedWindows
from tests import programs
from tests.training import runs


def write_metrics(folder: Path, sizes: list[int]) -> None:
    """As the trainer does: a line for each step, with the windows taken so far."""
    windows = 0
    with open(folder / "metrics.jsonl", "w") as stream:
        for step, size in enumerate(sizes, 1):
            windows += size
            stream.write(json.dumps({"step": step, "loss": None, "windows": windows}) + "\n")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([4, 8, 16]), max_size=30), st.integers(0, 9), st.sampled_from([4, 8, 16]))
def test_steps_read_one_range_after_the_other(
    tmp_path_factory, taken: list[int], left: int, size: int
) -> None:
    """Each of the size that the batch had when it was taken, or will have."""
    folder = tmp_path_factory.mktemp("run")
    write_metrics(folder, taken)
    steps = len(taken) + left
    consumed = ConsumedWindows(folder, TrainerConfig(steps=max(1, steps), global_batch_size=size))
    ranges = [consumed.of_step(step) for step in range(1, steps + 1)]
    assert [len(each) for each in ranges] == [*taken, *[size] * left]
    assert [number for each in ranges for number in each] == list(range(consumed.up_to(steps)))


def test_a_batch_that_grows_is_followed_without_metrics(tmp_path: Path) -> None:
    trainer = TrainerConfig(
        steps=20, global_batch_size=16, initial_batch_size=4, batch_increment=4, batch_ramp_steps=12
    )
    consumed = ConsumedWindows(tmp_path, trainer)
    sizes = [trainer.batch_size(step) for step in range(20)]
    assert len(set(sizes)) > 2
    assert [consumed.up_to(step) for step in range(21)] == [sum(sizes[:step]) for step in range(21)]


def test_the_batch_changed_on_resume(tmp_path: Path) -> None:
    """1,000 steps of 8 windows, then of 16: the configuration of today says 16 for all."""
    write_metrics(tmp_path, [8] * 1000)
    consumed = ConsumedWindows(tmp_path, TrainerConfig(steps=2000, global_batch_size=16))
    assert consumed.of_step(50) == range(392, 400)
    assert consumed.of_step(1500) == range(8000 + 499 * 16, 8000 + 500 * 16)
    # A line that a crash has cut says nothing; a damaged one is named.
    with open(tmp_path / "metrics.jsonl", "a") as stream:
        stream.write('{"step": 1001, "win')
    assert ConsumedWindows(tmp_path, TrainerConfig(steps=2000, global_batch_size=16)).up_to(1001) == 8016
    with open(tmp_path / "metrics.jsonl", "a") as stream:
        stream.write("\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl: line .* is damaged"):
        ConsumedWindows(tmp_path, TrainerConfig(steps=2000, global_batch_size=16))


def test_steps_and_windows_beyond_the_run_are_refused_at_once(tmp_path: Path, tiny_data: Path) -> None:
    """A mistyped number built blocks without end into the run's folder."""
    values = {**runs.configuration(tiny_data), "run": str(tmp_path)}
    (tmp_path / "config.yaml").write_text(json.dumps(values))
    steps = values["trainer"]["steps"]
    write_metrics(tmp_path, [2] * (steps - 1))
    last = 2 * (steps - 1) + runs.GLOBAL_BATCH - 1

    def replay(*arguments: object) -> programs.Ended:
        command = ["tools/dataset.py", "replay", "--plan", tmp_path, "--output", tmp_path / "page.html"]
        return programs.shared()(*command, *arguments)

    assert f"the run ends with step {steps}" in replay("--step", 10**7).error
    assert "steps count from 1" in replay("--step", 0).error
    assert f"the run ends with {last}" in replay("--window", 10**12).error
    assert not (tmp_path / "page.html").exists()
    shown = replay("--step", steps)
    assert f"windows {2 * (steps - 1)} to {last}" in shown.out, shown.err
    planned = programs.shared()("tools/plan.py", "--config", tmp_path / "config.yaml", "--sample", 1)
    assert f"windows      {last + 1:,} of" in planned.out, planned.err
