"""A mistake in a configuration is one clear line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from emu3_megatron.errors import UserError
from emu3_megatron.training import command_line
from emu3_megatron.training.config import TrainingConfig
from tests import programs
from tests.training import runs

TINY = programs.ROOT / "examples" / "configs" / "tiny.yaml"


def parse(*arguments: str, world_size: int = 1) -> TrainingConfig:
    asked = command_line.parse(["--config", str(TINY), "--world-size", str(world_size), *arguments])
    return asked.config


def test_dotted_options_override_the_file() -> None:
    config = parse(
        "--optimizer.learning_rate", "1e-4", "--data.sources.clips.weight=3", "--run_folder", "else/where"
    )
    assert config.optimizer.learning_rate == 1e-4
    assert config.data.sources["clips"].weight == 3.0
    assert config.data.sources["stills"].weight == 2.0
    assert config.run == "else/where"


def test_the_resolved_configuration_reads_back(tmp_path: Path) -> None:
    config = parse("--parallel.context_parallel_size", "2", world_size=2)
    path = tmp_path / "config.yaml"
    path.write_text(command_line.to_yaml(config))
    assert command_line.parse(["--config", str(path), "--world-size", "2"]).config == config


@pytest.mark.parametrize(
    ("arguments", "world_size", "said"),
    [
        (["--optimizer.learning_rat", "1"], 1, "learning_rat"),
        (["--trainer.steps", "many"], 1, "trainer.steps"),
        (["--trainer.precision", "fp16"], 1, "fp16"),
        (["--trainer.precision", "fp32", "--trainer.fp8", "hybrid"], 1, "needs trainer.precision=bf16"),
        (
            ["--trainer.precision", "bf16", "--trainer.fp8", "e4m3", "--data.context_length", "100"],
            1,
            "multiple of 16",
        ),
        (["--logging.histogram_interval", "-1"], 1, "histogram_interval=-1"),
        (["--parallel.tensor_model_parallel_size", "3"], 3, "num_query_groups=4 is not divisible"),
        (["--parallel.pipeline_model_parallel_size", "3"], 3, "num_layers=4 is not divisible"),
        (["--parallel.layers_in_last_stage", "1"], 1, "pipeline_model_parallel_size >= 2"),
        (
            ["--parallel.pipeline_model_parallel_size", "3", "--parallel.layers_in_last_stage", "1"],
            3,
            "leaves 3",
        ),
        (["--parallel.tensor_model_parallel_size", "2"], 3, "3 processes cannot be divided"),
        (["--trainer.micro_batch_size", "3"], 1, "global_batch_size=4 is not divisible"),
        ([], 8, "global_batch_size=4 is not divisible by data-parallel size x micro_batch_size = 8 x 1"),
        (["--data.alignment", "6", "--parallel.context_parallel_size", "2"], 2, "data.alignment=6"),
        (["--data.context_length", "1024"], 1, "max_position_embeddings=512"),
        (["--optimizer.warmup_steps", "100"], 1, "must be smaller than trainer.steps=100"),
        (["--optimizer.overlap_param_gather", "true"], 1, "overlap_grad_reduce"),
        (["--checkpoint.keep", "1"], 1, "at least 2"),
        (["--data.sources.stills.weight", "0"], 1, "weight=0"),
        (["--loss.vision_weight", "-1"], 1, "negative"),
        (["--data.template.caption_dropout", "2"], 1, "caption_dropout"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(arguments: list[str], world_size: int, said: str) -> None:
    with pytest.raises((UserError, ValueError)) as raised:
        parse(*arguments, world_size=world_size)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_an_unknown_key_in_a_file_is_named(tmp_path: Path) -> None:
    fields = yaml.safe_load(TINY.read_text())
    fields["trainer"]["setps"] = 3
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump(fields))
    with pytest.raises(UserError, match="setps"):
        command_line.parse(["--config", str(path)])


def program(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "emu3_megatron.training", *arguments],
        env=programs.environment(),
        cwd=programs.ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_the_program_ends_with_2_and_one_line() -> None:
    done = program("--config", str(TINY), "--optimizer.learning_rat", "1")
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: ")


def test_a_dry_run_prints_the_configuration_and_its_arithmetic() -> None:
    done = program(
        "--config", str(TINY), "--dry-run", "--world-size", "8", "--parallel.tensor_model_parallel_size", "2"
    )
    assert done.returncode == 0, done.stderr
    assert "8 processes = tensor 2 x pipeline 1 x context 1 x data 4" in done.stdout
    assert "4 windows x 512 tokens = 2,048 tokens" in done.stdout
    assert "learning_rate: 0.003" in done.stdout


def test_the_capability_report_needs_no_configuration() -> None:
    done = program("--capabilities")
    assert done.returncode == 0, done.stderr
    for name in ("CUDA", "Transformer Engine", "apex", "flash-attn", "FP8", "NVDEC", "resiliency extension"):
        assert any(line.startswith(name) for line in done.stdout.splitlines()), name
    assert "costs: " in done.stdout


@pytest.mark.slow
def test_an_error_that_every_rank_finds_is_printed_once(tmp_path: Path) -> None:
    config = runs.write_configuration(tmp_path, tmp_path / "nowhere")
    done = runs.train(config, tmp_path / "run", processes=2)
    assert done.returncode != 0
    assert sum(line.startswith("error: ") for line in done.stderr.splitlines()) == 1
    assert "nowhere" in done.stderr


@pytest.mark.slow
def test_a_run_that_hangs_ends_and_leaves_its_stacks(tmp_path: Path, config_file: Path) -> None:
    """The limit is far below what any step takes."""
    done = runs.train(config_file, tmp_path, "--guard.hang_minutes", "1e-5")
    assert done.returncode == 1
    stacks = (tmp_path / "stacks" / "rank-00000.txt").read_text()
    assert "trainer.py" in stacks
    assert " in fit" in stacks
