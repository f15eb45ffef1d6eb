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
    if not _suits(x, weight):
        return F.linear(x, weight)
    rows = x.detach().reshape(-1, x.shape[-1]).contiguous()
    product = rows.new_empty(len(rows), len(weight))
    threads = min(torch.get_num_threads(), weight.nbytes // LEAST_BYTES)
    _kernels.few_rows(rows.numpy(), weight.detach().numpy(), product.numpy(), threads)
    return product.view(*x.shape[:-1], -1)


def _suits(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernel takes this product, and is the faster way."""
    return (
        _SUPPORTED
        and x.numel() // max(x.shape[-1], 1) in ROWS
        and x.dtype == weight.dtype == torch.float32
        and x.device.type == weight.device.type == "cpu"
        and weight.nbytes >= LEAST_BYTES
        and weight.is_contiguous()
    )
