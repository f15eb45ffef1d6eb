"""A save that one rank alone cannot write fails on all of them, and the run goes on."""

from __future__ import annotations

from pathlib import Path

import pytest

from emu3_megatron.training import checkpoint_files as files
from tests import programs
from tests.training import failing_saves, runs

WRITTEN_BY_RANK_ZERO = ["common.pt", ".metadata", "metadata.json", "emu3.json", "COMMIT"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("failing") / "run"


@pytest.fixture(scope="module")
def done(run: Path, config_file: Path) -> programs.Ended:
    """Two processes; each save fails at another file, and the last at none."""
    arguments = [config_file, run, *WRITTEN_BY_RANK_ZERO, "latest"]
    return programs.shared()(failing_saves.__file__, *arguments, processes=2, timeout=120)


@pytest.mark.slow
def test_no_rank_waits_for_a_file_that_rank_zero_could_not_write(done: programs.Ended, run: Path) -> None:
    assert done.code == 0, done.err[-4000:]
    assert done.err.count("the run goes on") == len(WRITTEN_BY_RANK_ZERO) + 1, done.err
    for step, name in enumerate(WRITTEN_BY_RANK_ZERO, start=1):
        (line,) = [line for line in done.err.splitlines() if f"step-{step:08d} could not be written" in line]
        assert "rank 0: " in line
        assert name in line
    # `latest` only points at what is committed by then.
    committed = [folder.name for folder in files.committed_folders(run / "checkpoints")]
    assert committed == ["step-00000006", "step-00000007"]
    assert [line["step"] for line in runs.metrics(run)] == list(range(1, 8))


@pytest.mark.slow
def test_data_parallel_ranks_share_the_writing(done: programs.Ended, run: Path) -> None:
    assert done.code == 0
    written = [
        sum(path.stat().st_size for path in (run / "checkpoints" / "step-00000007").glob(f"__{rank}_*"))
        for rank in range(2)
    ]
    assert min(written) > 0.4 * sum(written)
