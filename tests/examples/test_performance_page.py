"""docs/performance.md is what the recorded results say."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("record", ROOT / "benchmarks" / "record.py")
assert SPEC is not None
assert SPEC.loader is not None
record = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(record)


def test_the_page_is_that_of_the_results() -> None:
    written = (ROOT / "docs" / "performance.md").read_text()
    assert written == record.page(record.RESULTS), "run: python benchmarks/record.py"


def test_a_run_is_kept_with_its_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program = tmp_path / "toy.py"
    program.write_text('"""Speed of toys.\n\nMore."""\nimport sys\nprint("fast", sys.argv[1:])\n')
    kept = json.loads(record.record(program, ["--size", "2"], tmp_path).read_text())
    assert kept["output"] == ["fast ['--size', '2']"]
    assert kept["about"] == "Speed of toys."
    assert kept["arguments"] == ["--size", "2"]
    assert kept["machine"]["cores"] >= 1
    assert "python" in kept["versions"]
    assert "fast" in capsys.readouterr().out


def test_a_failed_run_is_not_kept(tmp_path: Path) -> None:
    program = tmp_path / "toy.py"
    program.write_text("raise SystemExit(3)\n")
    with pytest.raises(SystemExit, match="ended with 3"):
        record.record(program, [], tmp_path)
    assert not list(tmp_path.glob("*.json"))


def test_results_are_printed_below_their_program(tmp_path: Path) -> None:
    result = {
        "about": "What it measures.",
        "arguments": ["--windows", "1 2"],
        "environment": {"OMP_NUM_THREADS": "1"},
        "date": "2030-01-02",
        "machine": {"processor": "a chip", "cores": 2, "memory_gib": 24, "gpus": [], "load_before": 0.1},
        "versions": {"python": "3.11"},
    }
    lines = ['{"case": "a", "speed": 1.5}', '{"case": "b", "speed": 2}']
    for program, output in (("benchmarks/plan.py", ["blocks: 3"]), ("benchmarks/gpu/step.py", lines)):
        name = program.replace("/", "-")
        (tmp_path / f"{name}.json").write_text(json.dumps({**result, "program": program, "output": output}))
    text = record.page(tmp_path)
    plan = text.partition("## `benchmarks/plan.py`")[2].partition("\n## ")[0]
    assert "OMP_NUM_THREADS=1 python benchmarks/plan.py --windows '1 2'" in plan
    assert "2030-01-02; a chip, 2 cores, 24 GiB; python 3.11; load before the run 0.1" in plan
    assert "```text\nblocks: 3\n```" in plan
    step = text.partition("## `benchmarks/gpu/step.py`")[2]
    assert "| case | speed |\n| --- | --- |\n| a | 1.5 |\n| b | 2 |" in step
    assert "What it measures." in step
