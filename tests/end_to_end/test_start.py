"""A reader's way: the commands of docs/start.md and of the README, as they are printed, in a fresh copy.

What is scaled down is not in the commands: the copy's small model is smaller still, and `make quickstart`
takes the configuration of the scaled-down quickstart, whose stages are done already.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from emu3_megatron.files import json_lines
from tests.end_to_end.conftest import Quickstart
from tests.programs import ROOT
from tests.slurm.cluster import missing_programs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

BLOCK = re.compile(r"^```(?:bash)?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LEFT_BEHIND = (
    ".git",
    ".venv",
    "runs",
    "site",
    "build",
    "__pycache__",
    ".*_cache",
    ".hypothesis",
    "*.egg-info",
)
SMALLER = {
    "num_layers: 4": "num_layers: 1",
    "hidden_size: 128": "hidden_size: 32",
    "ffn_hidden_size: 384": "ffn_hidden_size: 64",
    "steps: 100": "steps: 20",
}
SUITE = """\
import pytest

def test_fast():
    pass

@pytest.mark.slow
def test_slow():
    pass
"""


def blocks(page: str) -> list[str]:
    found = BLOCK.findall((ROOT / page).read_text())
    assert found
    return [str(block) for block in found]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory, quickstart: Quickstart) -> Path:
    """This repository as a clone has it, but with the environment that is there."""
    folder = tmp_path_factory.mktemp("start") / "checkout"
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*LEFT_BEHIND))
    (folder / ".venv").symlink_to(sys.prefix)
    (folder / "runs").mkdir()
    (folder / "runs" / "quickstart").symlink_to(quickstart.run)
    config = folder / "examples" / "configs" / "tiny.yaml"
    text = config.read_text()
    for printed, smaller in SMALLER.items():
        assert printed in text
        text = re.sub(rf"\b{printed}\b", smaller, text)
    config.write_text(text)
    # Nothing is to be installed from here: `make env` has to find what it would make.
    sys.path.insert(0, str(ROOT / "tools"))
    from setup_environment import wanted_stamp

    sys.path.pop(0)
    stamp = Path(sys.prefix) / "emu3-environment"
    assert stamp.exists(), "run `make env` first"
    assert stamp.read_text() == wanted_stamp("test,docs"), "run `make env` first"
    return folder


def shell(checkout: Path, script: str, quickstart: Quickstart, **more: str) -> str:
    """Run lines in one shell, which ends at the first that fails; what they said."""
    tools = checkout.parent / "bin"
    tools.mkdir(exist_ok=True)
    # The packages are there: asked for, nothing is to be done.
    (tools / "sudo").write_text('#!/bin/sh\n[ "$1" = apt-get ]\n')
    (tools / "sudo").chmod(0o755)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PATH": f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "PYTHONPATH": str(checkout),
        "CONFIG": str(quickstart.config),
        **more,
    }
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=checkout,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def losses(checkout: Path, run: str) -> list[float]:
    return [line["loss"] for line in json_lines(checkout / "runs" / run / "metrics.jsonl")]


def test_the_start_page_leads_to_a_picture_a_conversion_and_two_nodes(
    checkout: Path, quickstart: Quickstart
) -> None:
    script = "\n".join(blocks("docs/start.md"))
    without, _, cluster = script.partition("sudo apt-get install")
    assert "tests.slurm.cluster" in cluster
    said = shell(checkout, without, quickstart)
    assert "context_length: 512" in said
    one, two = losses(checkout, "tiny"), losses(checkout, "tiny-tensor-parallel")
    assert (len(one), len(two)) == (120, 20)
    assert two == pytest.approx(one[:20], rel=1e-4)
    drawn = {path.name for path in (checkout / "runs/drawn").glob("*.png")}
    assert drawn == {"all.png", *(f"{number:05d}.png" for number in range(8))}
    assert list((checkout / "runs/imported/checkpoints").glob("*/COMMIT"))

    if missing := missing_programs():
        if os.environ.get("EMU3_REQUIRE_SLURM"):
            pytest.fail(f"no {', '.join(missing)} here")
        pytest.skip(f"no {', '.join(missing)} here: the part on two nodes was left out")
    shell(checkout, "sudo apt-get install" + cluster, quickstart)
    assert losses(checkout, "two-nodes") == pytest.approx(one[:20], rel=1e-4)


def test_the_commands_of_the_readme_run(checkout: Path, quickstart: Quickstart) -> None:
    (commands,) = blocks("README.md")
    assert re.findall(r"^make (\w+)", commands, re.MULTILINE) == ["quickstart", "test"]
    (checkout / "tests" / "test_of_two.py").write_text(SUITE)
    said = shell(checkout, commands, quickstart, PYTEST_ADDOPTS="tests/test_of_two.py")
    assert len(re.findall(r"\b1 passed\b", said)) == 2
    assert "failed" not in said
