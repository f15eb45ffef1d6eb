"""Weights of one byte: int8 or fp8 with a factor for every output. Activations stay as they are.

A decode step reads every weight once, so a quarter (of fp32) or a half (of bf16) of the bytes is less memory,
and less time where a kernel reads them as they are: int8 with fp32 activations on a CPU with AVX-512.
Elsewhere the weights are widened for each product, which saves memory alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from emu3_megatron.errors import UserError
from emu3_megatron.inference.few_rows import few_rows_int8

FORMATS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
"""Names to types."""

PROJECTIONS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
"""megatron-core's names for the matrices of a layer."""


@dataclass(frozen=True)
class Quantized:
    """A matrix ``[C, K]`` of one byte an entry."""

    values: Tensor
    """Of a type in `FORMATS`, ``[C, K]``."""
    scales: Tensor
    """What each row is multiplied with, fp32 ``[C]``."""

    @classmethod
    def of(cls, weight: Tensor, name: str) -> Quantized:
        """Nearest values, the largest of each row at the end of the format's range."""
        kind = FORMATS[name]
        largest = torch.iinfo(kind).max if kind == torch.int8 else torch.finfo(kind).max
        wide = weight.detach().float()
        scales = (wide.abs().amax(dim=1) / largest).clamp_min(torch.finfo(torch.float32).tiny)
        values = wide / scales[:, None]
        if kind == torch.int8:
            values = values.round_().clamp_(-largest, largest)
        return cls(values.to(kind), scales)

    def __len__(self) -> int:
        """Rows."""
        return len(self.values)

    def __getitem__(self, rows: slice) -> Quantized:
        """Some of the rows, without a copy."""
        return Quantized(self.values[rows], self.scales[rows])

    def product(self, x: Tensor) -> Tensor:
        """``x @ matrix.T`` without gradient: `x` ``[..., K]``, result ``[..., C]`` in its dtype."""
        product = few_rows_int8(x, self.values, self.scales)
        if product is None:
            product = F.linear(x, self.values.to(x.dtype)) * self.scales.to(x.dtype)
        return product


def quantize(model: torch.nn.Module, name: str) -> None:
    """Replace the projections and the output layer of a model by `Quantized` ones, in place.

    It can generate afterwards and nothing else. Embedding, norms and biases stay, and so does an output layer
    that shares the embedding's weights.

    Raises:
        UserError: `name` is not a format, or projections are not megatron-core's local ones.
    """
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

    if name not in FORMATS:
        raise UserError(f"weights {name!r} must be one of {', '.join(FORMATS)}")
    for path, module in model.named_modules():
        local = isinstance(module, ColumnParallelLinear | RowParallelLinear)
        if path.rpartition(".")[2] in PROJECTIONS and not local:
            raise UserError(
                f"weights {name!r}: {path} is a {type(module).__name__}, and only megatron-core's own layers "
                "can be reduced; leave --weights out, or generate without Transformer Engine"
            )
    for module in model.modules():
        if isinstance(module, ColumnParallelLinear | RowParallelLinear) and module.weight is not None:
            module.quantized = Quantized.of(module.weight, name)
            module.weight = None


def weight_of(module: Any) -> Tensor | Quantized:
    """The matrix of a linear layer, quantized or not."""
    found: Tensor | Quantized = getattr(module, "quantized", None) or module.weight
    return found
