"""Whole runs of the unified recipe: layouts equal one process, resumes are exact, tasks are measured."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from emu3_megatron.training import command_line
from tests import programs
from tests.training import layouts, runs

STEPS = 8
LAYOUTS = {
    2: {"tp2-sp": True, "cp2": True, "dp2": False, "pp2": True},
    4: {"tp2-pp2-sp": True, "tp2-cp2-sp": False, "pp2-dp2": True, "pp2-cp2": True},
}
"""Layouts by number of processes, and whether the optimizer is distributed."""

TALK = {
    "vision_weight": 0.0,
    "meta_weight": 0.0,
    "break_weight": 0.0,
    "control_weight": 0.0,
    "end_weight": 1.0,
}
DRAW = {**TALK, "text_weight": 0.0, "vision_weight": 1.0, "end_weight": None}


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures, questions about pictures, and texts, each with weights of its own."""
    from emu3_megatron.samples.tiny import prepare

    folder = tmp_path_factory.mktemp("unified")
    for name in ("stills", "talks", "texts", "held-out", "held-out-talks"):
        prepare(folder / name)
    config = runs.configuration(folder)
    config["model"] = {**runs.MODEL, "max_position_embeddings": 512}
    config["trainer"]["steps"] = STEPS
    config["checkpoint"]["interval"] = STEPS // 2
    config["validation"] = {"interval": STEPS, "windows": 4}
    config["data"] |= {
        "context_length": 512,
        "sources": {
            "stills": {
                "path": str(folder / "stills"),
                "template": {"caption_dropout": 0.2},
                "loss": DRAW,
            },
            "talks": {"path": str(folder / "talks"), "loss": TALK},
            "texts": {"path": str(folder / "texts"), "loss": TALK, "weight": 0.2},
        },
        "validation": {
            "held-out": {"path": str(folder / "held-out"), "loss": DRAW},
            "held-out-talks": {"path": str(folder / "held-out-talks"), "loss": TALK},
        },
    }
    path = folder / "config.yaml"
    path.write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, config_file: Path) -> Path:
    run = tmp_path_factory.mktemp("reference") / "run"
    done = runs.train(config_file, run, timeout=1200)
    assert done.returncode == 0, done.stderr
    return run


def test_tasks_are_measured_apart(reference: Path) -> None:
    last = runs.metrics(reference)[-1]
    assert last["validation_loss_held-out"] == pytest.approx(last["validation_loss_held-out_vision"])
    answers = last["validation_loss_held-out-talks_text"], last["validation_loss_held-out-talks_end"]
    assert min(answers) <= last["validation_loss_held-out-talks"] <= max(answers)
    assert 0 <= last["validation_accuracy_held-out-talks_text"] <= 1
    assert "loss_stills_end" not in last, "EOS is apart only where it has a weight of its own"
    assert last["loss_talks_prompt"] > 0, "prompts are measured though they are not trained"


def test_a_resume_gives_the_same_run(tmp_path: Path, reference: Path, config_file: Path) -> None:
    shutil.copytree(
        reference / "checkpoints" / f"step-{STEPS // 2:08d}",
        tmp_path / "run" / "checkpoints" / f"step-{STEPS // 2:08d}",
    )
    done = runs.train(config_file, tmp_path / "run", timeout=1200)
    assert done.returncode == 0, done.stderr
    again, once = runs.metrics(tmp_path / "run"), runs.metrics(reference)[STEPS // 2 :]
    assert [line["step"] for line in again] == [line["step"] for line in once]
    for key in ("loss", "grad_norm", "learning_rate", "windows", "loss_talks_text", "validation_loss"):
        assert [line.get(key) for line in again] == [line.get(key) for line in once]


@pytest.mark.slow
@pytest.mark.parametrize("processes", LAYOUTS)
def test_layouts_equal_one_process(
    tmp_path: Path, reference: Path, config_file: Path, processes: int
) -> None:
    known = layouts.TWO | layouts.FOUR
    arguments = {
        name: layouts.options(known[name], distributed_optimizer=distributed)
        for name, distributed in LAYOUTS[processes].items()
    }
    runs.launch_layouts(tmp_path, config_file, arguments, processes=processes, save=False, timeout=1200)
    expected = runs.metrics(reference)
    keys = ("loss", "grad_norm", "loss_talks_text", "loss_talks_end", "loss_stills_vision")
    for name in arguments:
        lines = runs.metrics(tmp_path / name)
        first, every = (
            max(runs.largest_difference(part, expected, key) for key in keys) for part in (lines[:1], lines)
        )
        assert first <= layouts.FIRST_STEP, name
        assert every <= layouts.ALL_STEPS, name
        assert lines[-1]["validation_loss"] == pytest.approx(expected[-1]["validation_loss"], rel=1e-4)


CONFIGS = programs.ROOT / "examples/configs"


@pytest.mark.parametrize(
    ("size", "gpus"), [("emu3-8b", 8), ("emu3-8b", 64), ("emu3-8b", 512), ("post-training", 0)]
)
@pytest.mark.parametrize("recipe", ["quality", "understanding-1", "understanding-2", "unified"])
def test_the_example_configurations_are_read(size: str, gpus: int, recipe: str) -> None:
    file = CONFIGS / size / (f"{recipe}-{gpus}gpu.yaml" if gpus else f"{recipe}.yaml")
    arguments = ["--config", str(file), "--world-size", str(gpus or 1)]
    config = command_line.parse(arguments).config
    losses = [source.loss or config.loss for source in config.data.sources.values()]
    assert all(loss.prompt_weight == 0 and loss.meta_weight == 0 for loss in losses)
    if recipe in ("quality", "unified"):
        assert config.optimizer.schedule == "wsd"
        assert config.optimizer.min_learning_rate == 0
