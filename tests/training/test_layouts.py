"""Every layout trains as one process does, and goes on where another one stopped."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.training import layouts, runs

TWO = {
    "dp2": False,
    "tp2": True,
    "tp2-sp": False,
    "pp2": True,
    "pp2-interleaved": False,
    "pp2-uneven": True,
    "cp2": True,
    "cp2-a2a": False,
    "dp2-overlap": True,
}
"""Layouts of two processes, and whether the optimizer is distributed. That of the reference, which is one
process, is. `make prove NAME=layouts` runs every layout with both."""

FOUR = {"tp2-pp2-sp": True, "cp2-dp2": True}
"""Layouts of four processes."""

DROPOUT = [
    part
    for place in ("embedding_dropout", "attention_dropout", "hidden_dropout")
    for part in (f"--model.{place}", "0.1")
]
DROPPING = {"tp2-sp": 2, "cp2-a2a": 2, "pp2-interleaved": 2, "tp2-pp2-sp": 4}
"""Layouts that train with dropout, and their processes."""

RESUMED = {
    "tensor parallel -> data parallel": ("tp2", "dp2"),
    "plain optimizer -> distributed": ("tp2-sp", "cp2"),
    "parameters gathered late -> at once": ("dp2-overlap", "dp2"),
    "four processes -> two, interleaved": ("tp2-pp2-sp", "pp2-interleaved"),
}
"""Distributed to plain optimizer, and back; other degrees; other numbers of processes."""


def options(name: str) -> list[str]:
    layout, distributed = {**layouts.TWO, **layouts.FOUR}[name], {**TWO, **FOUR}[name]
    return layouts.options(layout, distributed_optimizer=distributed)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, config_file: Path) -> Path:
    folder = tmp_path_factory.mktemp("layouts")
    for processes, names in ((2, TWO), (4, FOUR)):
        arguments = {name: options(name) for name in names}
        dropping = [name for name, needed in DROPPING.items() if needed == processes]
        arguments |= {f"{name}-dropout": [*options(name), *DROPOUT] for name in dropping}
        runs.launch_layouts(folder, config_file, arguments, processes=processes)
    return folder


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory, trained: Path, config_file: Path) -> Path:
    """Step 10 of one layout, continued to step 20 by another."""
    folder = tmp_path_factory.mktemp("resumed")
    arguments = {}
    for number, (first, second) in enumerate(RESUMED.values()):
        source = trained / first / "checkpoints" / "step-00000010"
        shutil.copytree(source, folder / str(number) / "checkpoints" / source.name)
        arguments[str(number)] = options(second)
    runs.launch_layouts(folder, config_file, arguments, processes=2)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", [*TWO, *FOUR])
def test_a_layout_equals_one_process(trained: Path, reference: Path, name: str) -> None:
    first, every = layouts.differences(trained / name, reference)
    assert first <= layouts.FIRST_STEP
    assert every <= layouts.ALL_STEPS


@pytest.mark.slow
def test_dropout_belongs_to_tokens_and_not_to_ranks(trained: Path, tmp_path: Path, config_file: Path) -> None:
    done = runs.train(config_file, tmp_path / "one", *DROPOUT, "--model.recompute", "full")
    assert done.returncode == 0, done.stderr
    for name in DROPPING:
        first, every = layouts.differences(trained / f"{name}-dropout", tmp_path / "one")
        assert first <= layouts.FIRST_STEP
        assert every <= layouts.ALL_STEPS
    # It did drop something.
    lines = runs.metrics(trained / "tp2-sp-dropout")
    assert runs.largest_difference(lines, runs.metrics(trained / "tp2-sp")) > layouts.ALL_STEPS


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(RESUMED)), ids=list(RESUMED))
def test_another_layout_goes_on(resumed: Path, reference: Path, number: int) -> None:
    lines = runs.metrics(resumed / str(number))
    assert [line["step"] for line in lines] == list(range(11, runs.STEPS + 1))
    assert runs.largest_difference(lines, runs.metrics(reference)) <= layouts.ALL_STEPS
