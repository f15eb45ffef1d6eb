"""Data-parallel ranks share the writing of a checkpoint; what it holds does not depend on who wrote it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from emu3_megatron.training import checkpoint_files as files
from emu3_megatron.training import inspection
from tests import programs
from tests.training import layouts, shared_saves

BF16 = ["--trainer.precision", "bf16", "--ema.decay", "0.9"]
LAYOUTS = {
    "dp4": layouts.options(layouts.FOUR["dp4"], distributed_optimizer=True),
    "dp4-plain-bf16": [*layouts.options(layouts.FOUR["dp4"], distributed_optimizer=False), *BF16],
    "tp2-dp2-sp": [*layouts.options(layouts.FOUR["tp2-dp2-sp"], distributed_optimizer=True), *BF16],
    "pp2-dp2": layouts.options(layouts.FOUR["pp2-dp2"], distributed_optimizer=True),
    "cp2-dp2": layouts.options(layouts.FOUR["cp2-dp2"], distributed_optimizer=False),
}
"""All on four processes."""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, config_file: Path) -> Path:
    folder = tmp_path_factory.mktemp("saves")
    (folder / "layouts.json").write_text(json.dumps(LAYOUTS))
    arguments = [config_file, folder, folder / "layouts.json"]
    done = programs.shared()(shared_saves.__file__, *arguments, processes=4, timeout=400)
    assert done.code == 0, done.err[-4000:]
    return folder


def bytes_of_each_rank(folder: Path) -> list[int]:
    return [sum(path.stat().st_size for path in folder.glob(f"__{rank}_*")) for rank in range(4)]


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_all_ranks_write_and_the_tensors_are_the_same(saved: Path, name: str) -> None:
    shared, alone = (files.resolve(saved / name / kind) for kind in ("shared", "alone"))
    assert not list(inspection.compare(shared, alone))
    assert not inspection.verify(shared)
    written = bytes_of_each_rank(shared)
    assert min(written) > 0.15 * sum(written)
    assert 0 in bytes_of_each_rank(alone)
