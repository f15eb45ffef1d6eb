"""The example scripts under a real SLURM of two nodes."""

from __future__ import annotations

import pytest
from pathlib import Path

from tests.slurm.cluster import wait_until
from tests.slurm.conftest import Workplace
from tests.training import runs

pytestmark = pytest.mark.slow
SAME = 1e-4
"""Largest relative difference of a loss between one process and two, in fp32, after 20 steps."""


def steps_done(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def check_curve(run: Path, reference: Path) -> None:
    lines = runs.metrics(run)
    assert [line["step"] for line in lines] == list(range(1, runs.STEPS + 1))
    assert [line["windows"] for line in lines] == [runs.GLOBAL_BATCH * line["step"] for line in lines]
    assert runs.largest_difference(lines, runs.metrics(reference)) <= SAME


def test_two_nodes_train_as_one_process(workplace: Workplace, reference: Path) -> None:
    number = workplace.submit("stage1", arguments=("--run_folder", "run"))
    state = workplace.cluster.wait_for(number)
    assert state == "COMPLETED", workplace.explain("stage1", number)
    assert "2 processes on n[1-2]" in workplace.log("stage1", number)
    check_curve(workplace.folder / "run", reference)
