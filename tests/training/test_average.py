"""The average of the weights, and the memory that following them takes."""

from __future__ import annotations

import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from emu3_megatron.training.callbacks import average as module
from emu3_megatron.training.callbacks.average import WARM_UP, WeightAverage

DECAY = 0.9


class LivingElements(TorchDispatchMode):
    """How many elements of new tensors live at once, at most."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self._now = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        known = {x.untyped_storage().data_ptr() for x in torch.utils._pytree.tree_leaves(args) if _dense(x)}
        for tensor in torch.utils._pytree.tree_leaves(result):
            if _dense(tensor) and tensor.untyped_storage().data_ptr() not in known:
                self._now += tensor.numel()
                self.most = max(self.most, self._now)
                weakref.finalize(tensor.untyped_storage(), self._free, tensor.numel())
        return result

    def _free(self, elements: int) -> None:
        self._now -= elements


def _dense(value: object) -> bool:
    return isinstance(value, torch.Tensor)


def _chunk(dtype: torch.dtype) -> torch.nn.Module:
    torch.manual_seed(4)
    sizes = [(40, 60), (60,), (30, 20), (7,), (25, 25)]
    return torch.nn.ParameterList([torch.randn(size).to(dtype) for size in sizes])


def _follow(chunk: torch.nn.Module, updates: int) -> WeightAverage:
    callback = WeightAverage([chunk], DECAY)
    torch.manual_seed(5)
    for update in range(1, updates + 1):
        with torch.no_grad():
            for parameter in chunk.parameters():
                parameter += torch.randn(parameter.shape).to(parameter.dtype)
        trainer: Any = SimpleNamespace(progress=SimpleNamespace(updates=update))
        report: Any = SimpleNamespace(skipped=False)
        callback.on_step(trainer, report)
    return callback


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 64, 1000, 2**28])
def test_slices_of_any_size_give_the_average(
    dtype: torch.dtype, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SLICE", size)
    chunk = _chunk(dtype)
    (got,) = _follow(chunk, updates=3).averages

    chunk = _chunk(dtype)
    want = {name: parameter.detach().double() for name, parameter in chunk.named_parameters()}
    torch.manual_seed(5)
    for update in range(1, 4):
        decay = min(DECAY, (1 + update) / (WARM_UP + update))
        with torch.no_grad():
            for name, parameter in chunk.named_parameters():
                parameter += torch.randn(parameter.shape).to(dtype)
                want[name] = decay * want[name] + (1 - decay) * parameter.double()
    assert got.keys() == want.keys()
    for name, tensor in got.items():
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor.double(), want[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("work", ["step", "restart"])
def test_weights_in_half_precision_are_copied_a_slice_at_a_time(
    work: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SLICE", 700)
    chunk = _chunk(torch.bfloat16)
    callback = WeightAverage([chunk], DECAY)
    trainer: Any = SimpleNamespace(progress=SimpleNamespace(updates=1))
    report: Any = SimpleNamespace(skipped=False)
    with LivingElements() as living:
        callback.restart() if work == "restart" else callback.on_step(trainer, report)
    assert living.most <= 700


def test_a_restart_takes_the_present_weights() -> None:
    chunk = _chunk(torch.bfloat16)
    callback = _follow(chunk, updates=2)
    callback.restart()
    for average, parameter in zip(callback.averages[0].values(), chunk.parameters(), strict=True):
        assert torch.equal(average, parameter.float())
