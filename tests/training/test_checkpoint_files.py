from __future__ import annotations

from pathlib import Path

import pytest
import torch

from emu3_megatron.training import checkpoint_files as files


def write(checkpoints: Path, step: int, *, commit: bool = True) -> Path:
    folder = files.step_folder(checkpoints, step)
    folder.mkdir(parents=True)
    (folder / "weights").write_bytes(bytes(range(256)) * 20)
    (folder / ".metadata").write_bytes(b"hidden, but part of it")
    if commit:
        files.commit(folder, files.seal(folder, files.payload(folder)), step)
    return folder


def test_only_committed_folders_count(tmp_path: Path) -> None:
    write(tmp_path, 10)
    last = write(tmp_path, 20)
    write(tmp_path, 30, commit=False)
    assert [folder.name for folder in files.committed_folders(tmp_path)] == ["step-00000010", "step-00000020"]
    assert (tmp_path / files.LATEST).read_text() == "step-00000020\n"
    assert files.resolve(tmp_path) == last
    assert files.resolve(last) == last


def test_nothing_committed_is_an_error_that_says_so(tmp_path: Path) -> None:
    write(tmp_path / "checkpoints", 10, commit=False)
    with pytest.raises(files.CheckpointError, match="no committed checkpoint"):
        files.resolve(tmp_path)


def test_steps_are_ordered_as_numbers(tmp_path: Path) -> None:
    write(tmp_path, 100_000_000)
    write(tmp_path, 99_999_999)
    assert files.resolve(tmp_path).name == "step-100000000"


@pytest.mark.parametrize("name", ["weights", ".metadata"])
def test_every_flipped_byte_is_named(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path, 10)
    assert not list(files.damage(folder, checksums=True))
    content = bytearray((folder / name).read_bytes())
    for position in (0, len(content) // 2, len(content) - 1):
        changed = bytearray(content)
        changed[position] ^= 0x10
        (folder / name).write_bytes(changed)
        problems = list(files.damage(folder, checksums=True))
        assert len(problems) == 1
        assert str(folder / name) in problems[0]


def test_missing_and_short_files_need_no_checksums(tmp_path: Path) -> None:
    folder = write(tmp_path, 10)
    (folder / "weights").write_bytes(b"short")
    (folder / ".metadata").unlink()
    assert len(list(files.damage(folder, checksums=False))) == 2


def test_pruning_keeps_the_newest_and_removes_interrupted_saves(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        write(tmp_path, step)
    write(tmp_path, 40, commit=False)
    files.prune(tmp_path, keep=2)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["latest", "step-00000020", "step-00000030"]


def test_states_of_modules_beside_their_weights_are_not_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformer Engine's FP8 scales are pickles in tensors: a checkpoint with them could not be loaded."""
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    from emu3_megatron.training import checkpoint

    class Chunk:
        def sharded_state_dict(self, metadata: object) -> dict[str, ShardedObject]:
            scales, nothing = torch.ones(40, dtype=torch.uint8), None
            return {
                "linear_fc1._extra_state": ShardedObject("linear_fc1._extra_state", scales, (1,), (0,)),
                "linear_fc2._extra_state": ShardedObject("linear_fc2._extra_state", nothing, (1,), (0,)),
                "linear_fc1.weight": ShardedObject("linear_fc1.weight", scales, (1,), (0,)),
            }

    monkeypatch.setattr(checkpoint, "sharding_metadata", dict)
    state = checkpoint.model_state([Chunk()])["model"]
    assert state["linear_fc1._extra_state"].data.numel() == 0
    assert state["linear_fc2._extra_state"].data is None
    assert state["linear_fc1.weight"].data.numel() == 40
