"""The order of the tests, and which of them run in one process."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from xdist.scheduler import LoadFileScheduling

ROOT = Path(__file__).parents[1]
SHARING = "the quickstart's"
TOGETHER = dict.fromkeys(
    (
        "tests/end_to_end/test_bad_input.py",
        "tests/end_to_end/test_guide_code.py",
        "tests/end_to_end/test_quickstart.py",
        "tests/end_to_end/test_start.py",
    ),
    SHARING,
)
"""Files that run in one process because they share a fixture that takes a minute; others run by the file."""
SECONDS = {
    SHARING: 400,
    "tests/slurm/test_jobs.py": 280,
    "tests/training/test_layouts.py": 260,
    "tests/slurm/test_rehearsal.py": 220,
    "tests/training/test_survival.py": 200,
    "tests/posttraining/test_preference_training.py": 190,
    "tests/vision/test_full_configuration.py": 160,
    "tests/curation/test_job.py": 130,
    "tests/examples/test_post_training_runs.py": 120,
    "tests/training/test_lora.py": 120,
    "tests/curation/test_real_server.py": 100,
    "tests/conversion/test_layouts.py": 100,
    "tests/posttraining/test_runs.py": 90,
    "tests/vision/test_survival.py": 80,
    "tests/training/test_muon.py": 80,
    "tests/curation/test_captions.py": 60,
    "tests/parallel/test_layouts.py": 60,
}
"""What takes a minute or more beside others on two cores; the order in which files begin, no limit."""


class Scheduling(LoadFileScheduling):
    """Whole groups of files to one process. (`--dist loadgroup` is without effect from pytest 9.2 on.)"""

    def _split_scope(self, nodeid: str) -> str:
        return _group(nodeid.split("::")[0])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> Scheduling:
    """Called where several processes are asked for."""
    return Scheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest begin first, then files of many tests, so that no process ends alone."""
    groups = {item: _group(item.path.relative_to(ROOT).as_posix()) for item in items}
    tests = Counter(groups.values())
    items.sort(key=lambda item: (-SECONDS.get(groups[item], 0), -tests[groups[item]], str(item.path)))


def _group(path: str) -> str:
    return TOGETHER.get(path, path)
