"""What is written behind the steps: a copy of the moment the save began, made once."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode


@pytest.fixture
def one_process() -> Iterator[None]:
    from emu3_megatron.parallel import platform
    from emu3_megatron.parallel.config import ParallelConfig
    from emu3_megatron.parallel.groups import destroy_parallel, initialize_parallel

    initialize_parallel(ParallelConfig(), platform.install("cpu"), seed=0)
    yield
    destroy_parallel()


class Copies(TorchDispatchMode):
    """Counts the bytes that are cloned."""

    size = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten.clone.default:
            self.size += result.nbytes
        return result


def sharded(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    from megatron.core.dist_checkpointing import ShardedTensor

    return {name: ShardedTensor.from_rank_offsets(name, tensor) for name, tensor in tensors.items()}


def test_training_may_change_every_tensor_once_a_save_has_begun(
    one_process: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron.core import dist_checkpointing

    from emu3_megatron.training import checkpoint_writer as writer

    buffer = torch.randn(1000)
    tensors = {"whole": torch.randn(7, 30), "first": buffer[:400], "second": buffer[400:].view(20, 30)}
    expected = {name: tensor.clone() for name, tensor in tensors.items()}
    may_write, write = threading.Event(), writer._write_bucket

    def later(*arguments: Any) -> Any:
        may_write.wait(60)
        return write(*arguments)

    monkeypatch.setattr(writer, "_write_bucket", later)
    with Copies() as copies:
        begun = writer.BackgroundWrite(sharded(tensors), tmp_path, {})
    for tensor in tensors.values():
        tensor.fill_(float("nan"))
    may_write.set()
    begun.finish()
    empty = sharded({name: torch.empty_like(tensor) for name, tensor in expected.items()})
    loaded = dist_checkpointing.load(empty, str(tmp_path))
    for name, tensor in expected.items():
        assert torch.equal(loaded[name], tensor), name
    assert copies.size == sum(tensor.nbytes for tensor in expected.values())


def test_the_files_are_the_same_under_every_version_of_megatron_core(
    one_process: None, tmp_path: Path
) -> None:
    """Plain values stand beside the tensors, where each looks for them, and never as a pickle among them."""
    from emu3_megatron.training import checkpoint_writer as writer
    from emu3_megatron.training.checkpoint_metadata import read_metadata

    writer.BackgroundWrite(sharded({"weight": torch.ones(3)}), tmp_path, {"kind": "plain"}).finish()
    assert set(read_metadata(tmp_path).state_dict_metadata) == {"weight"}
    described = {path.name for path in tmp_path.iterdir() if path.suffix != ".distcp"}
    assert described == {".metadata", "common.pt", "metadata.json"}
    assert torch.load(tmp_path / "common.pt") == {"content_metadata": {"kind": "plain"}}
    assert json.loads((tmp_path / "metadata.json").read_text()) == {
        "sharded_backend": "torch_dist",
        "sharded_backend_version": 1,
        "common_backend": "torch",
        "common_backend_version": 1,
    }
