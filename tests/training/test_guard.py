from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from emu3_megatron.training.callbacks import guard as guard_module
from emu3_megatron.training.callbacks.guard import SpikeGuard, UnstableRunError
from emu3_megatron.training.checkpoint import Progress
from emu3_megatron.training.config import GuardConfig
from emu3_megatron.training.metrics import StepReport, Totals


@pytest.fixture
def trainer() -> Any:
    """What the guard needs of one."""
    return SimpleNamespace(progress=Progress())


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard_module, "is_rank_zero", lambda: True)


def report(loss: float, norm: float = 1.0) -> StepReport:
    totals = Totals(sources=(), sums=np.zeros((0, 6, 3)), extras={})
    return StepReport(step=1, windows=1, totals=totals, loss=loss, grad_norm=norm, learning_rate=0.1)


def test_what_is_not_finite_is_skipped_from_the_first_step(trainer: Any) -> None:
    guard = SpikeGuard(GuardConfig())
    assert guard.allow_update(trainer, report(2.0))
    assert not guard.allow_update(trainer, report(float("nan")))
    assert not guard.allow_update(trainer, report(2.0, float("inf")))
    assert guard.allow_update(trainer, report(200.0)), "spikes are not judged by default"


def test_a_spike_is_skipped_and_does_not_move_the_mean(trainer: Any) -> None:
    guard = SpikeGuard(GuardConfig(spike_factor=3.0, warmup_steps=5))
    assert all(guard.allow_update(trainer, report(2.0)) for _ in range(5))
    for _ in range(3):
        assert not guard.allow_update(trainer, report(6.1))
    assert guard.allow_update(trainer, report(5.9))


def test_a_run_that_only_skips_ends(trainer: Any) -> None:
    guard = SpikeGuard(GuardConfig(max_consecutive=3))
    assert not guard.allow_update(trainer, report(float("nan")))
    assert not guard.allow_update(trainer, report(float("nan")))
    with pytest.raises(UnstableRunError, match="3 steps in a row"):
        guard.allow_update(trainer, report(float("nan")))


def test_a_guard_that_goes_on_decides_as_one_that_was_never_interrupted(trainer: Any) -> None:
    """All that it knows is in the run's progress, as a checkpoint keeps it."""
    config = GuardConfig(spike_factor=1.5, warmup_steps=4, max_consecutive=4)
    whole = SpikeGuard(config)
    resumed: Any = SimpleNamespace(progress=Progress())
    rng = np.random.default_rng(0)
    answers = []
    for loss, norm in np.exp(rng.normal(0.0, 0.3, (60, 2))):
        answers.append(whole.allow_update(trainer, report(loss, norm)))
        assert SpikeGuard(config).allow_update(resumed, report(loss, norm)) == answers[-1]
        resumed.progress = Progress(**json.loads(json.dumps(asdict(resumed.progress))))
    assert 5 < answers.count(False) < 55
    for number in range(config.max_consecutive):
        ends = number == config.max_consecutive - 1
        with pytest.raises(UnstableRunError) if ends else nullcontext():
            SpikeGuard(config).allow_update(resumed, report(float("nan")))
