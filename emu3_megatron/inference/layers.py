"""The layers of a megatron-core GPT as plain functions of their weights.

A decode step of a small model is little arithmetic in many calls: megatron-core's parallel linear layers,
which prepare a backward pass, cost several times their matrix product. Where a layer's parts are the local
ones, their weights are used directly; other parts (Transformer Engine's) are called as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor

from emu3_megatron.inference.few_rows import linear
from emu3_megatron.inference.quantized import Quantized, weight_of

Function = Callable[[Tensor], Tensor]


class Layer:
    """One transformer layer; every function maps the last dimension and keeps the others."""

    def __init__(self, layer: Any) -> None:
        attention = layer.self_attention
        self.heads = int(attention.num_attention_heads_per_partition)
        """Query heads on this rank."""
        self.groups = int(attention.num_query_groups_per_partition)
        """Key heads on this rank."""
        self.attention_norm: Function = _norm(layer.input_layernorm)
        self.query_key_value: Function = _linear(attention.linear_qkv)
        """Per key head its query heads, its key and its value, each of the head size."""
        self.attention_output: Function = _linear(attention.linear_proj)
        self.feed_forward: Function = _feed_forward(layer.pre_mlp_layernorm, layer.mlp)
        """Norm included."""
        self._head_norms = [
            None if norm is None else _norm(norm) for norm in (attention.q_layernorm, attention.k_layernorm)
        ]
        self.tensor_parallel_group: Any = getattr(attention.linear_proj, "tp_group", None)

    def normed_heads(self, heads: Tensor) -> Tensor:
        """Query heads and, last, their key ``[..., R + 1, D]``, normed where the model norms them."""
        query_norm, key_norm = self._head_norms
        if query_norm is None or key_norm is None:
            return heads
        return torch.cat([query_norm(heads[..., :-1, :]), key_norm(heads[..., -1:, :])], dim=-2)


def _norm(module: Any) -> Function:
    from emu3_megatron.model.layers import RMSNorm

    if isinstance(module, RMSNorm):
        return partial(F.rms_norm, normalized_shape=module.weight.shape, weight=module.weight, eps=module.eps)
    return partial(_called, module)


def _linear(module: Any) -> Function:
    """A projection, summed over the tensor-parallel group where its input is split."""
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

    if not isinstance(module, ColumnParallelLinear | RowParallelLinear):
        return partial(_called, module)
    weight, bias = weight_of(module), module.bias
    if bias is not None and not isinstance(weight, Quantized):
        return partial(_called, module)
    product: Function = weight.product if isinstance(weight, Quantized) else partial(linear, weight=weight)
    group = module.tp_group
    whole = isinstance(module, ColumnParallelLinear) or torch.distributed.get_world_size(group) == 1
    if whole and bias is None:
        return product

    def summed(x: Tensor) -> Tensor:
        result = product(x)
        if not whole:
            torch.distributed.all_reduce(result, group=group)
        return result if bias is None else result + bias

    return summed


def _feed_forward(norm: Any, module: Any) -> Function:
    from emu3_megatron.model.layers import GatedFeedForward

    before = _norm(norm)
    if not isinstance(module, GatedFeedForward):
        return lambda x: _called(module, before(x))
    first, second = _linear(module.linear_fc1), _linear(module.linear_fc2)

    def gated(x: Tensor) -> Tensor:
        gate, up = first(before(x)).chunk(2, dim=-1)
        return second(F.silu(gate).mul_(up))

    return gated


def _called(module: Any, x: Tensor) -> Tensor:
    """The module's own call; megatron-core's linear layers return the output and a bias not yet added."""
    result = module(x)
    if isinstance(result, Tensor):
        return result
    output, bias = result
    return output if bias is None else output + bias
