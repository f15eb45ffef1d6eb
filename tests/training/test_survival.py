"""Runs that are killed, stopped and started again give the undisturbed loss curve."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from emu3_megatron.training import checkpoint_files as files
from emu3_megatron.training import command_line
from emu3_megatron.training.checkpoint import Record
from tests import programs
from tests.training import runs

LAST_STEP = 1e-4


def start(*arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        arguments,
        env=programs.environment(),
        cwd=programs.ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def wait_for_step(run: Path, step: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 240
    path = run / "metrics.jsonl"
    while not path.exists() or path.read_text().count("\n") < step:
        assert process.poll() is None, "the run ended before it was to be disturbed"
        assert time.monotonic() < deadline, "the run does not move"
        time.sleep(0.01)


def flip(path: Path) -> None:
    """Change one bit of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_equal(tmp_path: Path, config_file: Path, reference: Path) -> None:
    run = tmp_path / "run"
    options = ["--checkpoint.interval", "4"]
    process = start(*runs.command(config_file, run, *options))
    wait_for_step(run, 11, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()

    done = runs.train(config_file, run, *options)
    assert done.returncode == 0, done.stderr
    assert "resumed" in done.stderr
    lines = runs.metrics(run)
    assert [line["step"] for line in lines] == list(range(1, runs.STEPS + 1))
    for key in ("loss", "grad_norm"):
        assert runs.largest_difference(lines, runs.metrics(reference), key) == 0.0


@pytest.mark.slow
def test_kills_in_the_middle_of_saves_lose_nothing() -> None:
    """`make prove NAME=survival`, scaled down."""
    done = subprocess.run(
        [sys.executable, "tests/proofs/survival.py", "--kills", "3"],
        env=programs.environment(),
        cwd=programs.ROOT,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_sigterm_saves_and_the_run_goes_on(tmp_path: Path, config_file: Path, reference: Path) -> None:
    run = tmp_path / "run"
    # A reader process besides: the signal must not take it away before the run has saved.
    options = ["--checkpoint.interval", "1000", "--data.num_workers", "1"]
    process = start(*runs.command(config_file, run, *options, processes=2))
    wait_for_step(run, 3, process)
    os.killpg(process.pid, signal.SIGTERM)
    process.wait(timeout=120)

    saved = [path for path in (run / "checkpoints").iterdir() if (path / "COMMIT").exists()]
    assert len(saved) == 1
    progress = json.loads((saved[0] / "emu3.json").read_text())["progress"]
    assert 3 <= progress["step"] < runs.STEPS
    assert progress["windows"] == runs.GLOBAL_BATCH * progress["step"]

    assert runs.train(config_file, run, processes=2).returncode == 0
    lines = runs.metrics(run)
    assert [line["step"] for line in lines] == list(range(1, runs.STEPS + 1))
    assert [line["windows"] for line in lines] == [runs.GLOBAL_BATCH * line["step"] for line in lines]
    assert runs.largest_difference(lines, runs.metrics(reference)) <= LAST_STEP


@pytest.mark.slow
def test_bf16_with_averaged_weights_resumes_exactly_and_loads_for_inference(
    tmp_path: Path, config_file: Path
) -> None:
    options = ["--trainer.precision", "bf16", "--ema.decay", "0.9", "--model.hidden_dropout", "0.1"]
    whole, again = tmp_path / "whole", tmp_path / "again"
    assert runs.train(config_file, whole, *options).returncode == 0
    shutil.copytree(whole / "checkpoints" / "step-00000010", again / "checkpoints" / "step-00000010")
    assert runs.train(config_file, again, *options).returncode == 0
    assert runs.largest_difference(runs.metrics(again), runs.metrics(whole)) == 0.0
    assert Record.read(again / "checkpoints" / "step-00000020").ema
    commits = [json.loads((run / "checkpoints/step-00000020/COMMIT").read_text()) for run in (whole, again)]
    assert commits[0]["files"].keys() == commits[1]["files"].keys()


@pytest.mark.slow
def test_a_resumed_run_skips_the_spikes_that_an_undisturbed_one_skips(
    tmp_path: Path, config_file: Path
) -> None:
    options = ["--guard.spike_factor", "1.02", "--guard.warmup_steps", "4", "--guard.max_consecutive", "20"]
    whole, again = tmp_path / "whole", tmp_path / "again"
    assert runs.train(config_file, whole, *options).returncode == 0
    shutil.copytree(whole / "checkpoints" / "step-00000010", again / "checkpoints" / "step-00000010")
    assert runs.train(config_file, again, *options).returncode == 0
    expected = {line["step"]: line for line in runs.metrics(whole)}
    assert expected[10]["skipped_steps"] < expected[20]["skipped_steps"] < 20
    for line in runs.metrics(again):
        for key in ("loss", "grad_norm", "skipped_steps"):
            assert line[key] == expected[line["step"]][key], (line["step"], key)
    ends = [Record.read(run / "checkpoints" / "step-00000020").progress for run in (whole, again)]
    assert ends[0] == ends[1]


@pytest.mark.slow
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    tmp_path: Path, config_file: Path, reference: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(reference / "checkpoints", run / "checkpoints")
    flip(run / "checkpoints" / "step-00000020" / "__0_0.distcp")
    done = runs.train(config_file, run)
    assert done.returncode == 0, done.stderr
    assert "__0_0.distcp" in done.stderr
    assert [line["step"] for line in runs.metrics(run)] == list(range(11, runs.STEPS + 1))
    assert runs.largest_difference(runs.metrics(run), runs.metrics(reference)) == 0.0


@pytest.mark.slow
def test_a_run_does_not_start_from_damaged_weights(
    tmp_path: Path, config_file: Path, reference: Path
) -> None:
    first = tmp_path / "first"
    shutil.copytree(reference / "checkpoints", first / "checkpoints")
    damaged = first / "checkpoints" / "step-00000020"
    flip(damaged / "__0_0.distcp")
    options = ["--trainer.steps", "6", "--checkpoint.load"]
    refused = runs.train(config_file, tmp_path / "refused", *options, str(damaged))
    assert refused.returncode == 2
    errors = [line for line in refused.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert f"{damaged / '__0_0.distcp'}: CRC-32C" in errors[0]
    # Of a run, the one before is taken; two processes share the files.
    done = runs.train(config_file, tmp_path / "second", *options, str(first), processes=2)
    assert done.returncode == 0, done.stderr
    assert "__0_0.distcp" in done.stderr
    assert f"started from the weights of {first / 'checkpoints' / 'step-00000010'}" in done.stderr


@pytest.mark.slow
def test_a_save_that_fails_does_not_end_the_run(tmp_path: Path, config_file: Path, reference: Path) -> None:
    run = tmp_path / "run"
    in_the_way = run / "checkpoints" / "step-00000010"
    in_the_way.parent.mkdir(parents=True)
    in_the_way.write_text("a file where a folder should be")
    done = runs.train(config_file, run)
    assert done.returncode == 0, done.stderr
    assert "step-00000010 could not be written" in done.stderr
    assert [path.name for path in files.committed_folders(run / "checkpoints")] == ["step-00000020"]
    assert runs.largest_difference(runs.metrics(run), runs.metrics(reference)) == 0.0


@pytest.mark.slow
def test_changed_data_is_refused_by_name_unless_accepted(
    tmp_path: Path, config_file: Path, reference: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(reference / "checkpoints" / "step-00000010", run / "checkpoints" / "step-00000010")
    shutil.copy(reference / "config.yaml", run / "config.yaml")
    changed = ["--data.sources.stills.weight", "3"]
    refused = runs.train(config_file, run, *changed)
    assert refused.returncode == 2
    assert (run / "config.yaml").read_bytes() == (reference / "config.yaml").read_bytes()
    errors = [line for line in refused.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert "stills.weight: 2.0 -> 3.0" in errors[0]
    assert "accept_changed_data" in errors[0]
    changed += ["--checkpoint.accept_changed_data", "true", "--trainer.steps", "12"]
    accepted = runs.train(config_file, run, *changed)
    assert accepted.returncode == 0, accepted.stderr
    assert [line["step"] for line in runs.metrics(run)] == [11, 12]
    kept = command_line.parse(["--config", str(run / "config.yaml")]).config
    assert kept.data.sources["stills"].weight == 3


@pytest.mark.slow
def test_a_growing_batch_repeats_and_skips_no_window_over_a_resume(tmp_path: Path, config_file: Path) -> None:
    options = ["--trainer.initial_batch_size", "1", "--trainer.batch_ramp_steps", "9"]
    options += ["--profiler.start", "2", "--checkpoint.interval", "4"]
    whole, again = tmp_path / "whole", tmp_path / "again"
    assert runs.train(config_file, whole, *options).returncode == 0
    expected = [1] * 3 + [2] * 3 + [3] * 3 + [4] * 11
    windows = [line["windows"] for line in runs.metrics(whole)]
    assert [b - a for a, b in itertools.pairwise([0, *windows])] == expected
    assert len(list((whole / "profile").glob("*.json.gz"))) == 1
    # Twice, so that the resume is from a checkpoint in the middle of the ramp.
    assert runs.train(config_file, again, *options, "--trainer.steps", "6").returncode == 0
    assert runs.train(config_file, again, *options).returncode == 0
    assert [line["windows"] for line in runs.metrics(again)] == windows


@pytest.mark.slow
def test_a_run_loads_for_inference(reference: Path) -> None:
    import torch

    from emu3_megatron.parallel import platform
    from emu3_megatron.parallel.config import ParallelConfig
    from emu3_megatron.parallel.groups import destroy_parallel, initialize_parallel
    from emu3_megatron.training.checkpoint import load_model_for_inference
    from emu3_megatron.training.checkpoint_files import CheckpointError

    initialize_parallel(ParallelConfig(), platform.install("cpu"), seed=0)
    try:
        chunks, model, vocabulary = load_model_for_inference(reference)
        before, _, _ = load_model_for_inference(reference / "checkpoints" / "step-00000010")
        with pytest.raises(CheckpointError, match="no averaged weights"):
            load_model_for_inference(reference, averaged=True)
    finally:
        destroy_parallel()
    assert model.hidden_size == runs.MODEL["hidden_size"]
    assert vocabulary.name == "tiny-samples"
    assert not chunks[0].training
    weights = [dict(each[0].named_parameters()) for each in (chunks, before)]
    assert all(torch.isfinite(weight).all() for weight in weights[0].values())
    # From step 10 to step 20 every matrix moved.
    assert not any(
        torch.equal(weight, weights[1][name]) for name, weight in weights[0].items() if weight.dim() > 1
    )
