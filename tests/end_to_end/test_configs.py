"""What the documentation tells people to type exists and parses."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from emu3_megatron.samples.quickstart.config import QuickstartConfig
from emu3_megatron.settings import read_settings
from emu3_megatron.vision.training_config import VisionTrainingConfig
from tests.programs import ROOT, TRAINING, Programs

CONFIGS = sorted((ROOT / "examples" / "configs").rglob("*.yaml"), key=str)
KINDS = {
    "vision.yaml": VisionTrainingConfig,
    "quickstart.yaml": QuickstartConfig,
    "sample-world.yaml": QuickstartConfig,
}
"""What a file configures, by its name; those of `vision-tokenizer/` train one, any other is a training."""
PREFERENCES = "emu3_megatron.posttraining.preferences"
TOOLS = sorted((ROOT / "tools").glob("*.py"))
README = (ROOT / "README.md").read_text()


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("config", CONFIGS, ids=name)
def test_every_example_is_a_valid_configuration(program: Programs, config: Path) -> None:
    kind = VisionTrainingConfig if config.parent.name == "vision-tokenizer" else KINDS.get(config.name)
    if kind is not None:
        settings = read_settings(kind, None, ["--config", str(config)])
        if isinstance(settings, VisionTrainingConfig):
            settings.check(2)
        else:
            for path in (settings.vision, settings.training):
                assert (ROOT / path).is_file()
        return
    cluster = re.search(r"-(\d+)gpu$", config.stem)
    processes = int(cluster.group(1)) if cluster else 2
    trainer = ("-m", PREFERENCES) if config.stem.split("-")[0] == "dpo" else TRAINING
    ended = program(*trainer, "--config", config, "--dry-run", "--world-size", processes)
    assert ended.code == 0, ended.err
    assert "trainer:" in ended.out
    assert not ended.err


@pytest.mark.parametrize("tool", TOOLS, ids=name)
def test_every_tool_explains_itself(program: Programs, tool: Path) -> None:
    ended = program(name(tool), "--help")
    assert ended.code == 0, ended.err
    assert "usage:" in ended.out


@pytest.mark.parametrize("module", [TRAINING[-1], PREFERENCES])
def test_training_explains_itself(program: Programs, module: str) -> None:
    ended = program("-m", module, "--help")
    assert ended.code == 0, ended.err
    assert "--trainer.steps" in ended.out
    assert ("--dpo.beta" in ended.out) == (module == PREFERENCES)


def test_the_readme_names_what_exists() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    commands = re.findall(r"^make ([a-z]+)|`make ([a-z]+)", README, re.MULTILINE)
    assert commands
    assert {first or second for first, second in commands} <= targets
    for path in re.findall(r"(?:tools|examples)/[\w/.-]+\.(?:py|yaml)", README):
        assert (ROOT / path).is_file(), path
    for folder in re.findall(r"^\| `([\w./]+)`", README, re.MULTILINE):
        assert (ROOT / "emu3_megatron" / folder).exists() or (ROOT / folder).exists(), folder
    for module in re.findall(r"-m (emu3_megatron\.\w+)", README):
        assert (ROOT / module.replace(".", "/") / "__main__.py").is_file(), module


def test_the_sources_and_pages_name_examples_that_exist() -> None:
    places = [*(ROOT / "emu3_megatron").rglob("*.py"), *TOOLS, *(ROOT / "docs").glob("*.md")]
    named = {
        (name(place), path)
        for place in places
        for path in re.findall(r"examples/configs/[\w./-]+\.yaml", place.read_text())
    }
    assert len(named) > 10
    assert not [(place, path) for place, path in named if not (ROOT / path).is_file()]
