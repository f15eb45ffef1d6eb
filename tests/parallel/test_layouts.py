"""Every layout computes what one process computes; 2 and 4 processes, one launch each."""

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests import programs

WORKER = Path(__file__).with_name("layouts_worker.py")


@functools.lru_cache
def _results(processes: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "results.json"
        ended = programs.shared()(WORKER, output, processes=processes)
        assert ended.code == 0, ended.err[-5000:]
        return json.loads(output.read_text())


TWO = [
    "TP2",
    "TP2 SP",
    "TP2 SP QK-norm",
    "TP2 QK-norm",
    "PP2",
    "PP2 interleaved",
    "CP2 all-gather",
    "CP2 all-to-all",
    "CP2 QK-norm",
    "DP2",
    "DP2 distributed optimizer",
    "TP2 SP distributed optimizer",
    "TP2 bf16",
    "DP2 bf16 distributed optimizer",
]
FOUR = [
    "TP2 CP2",
    "TP2 SP CP2 all-to-all",
    "PP2 TP2 SP",
    "PP2 CP2",
    "CP2 DP2 distributed optimizer",
    "CP4 all-gather",
    "CP4 all-to-all",
    "TP4 SP",
    "PP4",
    "DP4",
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "name"), [(2, name) for name in TWO] + [(4, name) for name in FOUR], ids=[*TWO, *FOUR]
)
def test_layout_equals_one_process(processes: int, name: str) -> None:
    (result,) = (case for case in _results(processes)["cases"] if case["name"] == name)
    limits = {"loss": 1e-6, "gradients": 1e-5, "norm": 1e-5, "weights": 1e-6}
    if "bf16" in name:
        limits = {"loss": 1e-3, "gradients": 5e-2, "norm": 1e-2, "weights": 1e-3}
    assert {key: result[key] for key in limits if not result[key] < limits[key]} == {}


@pytest.mark.slow
def test_dropout_is_equal_on_tensor_parallel_and_different_on_data_parallel_ranks() -> None:
    assert _results(2)["dropout"] == {"tensor": True, "data": False}


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_training_makes_no_call_that_needs_cuda_and_is_not_redirected(processes: int) -> None:
    assert _results(processes)["calls"] == []
