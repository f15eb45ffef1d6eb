"""How the tests are shared out over processes."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parent
ONE_PROCESS = ("end_to_end", "slurm")
"""Folders whose files share what is dear to set up: a quickstart, a cluster."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep the tests of a file on one process, and those of some folders."""
    for item in items:
        path = item.path.relative_to(ROOT)
        together = path.parts[0] in ONE_PROCESS
        item.add_marker(pytest.mark.xdist_group(path.parts[0] if together else str(path)))
