"""Every layout trains as one process does, and goes on where another one stopped."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.training import runs

FIRST_STEP = 1e-5
LAST_STEP = 1e-4

PARALLEL = {
    "tp": "--parallel.tensor_model_parallel_size",
    "pp": "--parallel.pipeline_model_parallel_size",
    "cp": "--parallel.context_parallel_size",
    "vpp": "--parallel.virtual_pipeline_model_parallel_size",
    "sp": "--parallel.sequence_parallel",
    "comm": "--parallel.cp_comm",
    "do": "--optimizer.use_distributed_optimizer",
}

ALL = bool(os.environ.get("EMU3_ALL_LAYOUTS"))
"""Set it to run every layout with both kinds of optimizer,
on four processes besides two (a quarter of an hour)."""

TWO: dict[str, dict[str, object]] = {
    "dp2": {"do": "false"},
    "tp2": {"tp": 2, "do": "true"},
    "tp2-sp": {"tp": 2, "sp": "true", "do": "false"},
    "pp2": {"pp": 2, "do": "true"},
    "pp2-interleaved": {"pp": 2, "vpp": 2, "do": "false"},
    "cp2": {"cp": 2, "do": "true"},
    "cp2-a2a": {"cp": 2, "comm": "a2a", "do": "false"},
}
"""Layouts of two processes. The reference, of one, has a distributed optimizer."""

FOUR: dict[str, dict[str, object]] = {
    "tp2-pp2-sp": {"tp": 2, "pp": 2, "sp": "true", "do": "true"},
    "cp2-dp2": {"cp": 2, "do": "true"},
}
"""Layouts of four processes; what is left is data parallel."""

if ALL:
    other = {"true": "false", "false": "true"}
    TWO |= {f"{name}-other": {**layout, "do": other[str(layout["do"])]} for name, layout in TWO.items()}
    FOUR |= {
        "dp4": {"do": "true"},
        "tp4-sp": {"tp": 4, "sp": "true", "do": "false"},
        "pp4": {"pp": 4, "do": "true"},
        "cp4": {"cp": 4, "do": "true"},
        "pp2-cp2": {"pp": 2, "cp": 2, "do": "false"},
        "tp2-cp2-sp": {"tp": 2, "cp": 2, "sp": "true", "do": "true"},
    }

RESUMED = {
    "tensor parallel -> data parallel": ("tp2", "dp2"),
    "plain optimizer -> distributed": ("tp2-sp", "cp2"),
    "four processes -> two, interleaved": ("tp2-pp2-sp", "pp2-interleaved"),
}
"""Distributed to plain optimizer, and back; other degrees; other numbers of processes."""


def options(layout: dict[str, object]) -> list[str]:
    return [part for name, value in layout.items() for part in (PARALLEL[name], str(value))]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, config_file: Path) -> Path:
    folder = tmp_path_factory.mktemp("layouts")
    for processes, layouts in ((2, TWO), (4, FOUR)):
        arguments = {name: options(layout) for name, layout in layouts.items()}
        runs.launch_layouts(folder, config_file, arguments, processes=processes)
    return folder


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory, trained: Path, config_file: Path) -> Path:
    """Step 10 of one layout, continued to step 20 by another."""
    folder = tmp_path_factory.mktemp("resumed")
    layouts = {}
    for number, (first, second) in enumerate(RESUMED.values()):
        source = trained / first / "checkpoints" / "step-00000010"
        shutil.copytree(source, folder / str(number) / "checkpoints" / source.name)
        layouts[str(number)] = options(TWO[second])
    runs.launch_layouts(folder, config_file, layouts, processes=2)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", [*TWO, *FOUR])
def test_a_layout_equals_one_process(trained: Path, reference: Path, name: str) -> None:
    lines, expected = runs.metrics(trained / name), runs.metrics(reference)
    assert [line["step"] for line in lines] == list(range(1, runs.STEPS + 1))
    for key in ("loss", "loss_text", "loss_vision", "grad_norm", "tokens_vision", "padding_fraction"):
        assert runs.largest_difference(lines[:1], expected, key) <= FIRST_STEP, key
    for key in ("loss", "loss_text", "loss_vision"):
        assert runs.largest_difference(lines, expected, key) <= LAST_STEP, key


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(RESUMED)), ids=list(RESUMED))
def test_another_layout_goes_on(resumed: Path, reference: Path, number: int) -> None:
    lines = runs.metrics(resumed / str(number))
    assert [line["step"] for line in lines] == list(range(11, runs.STEPS + 1))
    assert runs.largest_difference(lines, runs.metrics(reference)) <= LAST_STEP
