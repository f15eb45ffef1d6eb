"""The order of the tests, and which of them run in one process."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHARING = "quickstart"
"""A fixture that takes a minute: the tests that use it, of whichever file, run in one process."""
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


@pytest.hookimpl(tryfirst=True)  # pytest-xdist reads the groups in the same hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest begin first, then files of many tests, so that no process ends alone."""
    groups = {item: _group(item) for item in items}
    tests = Counter(groups.values())
    for item, group in groups.items():
        item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=lambda item: (-SECONDS.get(groups[item], 0), -tests[groups[item]], str(item.path)))


def _group(item: pytest.Item) -> str:
    if SHARING in getattr(item, "fixturenames", ()):
        return SHARING
    return item.path.relative_to(ROOT).as_posix()
