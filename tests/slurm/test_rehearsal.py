"""The whole chain, scaled down: every job script under a real SLURM, from raw media to an export.

The same at a larger scale is the proof `rehearsal`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.conftest import SCRIPTS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


def test_every_job_of_the_chain_does_its_part(cluster: Cluster, tmp_path: Path) -> None:
    cluster.wait_until_idle()
    out = cluster.run(
        SCRIPTS / "rehearsal.sh", tmp_path / "work", EMU3_PYTHON=sys.executable, OMP_NUM_THREADS="1"
    )
    lines = out.splitlines()
    ended = [words for line in lines if len(words := line.split()) == 4 and ":" in words[3]]
    assert {state for _, _, state, _ in ended} == {"COMPLETED"}, out
    # Tokenization has a job for each dataset.
    assert {name.partition("-")[0] for name, *_ in ended} == {path.stem for path in SCRIPTS.glob("*.sbatch")}
    verdict = [line for line in lines if line.startswith(("pass ", "FAIL "))]
    assert len(verdict) >= 14
    assert not [line for line in verdict if line.startswith("FAIL")], out
