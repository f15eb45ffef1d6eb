"""Products of a few rows with a large matrix, on the CPU.

A decode step is products of as many rows as there are sequences. BLAS libraries are built for large products:
of 4 to 32 rows in fp32 they read the weights at half of the memory's bandwidth. `_kernels.few_rows` is built
for those (docs/development/log.md has the figures).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from emu3_megatron import _kernels

ROWS = range(3, 33)
"""Where the kernel is faster than BLAS, which is at the memory's bandwidth itself with one or two rows."""

LEAST_BYTES = 1 << 20
"""Size of a matrix from which the kernel is worth its call, and a further thread its start."""

_SUPPORTED = _kernels.few_rows_supported()


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight.T`` without gradient: `x` ``[..., K]``, `weight` ``[C, K]``, result ``[..., C]``."""
    if not (_fits(x, weight, torch.float32) and _rows(x) in ROWS and weight.nbytes >= LEAST_BYTES):
        return F.linear(x, weight)
    rows, product = _operands(x, weight)
    _kernels.few_rows(rows.numpy(), weight.detach().numpy(), product.numpy(), _threads(weight))
    return product.view(*x.shape[:-1], -1)


def few_rows_int8(x: Tensor, weight: Tensor, scales: Tensor) -> Tensor | None:
    """``(x @ weight.T) * scales`` of an int8 `weight` ``[C, K]``; None where the kernel does not take it."""
    if not (_fits(x, weight, torch.int8) and 0 < _rows(x) < ROWS.stop):
        return None
    rows, product = _operands(x, weight)
    _kernels.few_rows_int8(rows.numpy(), weight.numpy(), scales.numpy(), product.numpy(), _threads(weight))
    return product.view(*x.shape[:-1], -1)


def _fits(x: Tensor, weight: Tensor, kind: torch.dtype) -> bool:
    """Whether the kernel for weights of this type takes the product."""
    return (
        _SUPPORTED
        and x.dtype == torch.float32
        and weight.dtype == kind
        and x.device.type == weight.device.type == "cpu"
        and weight.is_contiguous()
    )


def _rows(x: Tensor) -> int:
    return x.numel() // max(x.shape[-1], 1)


def _operands(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The rows as a matrix, and an empty product."""
    rows = x.detach().reshape(-1, x.shape[-1]).contiguous()
    return rows, rows.new_empty(len(rows), len(weight))


def _threads(weight: Tensor) -> int:
    return max(1, min(torch.get_num_threads(), weight.nbytes // LEAST_BYTES))
