from __future__ import annotations

import itertools

import pytest

from emu3_megatron.errors import UserError
from emu3_megatron.training.config import OptimizerConfig, TrainerConfig
from emu3_megatron.training.schedules import learning_rate

TOTAL = 100


def rates(**fields: object) -> list[float]:
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=10, **fields)  # type: ignore[arg-type]
    return [learning_rate(config, step, TOTAL) for step in range(TOTAL)]


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "linear", "constant"])
def test_warm_up_is_linear_and_never_zero(schedule: str) -> None:
    assert rates(schedule=schedule)[:10] == pytest.approx([0.1 * (step + 1) for step in range(10)])


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "linear"])
def test_the_rate_falls_to_its_minimum_at_the_last_step(schedule: str) -> None:
    values = rates(schedule=schedule, min_learning_rate=0.25)
    assert max(values) == values[10] == 1.0
    assert values[-1] == pytest.approx(0.25)
    assert all(a >= b for a, b in itertools.pairwise(values[10:]))


def test_cosine_is_half_way_down_in_the_middle() -> None:
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=0)
    assert learning_rate(config, 50, 101) == pytest.approx(0.5)


def test_wsd_stays_at_the_peak_until_its_decay() -> None:
    values = rates(schedule="wsd", decay_steps=20)
    assert set(values[10:80]) == {1.0}
    assert values[89] == pytest.approx(0.5)


def test_constant_stays() -> None:
    assert set(rates(schedule="constant")[10:]) == {1.0}


def test_the_batch_grows_in_equal_parts_to_its_full_size() -> None:
    trainer = TrainerConfig(
        steps=100, global_batch_size=64, initial_batch_size=16, batch_increment=16, batch_ramp_steps=30
    )
    sizes = [trainer.batch_size(step) for step in range(100)]
    assert sizes == [16] * 10 + [32] * 10 + [48] * 10 + [64] * 70


def test_without_a_ramp_every_batch_has_its_full_size() -> None:
    assert {TrainerConfig(steps=9, global_batch_size=8).batch_size(step) for step in range(9)} == {8}


@pytest.mark.parametrize(
    "fields",
    [
        {"initial_batch_size": 24, "batch_increment": 16, "batch_ramp_steps": 5},
        {"initial_batch_size": 64, "batch_ramp_steps": 5},
        {"initial_batch_size": 16},
    ],
)
def test_a_ramp_that_does_not_arrive_is_refused(fields: dict[str, int]) -> None:
    with pytest.raises(UserError, match=r"trainer\."):
        TrainerConfig(steps=100, global_batch_size=64, **fields)  # type: ignore[arg-type]
