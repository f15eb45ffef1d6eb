from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from emu3_megatron import files
from emu3_megatron.grammar.document import Modality
from emu3_megatron.training.callbacks import metrics as metrics_file
from emu3_megatron.training.callbacks.metrics import MetricsFile
from emu3_megatron.training.callbacks.tensorboard import tag
from emu3_megatron.training.checkpoint import Progress
from emu3_megatron.training.metrics import EXTRAS, MetricsLayout, Totals


def test_the_curve_of_a_run_outlives_a_start_that_is_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [f'{{"step": {step}, "loss": 2.5}}\n' for step in range(1, 6)]
    path.write_text("".join([*lines, '{"step": 6, "lo']))
    trainer: Any = SimpleNamespace(progress=Progress(step=3))
    monkeypatch.setattr(metrics_file, "is_rank_zero", lambda: True)

    def fail(*_: object) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as full:
        full.setattr(files, "publish", fail)
        with pytest.raises(OSError, match="no space left"):
            MetricsFile(path).on_start(trainer)
    assert path.read_text().startswith("".join(lines))
    callback = MetricsFile(path)
    callback.on_start(trainer)
    callback.close()
    assert path.read_text() == "".join(lines[:3])
    assert list(tmp_path.iterdir()) == [path]


def totals(sources: tuple[str, ...] = ("a", "b")) -> Totals:
    layout = MetricsLayout(sources)
    sums = torch.zeros(len(sources), len(Modality), 3, dtype=torch.float64)
    sums[0, Modality.TEXT] = torch.tensor([20.0, 3.0, 10.0])
    sums[1, Modality.VISION] = torch.tensor([240.0, 10.0, 40.0])
    sums[1, Modality.PADDING] = torch.tensor([999.0, 9.0, 99.0])
    return layout.totals(layout.vector(sums.reshape(-1), {"signals": 2.0}))


def weights(*rows: dict[Modality, float]) -> npt.NDArray[np.float64]:
    """Weights of classes, a row for each source; 0 where none is given."""
    return np.array([[row.get(modality, 0.0) for modality in Modality] for row in rows])


def test_the_loss_weighs_classes() -> None:
    row = {Modality.TEXT: 1.0, Modality.VISION: 0.5, Modality.META: 1.0}
    assert totals().loss(weights(row, row)) == pytest.approx((20.0 + 0.5 * 240.0) / (10.0 + 0.5 * 40.0))
    assert totals().loss(weights(row, row), source=1) == pytest.approx(6.0)


def test_the_loss_weighs_sources() -> None:
    pictures, answers = {Modality.VISION: 0.25}, {Modality.TEXT: 2.0}
    assert totals().loss(weights(answers, pictures)) == pytest.approx((40.0 + 60.0) / (20.0 + 10.0))
    assert np.isnan(totals().loss(weights(pictures, answers)))


def test_classes_without_weight_do_not_count() -> None:
    row = {Modality.TEXT: 1.0}
    assert totals().loss(weights(row, row)) == pytest.approx(2.0)
    assert np.isnan(totals().loss(weights({Modality.META: 1.0}, {Modality.META: 1.0})))


def test_steps_add_up() -> None:
    layout = MetricsLayout(("a",), ("margin",))
    vector = torch.arange(layout.size, dtype=torch.float64)
    part = layout.totals(vector)
    both = Totals.added([part, part])
    assert both.quantities == {"margin": 2 * part.quantities["margin"]}
    assert both.quantities["margin"] == 2 * layout.cells * 3
    np.testing.assert_array_equal(both.sums, 2 * part.sums)


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
