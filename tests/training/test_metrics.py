from __future__ import annotations

import numpy as np
import pytest
import torch

from emu3_megatron.grammar.document import Modality
from emu3_megatron.training.callbacks.tensorboard import tag
from emu3_megatron.training.metrics import EXTRAS, MetricsLayout, Totals


def totals(sources: tuple[str, ...] = ("a", "b")) -> Totals:
    layout = MetricsLayout(sources)
    sums = torch.zeros(len(sources), len(Modality), 3, dtype=torch.float64)
    sums[0, Modality.TEXT] = torch.tensor([20.0, 3.0, 10.0])
    sums[1, Modality.VISION] = torch.tensor([240.0, 10.0, 40.0])
    sums[1, Modality.PADDING] = torch.tensor([999.0, 9.0, 99.0])
    return layout.totals(layout.vector(sums.reshape(-1, 3), {"signals": 2.0}))


def test_the_loss_weighs_classes() -> None:
    weights = [1.0, 0.5, 1.0, 0.5, 1.0, 0.0]
    assert totals().loss(weights) == pytest.approx((20.0 + 0.5 * 240.0) / (10.0 + 0.5 * 40.0))
    assert totals().source_loss(1, weights) == pytest.approx(6.0)


def test_classes_without_weight_do_not_count() -> None:
    assert totals().loss([1.0, 0.0, 0.0, 0.0, 0.0, 0.0]) == pytest.approx(2.0)
    assert np.isnan(totals().loss([0.0, 0.0, 1.0, 0.0, 0.0, 0.0]))


def test_names_are_by_class_and_by_source() -> None:
    named = totals().named()
    assert named["loss_text"] == 2.0
    assert named["accuracy_vision"] == 0.25
    assert named["tokens_vision"] == 40.0
    assert named["loss_a_text"] == 2.0
    assert named["loss_b_vision"] == 6.0
    assert not any("padding" in name or "meta" in name for name in named)


def test_extras_travel_with_the_sums() -> None:
    assert totals().extras == {**dict.fromkeys(EXTRAS, 0.0), "signals": 2.0}


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("loss", "train/loss"),
        ("loss_text", "loss/text"),
        ("tokens_per_second", "train/tokens_per_second"),
        ("validation_loss", "validation/loss"),
        ("grad_norm", "train/grad_norm"),
    ],
)
def test_tensorboard_tags(name: str, shown: str) -> None:
    assert tag(name) == shown
