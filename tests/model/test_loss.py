from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from emu3_megatron.model import loss as loss_module
from emu3_megatron.model.loss import (
    default_chunk_size,
    vocabulary_parallel_linear_cross_entropy,
    weighted_linear_cross_entropy,
)

TOKENS, HIDDEN, ROWS, IN_USE = 150, 24, 512, 467


def _inputs(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(3)
    hidden = torch.randn(TOKENS, 1, HIDDEN, dtype=dtype, requires_grad=True)
    weight = torch.randn(ROWS, HIDDEN, dtype=dtype, requires_grad=True)
    return hidden, weight, torch.randint(0, IN_USE, (1, TOKENS)), torch.rand(1, TOKENS)


def _dense(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """In double precision."""
    logits = hidden[:, 0].double() @ weight[:IN_USE].double().t()
    return F.cross_entropy(logits, labels[0], reduction="none")


def _assert_equal(got: tuple[torch.Tensor, ...], want: tuple[torch.Tensor, ...]) -> None:
    for a, b in zip(got, want, strict=True):
        assert (a.double() - b.double()).norm() <= 1e-6 * b.double().norm()


@pytest.mark.parametrize("chunk_size", [None, 1, 64, TOKENS, 1000])
def test_losses_and_gradients_equal_the_dense_ones(chunk_size: int | None) -> None:
    hidden, weight, labels, weights = _inputs()
    want = _dense(hidden, weight, labels)
    want_gradients = torch.autograd.grad((want * weights[0]).sum(), (hidden, weight))

    got = vocabulary_parallel_linear_cross_entropy(
        hidden, weight, labels, vocabulary_size=IN_USE, chunk_size=chunk_size
    )
    gradients = torch.autograd.grad((got.losses * weights[0]).sum(), (hidden, weight))
    _assert_equal((got.losses,), (want,))
    _assert_equal(gradients, want_gradients)

    fused = weighted_linear_cross_entropy(
        hidden, weight, labels, weights, vocabulary_size=IN_USE, chunk_size=chunk_size
    )
    gradients = torch.autograd.grad(3 * fused.total, (hidden, weight))
    _assert_equal((fused.losses,), (want,))
    _assert_equal(gradients, tuple(3 * g for g in want_gradients))


def test_any_function_of_the_token_losses_may_follow() -> None:
    hidden, weight, labels, _ = _inputs()
    want = torch.autograd.grad(_dense(hidden, weight, labels).square().mean(), (hidden, weight))
    got = vocabulary_parallel_linear_cross_entropy(
        hidden, weight, labels, vocabulary_size=IN_USE, chunk_size=32
    )
    _assert_equal(torch.autograd.grad(got.losses.square().mean(), (hidden, weight)), want)


@pytest.mark.parametrize("chunk_size", [None, 40])
def test_z_loss_is_trained_on_and_not_reported(chunk_size: int | None) -> None:
    hidden, weight, labels, weights = _inputs()
    coefficient = 1e-3
    logits = hidden[:, 0].double() @ weight[:IN_USE].double().t()
    penalty = coefficient * (logits.logsumexp(1).square() * weights[0]).sum()
    want = (_dense(hidden, weight, labels) * weights[0]).sum() + penalty
    got = weighted_linear_cross_entropy(
        hidden, weight, labels, weights, vocabulary_size=IN_USE, chunk_size=chunk_size, z_loss=coefficient
    )
    _assert_equal((got.total, got.losses), (want, _dense(hidden, weight, labels)))
    _assert_equal(
        torch.autograd.grad(got.total, (hidden, weight)), torch.autograd.grad(want, (hidden, weight))
    )


def test_the_weight_gradient_can_be_added_to_a_buffer() -> None:
    hidden, weight, labels, weights = _inputs()
    want = torch.autograd.grad((_dense(hidden, weight, labels) * weights[0]).sum(), weight)[0]
    buffer = torch.ones(ROWS, HIDDEN)
    for _ in range(2):  # two micro-batches
        got = weighted_linear_cross_entropy(
            hidden, weight, labels, weights, vocabulary_size=IN_USE, chunk_size=40, weight_gradient=buffer
        )
        got.total.backward()
    assert weight.grad is None
    assert hidden.grad is not None
    _assert_equal((buffer - 1,), (2 * want,))


def test_padding_ids_take_no_part() -> None:
    hidden, weight, labels, weights = _inputs()
    with torch.no_grad():
        weight[IN_USE:] = 1e4
    got = weighted_linear_cross_entropy(hidden, weight, labels, weights, vocabulary_size=IN_USE)
    got.total.backward()
    _assert_equal((got.losses,), (_dense(hidden, weight, labels),))
    assert weight.grad is not None
    assert not weight.grad[IN_USE:].any()


def test_correctness_says_whether_the_label_is_the_likeliest_id() -> None:
    hidden, weight, labels, _ = _inputs()
    best = (hidden[:, 0] @ weight[:IN_USE].t()).argmax(1)
    labels[0, ::2] = best[::2]
    got = vocabulary_parallel_linear_cross_entropy(hidden, weight, labels, vocabulary_size=IN_USE)
    assert torch.equal(got.correct, labels[0] == best)


def test_half_precision_sums_the_weight_gradient_over_chunks_in_fp32() -> None:
    hidden, weight, labels, weights = _inputs(torch.bfloat16)
    want = torch.autograd.grad((_dense(hidden, weight, labels) * weights[0]).sum(), (hidden, weight))
    got = weighted_linear_cross_entropy(hidden, weight, labels, weights, vocabulary_size=IN_USE, chunk_size=4)
    for gradient, reference in zip(torch.autograd.grad(got.total, (hidden, weight)), want, strict=True):
        error = (gradient.float() - reference.float()).norm() / reference.float().norm()
        assert error < 0.01


def test_frozen_weight_gets_no_gradient_and_hidden_still_does() -> None:
    hidden, weight, labels, weights = _inputs()
    got = weighted_linear_cross_entropy(
        hidden, weight.detach(), labels, weights, vocabulary_size=IN_USE, chunk_size=32
    )
    got.total.backward()
    assert hidden.grad is not None


class _LargestTensor(TorchDispatchMode):
    """Remembers the largest tensor that any operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.untyped_storage().nbytes() // value.element_size())
        return result


@pytest.mark.parametrize("fused", [True, False])
def test_no_tensor_is_larger_than_a_chunk_of_logits_or_the_weight(fused: bool) -> None:
    hidden, weight, labels, weights = _inputs()
    chunk = 10
    with _LargestTensor() as largest:
        if fused:
            weighted_linear_cross_entropy(
                hidden, weight, labels, weights, vocabulary_size=IN_USE, chunk_size=chunk
            ).total.backward()
        else:
            vocabulary_parallel_linear_cross_entropy(
                hidden, weight, labels, vocabulary_size=IN_USE, chunk_size=chunk
            ).losses.sum().backward()
    assert largest.elements <= max(chunk * ROWS, weight.numel())
    assert largest.elements < TOKENS * IN_USE


@pytest.mark.parametrize("rows", [512, 23_078, 92_311, 184_622, 282_926])
def test_a_chunk_on_a_gpu_is_large_enough_to_pay_for_its_weights(rows: int) -> None:
    """Below some 500 tokens the traffic of weight and gradient takes longer than the products."""
    chunk = default_chunk_size(rows, cuda=True)
    assert 1024 <= chunk <= 2048
    assert chunk == 1024 or chunk * rows <= 2**28
    assert default_chunk_size(rows, cuda=False) == max(128, 2**22 // rows)


@pytest.mark.parametrize(
    "function", [vocabulary_parallel_linear_cross_entropy, weighted_linear_cross_entropy]
)
def test_the_default_chunk_is_that_of_the_device(function: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def size(rows: int, *, cuda: bool) -> int:
        asked.append(cuda)
        return default_chunk_size(rows, cuda=cuda)

    class OnGPU(torch.Tensor):
        is_cuda = True

    monkeypatch.setattr(loss_module, "default_chunk_size", size)
    hidden, weight, labels, weights = (x.detach() for x in _inputs())
    more = (weights,) if function is weighted_linear_cross_entropy else ()
    for given in (hidden, hidden.as_subclass(OnGPU)):
        function(given, weight, labels, *more, vocabulary_size=IN_USE)
    assert asked == [False, True]
