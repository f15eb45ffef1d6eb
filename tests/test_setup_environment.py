"""What `make env` pins."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[1] / "tools"


def test_torch_is_kept_under_the_version_that_pip_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The registry's CUDA build calls itself otherwise: pinned by its own name, pip finds a conflict."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("__version__ = '2.13.0+cu130'\n")
    (tmp_path / "torch-2.13.0.dist-info").mkdir()
    (tmp_path / "torch-2.13.0.dist-info" / "METADATA").write_text("Name: torch\nVersion: 2.13.0\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(TOOLS))
    from setup_environment import write_constraints

    lines = write_constraints(Path(sys.executable), tmp_path).read_text().splitlines()
    assert "torch==2.13.0" in lines
