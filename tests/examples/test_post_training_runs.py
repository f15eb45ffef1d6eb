"""The post-training configurations for a CPU are run from end to end, as their first lines say."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.end_to_end.programs import ROOT, TRAINING, start

CONFIGS = ROOT / "examples" / "configs"
PREFERENCES = ("-m", "emu3_megatron.posttraining.preferences")
ORDER = ("understanding-1", "understanding-2", "quality", "unified", "dpo", "lora")
"""Stage 2 of understanding starts from stage 1."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder in which everything was run once."""
    folder = tmp_path_factory.mktemp("runs")
    files = [CONFIGS / "tiny.yaml", *(CONFIGS / "post-training" / f"{name}.yaml" for name in ORDER)]
    for file in files:
        program = PREFERENCES if file.stem == "dpo" else TRAINING
        ended = start(*program, "--config", file, folder=folder)
        assert ended.code == 0, (file, ended.err[-4000:])
    return folder


def metrics(folder: Path, name: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A configuration, and what its run reported of each step."""
    settings = yaml.safe_load((CONFIGS / "post-training" / f"{name}.yaml").read_text())
    lines = (folder / settings["run"] / "metrics.jsonl").read_text().splitlines()
    return settings, [json.loads(line) for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize("name", ORDER)
def test_it_trains_to_its_last_step(folder: Path, name: str) -> None:
    settings, steps = metrics(folder, name)
    losses = [step["loss"] for step in steps if "loss" in step]
    assert len(losses) == settings["trainer"]["steps"]
    assert all(math.isfinite(loss) for loss in losses)
    assert sum(losses[-10:]) < sum(losses[:10])


@pytest.mark.slow
@pytest.mark.parametrize("name", ORDER)
def test_held_out_data_is_measured(folder: Path, name: str) -> None:
    settings, steps = metrics(folder, name)
    keys = {key for step in steps for key in step}
    assert settings["data"]["validation"]
    assert any(key.startswith("validation_") for key in keys)
    if name == "unified":
        assert {f"validation_loss_{source}" for source in settings["data"]["validation"]} <= keys
    if name == "dpo":
        assert "validation_preferred" in keys


@pytest.mark.slow
def test_adapters_are_merged(folder: Path) -> None:
    arguments = ("--source", "runs/tiny-lora", "--output", "runs/tiny-lora-merged")
    ended = start(ROOT / "tools/lora.py", "merge", *arguments, folder=folder)
    assert ended.code == 0, ended.err
    assert "merged into" in ended.out
