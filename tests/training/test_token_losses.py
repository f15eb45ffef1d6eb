"""Losses of single tokens, for people to look at."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from emu3_megatron.training import command_line
from emu3_megatron.training.data import open_plan
from tests import programs
from tests.training import runs

STEP = 11
"""The first step after a checkpoint: its loss is that of the checkpoint's weights."""


@pytest.mark.slow
def test_losses_of_tokens_add_up_to_the_loss_of_the_step(reference: Path) -> None:
    from emu3_megatron.parallel.groups import destroy_parallel
    from emu3_megatron.training.token_losses import open_token_losses

    config = command_line.parse(["--config", str(reference / "config.yaml")]).config
    plan = open_plan(config)
    try:
        losses = open_token_losses(
            reference / "checkpoints" / f"step-{STEP - 1:08d}",
            plan.mixture.vocabulary,
            platform_name="cpu",
        )
        weights = np.array(config.loss.by_class())
        total = count = 0.0
        for number in range((STEP - 1) * runs.GLOBAL_BATCH, STEP * runs.GLOBAL_BATCH):
            window = plan.window(number)
            of_tokens = losses(window)
            of_labels = np.append(of_tokens[1:], np.nan).astype(np.float64)
            here = ~np.isnan(of_labels)
            weight = weights[window.modality]
            total += float(weight[here] @ of_labels[here])
            count += float(weight[here].sum())
    finally:
        destroy_parallel()
    (line,) = [line for line in runs.metrics(reference) if line["step"] == STEP]
    assert total / count == pytest.approx(line["loss"], rel=1e-6)


@pytest.mark.slow
def test_the_tool_shows_them(reference: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    command = ["tools/dataset.py", "replay", "--plan", str(reference), "--step", str(STEP)]
    command += ["--checkpoint", str(reference), "--platform", "cpu", "--output", str(page)]
    ended = programs.shared()(*command)
    assert ended.code == 0, ended.err
    assert page.read_text().count('title="loss ') >= runs.GLOBAL_BATCH
