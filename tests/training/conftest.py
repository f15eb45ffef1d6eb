from __future__ import annotations

from pathlib import Path

import pytest

from tests.training import runs


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny sample datasets."""
    from emu3_megatron.samples.tiny import PARTS, prepare

    folder = tmp_path_factory.mktemp("tiny")
    for name in PARTS:
        prepare(folder / name)
    return folder


@pytest.fixture(scope="session")
def config_file(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Path:
    return runs.write_configuration(tmp_path_factory.mktemp("config"), tiny_data)


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory, config_file: Path) -> Path:
    """One process, through the real command line."""
    run = tmp_path_factory.mktemp("reference") / "run"
    done = runs.train(config_file, run)
    assert done.returncode == 0, done.stderr
    return run
