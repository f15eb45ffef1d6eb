"""Runs are planned and looked at by one process, whatever their layout and their kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from emu3_megatron.posttraining.preferences.config import PreferenceTrainingConfig
from emu3_megatron.posttraining.runs import describe_run
from emu3_megatron.training import command_line
from emu3_megatron.training.data import open_plan
from tests import programs
from tests.posttraining.test_preference_training import configuration as of_pairs
from tests.training import runs

LAYOUTS = {
    "tensor": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pipeline": {"pipeline_model_parallel_size": 2},
    "context": {"context_parallel_size": 2},
    "all": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "context_parallel_size": 2},
}


@pytest.fixture
def one_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the SLURM job `plan`: a launcher says that there is one process."""
    monkeypatch.setenv("WORLD_SIZE", "1")


def program(*arguments: object) -> programs.Ended:
    return programs.shared()(*arguments)


def written(folder: Path, values: dict[str, Any], layout: str) -> Path:
    """A configuration whose alignment follows from the layout."""
    path = folder / "config.yaml"
    del values["data"]["alignment"]
    path.write_text(json.dumps({**values, "run": str(folder), "parallel": LAYOUTS[layout]}))
    return path


@pytest.mark.usefixtures("one_of_one")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_described_run_has_the_plan_of_its_processes(tmp_path: Path, tiny_data: Path, layout: str) -> None:
    path = written(tmp_path, runs.configuration(tiny_data), layout)
    trained = command_line.parse(["--config", str(path), "--world-size", "8"]).config
    run = describe_run([f"--config={path}"])
    assert run.config == trained
    assert run.open_plan().fingerprint == open_plan(trained).fingerprint


@pytest.mark.usefixtures("one_of_one")
@pytest.mark.parametrize("layout", ["tensor", "context"])
def test_a_run_is_planned_and_replayed_whatever_its_layout(
    tmp_path: Path, tiny_data: Path, layout: str
) -> None:
    path = written(tmp_path, runs.configuration(tiny_data), layout)
    planned = program("tools/plan.py", "--config", path, "--windows", 8)
    assert planned.code == 0, planned.err
    assert f"by alignment to {4 if layout == 'context' else 1}\n" in planned.out
    page = tmp_path / "page.html"
    replayed = program("tools/dataset.py", "replay", "--plan", tmp_path, "--step", 1, "--output", page)
    assert replayed.code == 0, replayed.err
    assert page.stat().st_size


@pytest.mark.usefixtures("one_of_one")
def test_a_run_of_preferences_is_planned_and_replayed(tmp_path: Path, tiny_data: Path) -> None:
    path = written(tmp_path, of_pairs(tiny_data, tmp_path / "base"), "tensor")
    run = describe_run(["--config", str(path)])
    assert isinstance(run.config, PreferenceTrainingConfig)
    planned = program("tools/plan.py", "--config", path, "--windows", 8)
    assert planned.code == 0, planned.err
    assert "source       pairs: " in planned.out
    page = tmp_path / "page.html"
    replayed = program("tools/dataset.py", "replay", "--plan", tmp_path, "--window", 0, "--output", page)
    assert replayed.code == 0, replayed.err
    assert page.stat().st_size


def test_what_cannot_work_under_any_number_of_processes_is_still_one_line(
    tmp_path: Path, tiny_data: Path
) -> None:
    path = written(tmp_path, runs.configuration(tiny_data), "tensor")
    error = program("tools/plan.py", "--config", path, "--trainer.micro_batch_size", 3).error
    assert "global_batch_size=" in error
    missing = program("tools/plan.py", "--config", tmp_path / "no.yaml").error
    assert "no.yaml" in missing


def test_the_recipes_of_a_cluster_are_described_by_one_process() -> None:
    for path in sorted((programs.ROOT / "examples" / "configs" / "emu3-8b").glob("*.yaml")):
        describe_run(["--config", str(path)])
