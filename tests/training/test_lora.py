"""Training adapters: every layout as one process, only they change, a run resumes exactly."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.training import layouts, runs

LORA = ["--lora.rank", "4", "--lora.alpha", "8"]
TWO = {"dp2": True, "tp2": False, "tp2-sp": True, "pp2": False, "cp2": True}
"""Layouts of two processes, and whether the optimizer is distributed."""


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory, config_file: Path) -> Path:
    run = tmp_path_factory.mktemp("lora") / "run"
    done = runs.train(config_file, run, *LORA)
    assert done.returncode == 0, done.stderr
    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, config_file: Path, single: Path) -> Path:
    """Every layout from the start, and from step 10 of one process."""
    folder = tmp_path_factory.mktemp("layouts")
    arguments = {
        name: [*layouts.options(layouts.TWO[name], distributed_optimizer=distributed), *LORA]
        for name, distributed in TWO.items()
    }
    for name in ("tp2-sp", "dp2"):
        arguments[f"{name}-resumed"] = arguments[name]
        shutil.copytree(
            single / "checkpoints/step-00000010", folder / f"{name}-resumed/checkpoints/step-00000010"
        )
    runs.launch_layouts(folder, config_file, arguments, processes=2, save=False)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", TWO)
def test_a_layout_equals_one_process(trained: Path, single: Path, name: str) -> None:
    first, every = layouts.differences(trained / name, single)
    assert first <= layouts.FIRST_STEP
    assert every <= layouts.ALL_STEPS


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tp2-sp", "dp2"])
def test_another_layout_goes_on(trained: Path, single: Path, name: str) -> None:
    lines = runs.metrics(trained / f"{name}-resumed")
    assert [line["step"] for line in lines] == list(range(11, runs.STEPS + 1))
    assert runs.largest_difference(lines, runs.metrics(single)) <= layouts.ALL_STEPS


@pytest.mark.slow
def test_a_resumed_run_is_the_same_run(single: Path, config_file: Path, tmp_path: Path) -> None:
    shutil.copytree(single / "checkpoints/step-00000010", tmp_path / "run/checkpoints/step-00000010")
    done = runs.train(config_file, tmp_path / "run", *LORA)
    assert done.returncode == 0, done.stderr
    assert [line["loss"] for line in runs.metrics(tmp_path / "run")] == [
        line["loss"] for line in runs.metrics(single)[10:]
    ]


@pytest.mark.slow
def test_adapters_learn_from_another_runs_weights(reference: Path, config_file: Path, tmp_path: Path) -> None:
    """The first loss is that of the weights loaded; the base stays; adapters of another shape are refused."""
    start = ["--checkpoint.load", str(reference), "--trainer.steps", "6"]
    plain, adapted = tmp_path / "plain", tmp_path / "adapted"
    for run, options in ((plain, []), (adapted, LORA)):
        done = runs.train(config_file, run, *start, *options)
        assert done.returncode == 0, done.stderr
    assert runs.metrics(adapted)[0]["loss"] == pytest.approx(runs.metrics(plain)[0]["loss"], rel=1e-6)
    refused: dict[str, tuple[Callable[[], list[str]], str]] = {
        "another": (lambda: ["--checkpoint.load", str(adapted), "--lora.rank", "2"], "lora.rank: 4 -> 2"),
        "none": (lambda: ["--checkpoint.load", str(adapted)], "lora.rank: 4 -> 0"),
    }
    for name, (options_of, message) in refused.items():
        done = runs.train(config_file, tmp_path / name, *options_of(), "--trainer.steps", "6")
        assert done.returncode == 2
        assert message in done.stderr
    done = runs.train(config_file, plain, "--trainer.steps", "7", *LORA)
    assert done.returncode == 2
    assert "cannot be switched" in done.stderr
    record = json.loads((adapted / "checkpoints/step-00000006/emu3.json").read_text())
    assert record["config"]["lora"]["rank"] == 4
