"""Which checkpoint is taken where some are damaged."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from emu3_megatron.parallel import platform

platform.install("cpu")

from emu3_megatron.parallel.config import ParallelConfig  # noqa: E402
from emu3_megatron.parallel.groups import destroy_parallel, initialize_parallel  # noqa: E402
from emu3_megatron.training import checkpoint_files as files  # noqa: E402
from emu3_megatron.training.checkpoint_choice import newest_valid, sound_checkpoint  # noqa: E402
from emu3_megatron.training.checkpoint_files import CheckpointError  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def _alone() -> Iterator[None]:
    initialize_parallel(ParallelConfig(), platform.install("cpu"), seed=0)
    yield
    destroy_parallel()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with three checkpoints."""
    for step in (1, 2, 3):
        folder = files.step_folder(tmp_path / "run" / "checkpoints", step)
        folder.mkdir(parents=True)
        for name in ("a.distcp", "b.distcp", "emu3.json"):
            (folder / name).write_bytes(f"{name} of {step}".encode() * 100)
        files.commit(folder, files.seal(folder, files.payload(folder)), step)
    return tmp_path / "run"


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_of_a_run_the_newest_sound_one_is_taken(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoints = run / "checkpoints"
    first, second, third = files.committed_folders(checkpoints)
    assert sound_checkpoint(run) == sound_checkpoint(checkpoints) == sound_checkpoint(third) == third
    flip(third / "b.distcp")
    assert sound_checkpoint(run) == newest_valid(checkpoints, checksums=True) == second
    assert str(third / "b.distcp") in caplog.text
    (second / "emu3.json").unlink()
    assert sound_checkpoint(checkpoints) == first
    flip(first / "emu3.json")
    with pytest.raises(CheckpointError, match="every checkpoint in"):
        sound_checkpoint(run)


def test_the_one_that_is_named_is_taken_or_refused_by_name(run: Path) -> None:
    third = run / "checkpoints" / "step-00000003"
    flip(third / "a.distcp")
    with pytest.raises(CheckpointError, match=r"a\.distcp: CRC-32C"):
        sound_checkpoint(third)
    assert sound_checkpoint(third, checksums=False) == third, "only sizes were to be compared"
    (third / "a.distcp").write_bytes(b"short")
    with pytest.raises(CheckpointError, match=r"a\.distcp: 5 bytes"):
        sound_checkpoint(third, checksums=False)
    with pytest.raises(CheckpointError, match="no committed checkpoint"):
        sound_checkpoint(run / "elsewhere")


def test_a_process_reads_a_checkpoint_once_unless_it_changes(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []
    checksum = files.checksum
    monkeypatch.setattr(files, "checksum", lambda path: read.append(path) or checksum(path))
    third = sound_checkpoint(run)
    assert sorted(read) == files.payload(third)
    assert sound_checkpoint(third) == newest_valid(run / "checkpoints", checksums=True) == third
    assert len(read) == len(files.payload(third))
    flip(third / "a.distcp")
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"a\.distcp"):
            sound_checkpoint(third)
