from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import programs


def tool(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "tools/checkpoint.py", *map(str, arguments)],
        env=programs.environment(),
        cwd=programs.ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.slow
def test_info_says_what_a_checkpoint_is(reference: Path) -> None:
    done = tool("info", reference)
    assert done.returncode == 0, done.stderr
    assert "step 20, windows 80, updates 20, skipped 0" in done.stdout
    weights = 4 * (64 * 8 * 24 + 3 * 64 * 128 + 128) + 64
    assert f"{weights + 2 * 2048 * 64:,} weights" in done.stdout


@pytest.mark.slow
def test_verify_names_the_damaged_file_of_any_checkpoint_of_a_run(reference: Path, tmp_path: Path) -> None:
    assert tool("verify", reference).returncode == 0
    shutil.copytree(reference / "checkpoints", tmp_path / "checkpoints")
    damaged = tmp_path / "checkpoints" / "step-00000010" / "common.pt"
    content = bytearray(damaged.read_bytes())
    content[7] ^= 1
    damaged.write_bytes(content)
    done = tool("verify", tmp_path)
    assert done.returncode == 1
    assert str(damaged) in done.stdout


@pytest.mark.slow
def test_diff_compares_records_and_tensors(reference: Path) -> None:
    first, second = (reference / "checkpoints" / f"step-000000{step}" for step in (10, 20))
    assert tool("diff", first, first).stdout == "equal\n"
    done = tool("diff", first, second)
    assert done.returncode == 1
    assert "progress.step: 10 -> 20" in done.stdout
    assert "output_layer.weight: differs by at most" in done.stdout


@pytest.mark.slow
def test_a_missing_checkpoint_is_one_line(tmp_path: Path) -> None:
    done = tool("info", tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
