from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import programs
from tests.slurm.cluster import Cluster, missing_programs
from tests.tokenization.conftest import tokenizers
from tests.training.conftest import config_file, tiny_data

__all__ = ["cluster", "config_file", "tiny_data", "tokenizers", "workplace"]

SCRIPTS = programs.ROOT / "examples" / "slurm"

SETTINGS = """\
PARTITION=main
ACCOUNT=
TIME_LIMIT=60
SIGNAL_SECONDS=60
GPUS_PER_NODE=0
TASKS_PER_NODE=1
CPUS_PER_TASK=1
SBATCH_EXTRA=()
MAX_FAILURES=1
WORK={work}
LOGS=$WORK/logs
CONTAINER=
PYTHON={python}
prepare_environment() {{ export OMP_NUM_THREADS=1 EMU3_TRACEBACK=; }}
STAGE1_CONFIG={config}
STAGE1_NODES=2
"""


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A running SLURM of two nodes; its absence is a failure where EMU3_REQUIRE_SLURM says so."""
    if missing := missing_programs():
        message = f"no {', '.join(missing)} here: install slurm-wlm and munge"
        if os.environ.get("EMU3_REQUIRE_SLURM"):
            pytest.fail(message)
        pytest.skip(message)
    started = Cluster()
    try:
        started.start()
        yield started
    finally:
        started.stop()


@dataclass
class Workplace:
    """A folder with settings for the example scripts, and a cluster to submit them to."""

    cluster: Cluster
    folder: Path
    settings: Path

    def add(self, text: str) -> None:
        """More lines of settings; the last ones hold."""
        self.settings.write_text(self.settings.read_text() + text + "\n")

    def submit(self, job: str, *options: str, arguments: tuple[str, ...] = ()) -> str:
        """Submit an example script by `submit.sh`; the job's number."""
        command = [SCRIPTS / "submit.sh", job, *options, *(("--", *arguments) if arguments else ())]
        return self.cluster.run(*command, EMU3_SETTINGS=str(self.settings))

    def chain(self, *jobs: str) -> dict[str, str]:
        """Submit a chain by `chain.sh`; the jobs' numbers by name."""
        lines = self.cluster.run(SCRIPTS / "chain.sh", *jobs, EMU3_SETTINGS=str(self.settings)).splitlines()
        return dict(line.split() for line in lines)

    def log(self, job: str, number: str) -> str:
        """What the job's own log says."""
        return (self.folder / "logs" / f"{job}-{number}.log").read_text()

    def explain(self, job: str, number: str) -> str:
        """Its log and the ends of its ranks' logs, for the message of a failed test."""
        parts = [self.log(job, number)]
        for path in sorted(self.folder.glob(f"logs/{job}-{number}/*/rank-*.log")):
            parts.append(f"== {path}\n{path.read_text()[-2000:]}")
        return "\n".join(parts)


@pytest.fixture
def workplace(cluster: Cluster, config_file: Path, tmp_path: Path) -> Workplace:
    cluster.wait_until_idle()
    settings = tmp_path / "settings.sh"
    settings.write_text(SETTINGS.format(work=tmp_path, python=sys.executable, config=config_file))
    return Workplace(cluster, tmp_path, settings)
