"""Weights are drawn only where none are loaded."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import programs
from tests.training import runs

PROGRAM = """
import math, sys
from emu3_megatron.parallel import platform

machine = platform.install("cpu")
import torch
from emu3_megatron.model import build

def fail(*arguments, **options):
    raise AssertionError("weights are drawn that a checkpoint replaces")

def leave_nothing(*arguments, **options):
    chunk = make(*arguments, **options)
    for parameter in chunk.parameters():
        parameter.data.fill_(math.nan)
    return chunk

make = build._build_chunk
build.initialize_weights, build._build_chunk = fail, leave_nothing
if sys.argv[1] == "train":
    from emu3_megatron.training.__main__ import main
    del sys.argv[1]
    main()
else:
    from emu3_megatron.parallel.config import ParallelConfig
    from emu3_megatron.parallel.groups import initialize_parallel
    from emu3_megatron.training.checkpoint import load_model_for_inference
    initialize_parallel(ParallelConfig(), machine, seed=0)
    (model,), _, _ = load_model_for_inference(sys.argv[2])
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
"""
"""Undefined weights are NaN, so that any of them that is used is seen."""


def start(*arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        env=programs.environment(),
        cwd=programs.ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("averaged", [False, True])
def test_a_resumed_run_draws_no_weights_and_is_the_same_run(
    averaged: bool, tmp_path: Path, config_file: Path, reference: Path
) -> None:
    run = tmp_path / "run"
    step = "checkpoints/step-00000010"
    shutil.copytree(reference / step, run / step)
    options = ["--ema.decay", "0.9"] if averaged else []  # an average that begins at what was loaded
    start("train", "--config", str(config_file), "--run", str(run), *options)
    assert [line["step"] for line in runs.metrics(run)] == list(range(11, runs.STEPS + 1))
    assert runs.largest_difference(runs.metrics(run), runs.metrics(reference)) == 0.0
    start("load", str(run))


@pytest.mark.slow
def test_a_run_from_another_ones_weights_draws_none(
    tmp_path: Path, config_file: Path, reference: Path
) -> None:
    run = tmp_path / "run"
    few = ["--checkpoint.load", str(reference), "--trainer.steps", "6"]
    start("train", "--config", str(config_file), "--run", str(run), *few)
    first, last = runs.metrics(run)[0]["loss"], runs.metrics(reference)[-1]["loss"]
    assert first == pytest.approx(last, rel=0.2)
