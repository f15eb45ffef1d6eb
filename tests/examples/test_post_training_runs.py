"""The post-training configurations for a CPU are run from end to end, as their first lines say."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import programs
from tests.programs import ROOT, TRAINING

CONFIGS = ROOT / "examples" / "configs"
PREFERENCES = ("-m", "emu3_megatron.posttraining.preferences")
START = {
    "understanding-1": "tiny",
    "understanding-2": "understanding-1",
    "quality": "tiny",
    "unified": "tiny",
    "dpo": "tiny",
    "lora": "tiny",
}
"""What each starts from."""
STEPS = 24
"""Of each, in the place of what its file says."""
SHORTER = ("--trainer.steps", STEPS, "--validation.interval", STEPS // 2)

Train = Callable[[str], Path]


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Train:
    """Runs a configuration, and what it starts from, once; returns the folder in which it was typed."""
    folder = tmp_path_factory.mktemp("runs")
    done: set[str] = set()

    def run(name: str) -> Path:
        if name not in done:
            if name in START:
                run(START[name])
            file = CONFIGS / ("tiny.yaml" if name == "tiny" else f"post-training/{name}.yaml")
            program = PREFERENCES if name == "dpo" else TRAINING
            ended = programs.shared()(*program, "--config", file, *SHORTER, folder=folder)
            assert ended.code == 0, ended.err[-4000:]
            done.add(name)
        return folder

    return run


@pytest.mark.slow
@pytest.mark.parametrize("name", START)
def test_a_configuration_trains_and_measures(train: Train, name: str) -> None:
    settings: dict[str, Any] = yaml.safe_load((CONFIGS / "post-training" / f"{name}.yaml").read_text())
    assert settings["checkpoint"]["load"] == (
        "runs/tiny" if START[name] == "tiny" else f"runs/tiny-{START[name]}"
    )
    lines = (train(name) / settings["run"] / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines]
    assert [step["step"] for step in steps] == list(range(1, STEPS + 1))
    assert all(math.isfinite(step["loss"]) for step in steps)
    wanted = {"validation_loss"}
    if name == "unified":
        wanted = {f"validation_loss_{source}" for source in settings["data"]["validation"]}
    elif name == "dpo":
        wanted = {"validation_loss", "validation_preferred"}
    assert wanted <= steps[-1].keys()


@pytest.mark.slow
def test_adapters_are_merged(train: Train) -> None:
    folder = train("lora")
    arguments = ("--source", "runs/tiny-lora", "--output", "runs/tiny-lora-merged")
    ended = programs.shared()(ROOT / "tools/lora.py", "merge", *arguments, folder=folder)
    assert ended.code == 0, ended.err
    assert "merged into" in ended.out
    assert (folder / "runs/tiny-lora-merged").is_dir()
