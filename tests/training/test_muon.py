"""Training with Muon: the same under every layout, and after a resume."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.training import layouts, runs

MUON = ["--optimizer.kind", "muon", "--optimizer.use_distributed_optimizer", "false"]
TWO = ("dp2", "tp2-sp", "pp2-interleaved", "cp2")


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory, config_file: Path) -> Path:
    run = tmp_path_factory.mktemp("muon") / "single"
    done = runs.train(config_file, run, *MUON)
    assert done.returncode == 0, done.stderr
    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, config_file: Path, single: Path) -> Path:
    """Runs of two processes; `resumed` is the single one from step 10 on, cut over two ranks."""
    folder = tmp_path_factory.mktemp("layouts")
    arguments = {
        name: [*layouts.options(layouts.TWO[name], distributed_optimizer=False), *MUON] for name in TWO
    }
    step = "checkpoints/step-00000010"
    shutil.copytree(single / step, folder / "resumed" / step)
    runs.launch_layouts(folder, config_file, {**arguments, "resumed": arguments["tp2-sp"]}, processes=2)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", TWO)
def test_a_layout_equals_one_process(trained: Path, single: Path, name: str) -> None:
    first, every = layouts.differences(trained / name, single)
    assert first <= layouts.FIRST_STEP
    assert every <= layouts.ALL_STEPS


@pytest.mark.slow
def test_another_layout_goes_on(trained: Path, single: Path) -> None:
    lines = runs.metrics(trained / "resumed")
    assert [line["step"] for line in lines] == list(range(11, runs.STEPS + 1))
    assert runs.largest_difference(lines, runs.metrics(single)) <= layouts.ALL_STEPS


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_resumed_run_is_the_same_run(
    single: Path, config_file: Path, tmp_path: Path, precision: str
) -> None:
    arguments = [*MUON, "--trainer.precision", precision]
    if precision != "fp32":
        done = runs.train(config_file, tmp_path / "whole", *arguments)
        assert done.returncode == 0, done.stderr
    whole = single if precision == "fp32" else tmp_path / "whole"
    step = "checkpoints/step-00000010"
    shutil.copytree(whole / step, tmp_path / "run" / step)
    done = runs.train(config_file, tmp_path / "run", *arguments)
    assert done.returncode == 0, done.stderr
    keys = ("step", "loss", "grad_norm")
    after = [{key: line[key] for key in keys} for line in runs.metrics(tmp_path / "run")]
    assert after == [{key: line[key] for key in keys} for line in runs.metrics(whole)[10:]]


def test_the_distributed_optimizer_is_refused(config_file: Path, tmp_path: Path) -> None:
    done = runs.train(config_file, tmp_path / "run", "--optimizer.kind", "muon")
    assert done.returncode == 2
    assert "optimizer.kind=muon needs whole matrices" in done.stderr
    assert "optimizer.use_distributed_optimizer=false" in done.stderr
