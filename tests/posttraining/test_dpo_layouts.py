"""A step of preference training under layouts of two processes: numbers and gradients of one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests import programs
from tests.posttraining.pairs import draw_pairs, write_pairs

WORKER = Path(__file__).with_name("layouts_worker.py")
NAMES = ["dp2", "tp2", "tp2-sp", "pp2", "pp2-interleaved", "cp2", "cp2-a2a"]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("layouts")
    pairs = write_pairs(folder / "pairs", draw_pairs(8))
    ended = programs.shared()(WORKER, folder / "results.json", pairs, processes=2)
    assert ended.code == 0, ended.err[-4000:]
    return json.loads((folder / "results.json").read_text())


def check(result: dict[str, Any]) -> None:
    """Relative differences within fp32; what is expected was done twice, so its counts are twice as high."""
    assert result["gradients"] < 2e-5
    assert result["largest gradient"] > 1e-3
    assert result["named"].keys() == result["expected"].keys()
    for key, want in result["expected"].items():
        if key == "pairs" or key.startswith("tokens_"):
            assert 2 * result["named"][key] == want, key
        else:
            assert result["named"][key] == pytest.approx(want, rel=1e-5, abs=1e-6), key


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["whole", "adapters"])
@pytest.mark.parametrize("name", NAMES)
def test_a_layout_equals_one_process(results: dict[str, Any], name: str, kind: str) -> None:
    check(results[f"{name} {kind}"])
