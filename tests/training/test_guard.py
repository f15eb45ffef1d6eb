from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from emu3_megatron.training.callbacks import guard as guard_module
from emu3_megatron.training.callbacks.guard import SpikeGuard, UnstableRunError
from emu3_megatron.training.config import GuardConfig
from emu3_megatron.training.metrics import StepReport, Totals

TRAINER: Any = SimpleNamespace()


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard_module, "is_rank_zero", lambda: True)


def report(loss: float, norm: float = 1.0) -> StepReport:
    totals = Totals(sources=(), sums=np.zeros((0, 6, 3)), extras={})
    return StepReport(step=1, windows=1, totals=totals, loss=loss, grad_norm=norm, learning_rate=0.1)


def test_what_is_not_finite_is_skipped_from_the_first_step() -> None:
    guard = SpikeGuard(GuardConfig())
    assert guard.allow_update(TRAINER, report(2.0))
    assert not guard.allow_update(TRAINER, report(float("nan")))
    assert not guard.allow_update(TRAINER, report(2.0, float("inf")))
    assert guard.allow_update(TRAINER, report(200.0)), "spikes are not judged by default"


def test_a_spike_is_skipped_and_does_not_move_the_mean() -> None:
    guard = SpikeGuard(GuardConfig(spike_factor=3.0, warmup_steps=5))
    assert all(guard.allow_update(TRAINER, report(2.0)) for _ in range(5))
    for _ in range(3):
        assert not guard.allow_update(TRAINER, report(6.1))
    assert guard.allow_update(TRAINER, report(5.9))


def test_a_run_that_only_skips_ends() -> None:
    guard = SpikeGuard(GuardConfig(max_consecutive=3))
    assert not guard.allow_update(TRAINER, report(float("nan")))
    assert not guard.allow_update(TRAINER, report(float("nan")))
    with pytest.raises(UnstableRunError, match="3 steps in a row"):
        guard.allow_update(TRAINER, report(float("nan")))
