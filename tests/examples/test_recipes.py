"""The recipes for clusters: what their first lines say of memory and time is what the estimator says now."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from tests.programs import ROOT

CONFIGS = ROOT / "examples" / "configs"
RECIPES = [*sorted(CONFIGS.rglob("*-*gpu.yaml"), key=str), CONFIGS / "emu3-8b" / "lora.yaml"]
DEVICE_GIB = 80.0
MARGIN = 2 / 3
"""Of a device's memory that a recipe may ask for by the estimator, which has been too low."""
STAGES = ("stage1", "stage2", "quality", "understanding-1", "understanding-2", "dpo", "unified")
UNITS = {"days": 86400, "hours": 3600, "minutes": 60}


def name(path: Path) -> str:
    return str(path.relative_to(CONFIGS))


def numbers(pattern: str, text: str) -> list[float]:
    """The numbers of the one place in a text that a pattern finds."""
    (found,) = re.findall(pattern, text)
    return [float(number.replace(",", "")) for number in ([found] if isinstance(found, str) else found)]


def estimate(command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """What a command line of `tools/estimate.py` prints."""
    start, program, *arguments = shlex.split(command)
    assert (start, program) == ("python", "tools/estimate.py")
    found = importlib.util.spec_from_file_location("estimate_tool", ROOT / program)
    assert found is not None
    assert found.loader is not None
    tool = importlib.util.module_from_spec(found)
    found.loader.exec_module(tool)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", [program, *arguments])
    tool.main()
    return capsys.readouterr().out


@pytest.mark.parametrize("recipe", RECIPES, ids=name)
def test_a_recipe_says_what_the_estimator_says_and_fits(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    head = recipe.read_text().split("\nrun:")[0]
    text = " ".join(line.lstrip("# ") for line in head.splitlines())
    (command,) = re.findall(r"python tools/estimate\.py .*?--document-tokens \d+", text)
    command = command.replace(" \\ ", " ")
    assert name(recipe) in command
    said = estimate(command, monkeypatch, capsys)
    (memory,) = numbers(r"memory of a rank  ([\d.]+) GiB", said)
    (seconds,) = numbers(r"time of a step    ([\d.]+) s", said)
    (speed,) = numbers(r"tokens/s, ([\d,]+) a device", said)
    (steps,) = numbers(r"the run           ([\d,]+) steps", said)
    written = r"says: ([\d.]+) GiB (?:a rank )?and ([\d.]+) s a step \(([\d,]+) tokens/s"
    assert numbers(written, text) == [
        memory,
        pytest.approx(seconds, rel=0.03),
        pytest.approx(speed, rel=0.01),
    ]
    ((long, unit),) = re.findall(r"so ([\d.]+) (days|hours|minutes) in all", text)
    assert float(long) * UNITS[unit] == pytest.approx(steps * seconds, rel=0.05)
    assert memory <= MARGIN * DEVICE_GIB
    if cluster := re.search(r"-(\d+)gpu$", recipe.stem):
        assert f"--processes {cluster[1]} " in command
        assert f"on {cluster[1]} H100s" in text


def test_every_stage_has_a_recipe_for_each_cluster() -> None:
    for stage in STAGES:
        for devices in (8, 64, 512):
            assert CONFIGS / "emu3-8b" / f"{stage}-{devices}gpu.yaml" in RECIPES
