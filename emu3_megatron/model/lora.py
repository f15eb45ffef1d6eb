"""Low-rank adapters (LoRA, arXiv 2106.09685) beside the decoder's frozen linear layers, under any layout.

An adapter adds ``alpha / rank * x A^T B^T`` to a layer's output. Of a column-parallel layer B is split as the
weight is and A is on every rank; of a row-parallel one A is split and B is on every rank. So merging needs no
communication, and the fused layers keep one A: query, key and value share it, gate and up share theirs.

An adapter is called ``LAYER_adapter`` and stands beside its layer, whose parameters keep their names: a
checkpoint of the whole model loads into a model with adapters.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.tensor_parallel import layers, mappings
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from emu3_megatron.model.config import ADAPTER_SUFFIX, LoRAConfig, ModelConfigError
from emu3_megatron.model.initialization import global_parameter_names

_HALF_SPLIT = "linear_fc1"
"""The layer whose rows are [gate; up], each split over tensor parallelism on its own."""


class Adapter(torch.nn.Module):
    """The two thin matrices beside one linear layer.

    Args:
        name: The layer's name, such as ``linear_qkv``.
        layer: megatron-core's column- or row-parallel linear layer.
        config: Rank, scale, dropout.
    """

    def __init__(self, name: str, layer: Any, config: LoRAConfig) -> None:
        super().__init__()
        self._name, self._scale, self._dropout = name, config.scale, config.dropout
        self._is_column = isinstance(layer, layers.ColumnParallelLinear)
        self._group = layer.tp_group
        self._sequence_parallel = layer.sequence_parallel
        rows, columns = layer.weight.shape
        empty = layer.weight.detach().new_empty
        self.lora_A = torch.nn.Parameter(empty(config.rank, columns))
        self.lora_B = torch.nn.Parameter(empty(rows, config.rank))
        split, whole = (self.lora_B, self.lora_A) if self._is_column else (self.lora_A, self.lora_B)
        layers.set_tensor_model_parallel_attributes(split, True, 0 if self._is_column else 1, 1)
        # Under sequence parallelism a rank's gradient of the whole matrix is of its own tokens alone.
        whole.sequence_parallel = self._sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """What to add to the layer's output for its input `x`: same split over tokens and features."""
        thin = torch.nn.functional.linear(self._dropped(x), self.lora_A)
        thin = self._gathered(thin) if self._is_column else self._summed(thin)
        return torch.nn.functional.linear(thin, self.lora_B) * self._scale

    def _gathered(self, thin: torch.Tensor) -> torch.Tensor:
        """Every token on every rank, before the split matrix of a column-parallel layer."""
        if self._sequence_parallel:
            return mappings.gather_from_sequence_parallel_region(thin, True, self._group)
        return mappings.copy_to_tensor_model_parallel_region(thin, self._group)

    def _summed(self, thin: torch.Tensor) -> torch.Tensor:
        """The sum over ranks, after the split matrix of a row-parallel layer."""
        if self._sequence_parallel:
            return mappings.reduce_scatter_to_sequence_parallel_region(thin, self._group)
        return mappings.reduce_from_tensor_model_parallel_region(thin, self._group)

    def _dropped(self, x: torch.Tensor) -> torch.Tensor:
        if not (self.training and self._dropout):
            return x
        if self._is_column and not self._sequence_parallel:  # every rank holds the same x
            return torch.nn.functional.dropout(x, self._dropout)
        with tensor_parallel.get_cuda_rng_tracker().fork():
            return torch.nn.functional.dropout(x, self._dropout)

    def delta(self) -> torch.Tensor:
        """What merging adds to this rank's part of the weight, fp32."""
        return self._scale * (self.lora_B.detach().float() @ self.lora_A.detach().float())

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: Any = None
    ) -> dict[str, Any]:
        """The matrices as parts of global ones, for a checkpoint of any layout."""
        state = make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"lora_B": 0} if self._is_column else {"lora_A": 1},
            sharded_offsets,
            tp_group=self._group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        if self._name == _HALF_SPLIT:
            key = f"{prefix}lora_B"
            state[key] = apply_swiglu_sharded_factory(state[key], sharded_offsets)
        return state


def add_adapters(chunk: torch.nn.Module, config: LoRAConfig, *, seed: int) -> None:
    """Freeze one pipeline chunk and put adapters beside its layers; the model computes what it did before.

    A is uniform within ``1 / sqrt(inputs)``, as in the PEFT library, from the seed and its name alone; B is
    0.

    Args:
        chunk: A chunk of `build_model`, not yet wrapped for data parallelism.
        config: Rank above 0.
        seed: Of A.

    Raises:
        ModelConfigError: the layers are Transformer Engine's, which fuse a norm into the layer.
    """
    if getattr(chunk, "transformer_engine", False):
        raise ModelConfigError(
            "lora works on megatron-core's own layers: set model.attention_backend=torch beside lora.rank"
        )
    chunk.requires_grad_(False)
    for parent in list(chunk.modules()):
        for name in config.targets:
            layer = parent._modules.get(name)
            if layer is not None:
                adapter = Adapter(name, layer, config)
                parent.add_module(name + ADAPTER_SUFFIX, adapter)
                layer.register_forward_hook(_Add(adapter))
    embedding = getattr(chunk, "embedding", None)
    if embedding is not None:
        embedding.register_forward_hook(_require_gradient)
    _initialize(chunk, seed)


class _Add:
    """Forward hook of a linear layer; the adapter is not the hook's owner, so that it stands in the model
    once."""

    def __init__(self, adapter: Adapter) -> None:
        self._adapter = adapter

    def __call__(self, _layer: Any, inputs: tuple[Any, ...], output: tuple[Any, Any]) -> tuple[Any, Any]:
        return output[0] + self._adapter(inputs[0]), output[1]


def _require_gradient(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
    """Recomputed layers have gradients only if their input asks for one, and the embedding is frozen."""
    return output.requires_grad_() if torch.is_grad_enabled() else output


def adapters(chunk: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module, Adapter]]:
    """Name in the chunk, layer and adapter of every layer that has one."""
    for path, parent in chunk.named_modules():
        for name, module in parent._modules.items():
            if isinstance(module, Adapter):
                layer = name.removesuffix(ADAPTER_SUFFIX)
                yield f"{path}.{layer}", parent._modules[layer], module


@torch.no_grad()
def merge_adapters(chunk: torch.nn.Module) -> None:
    """Add every adapter to its layer's weight and remove it: a plain model that computes the same."""
    for path, layer, adapter in list(adapters(chunk)):
        weight: Any = layer.weight
        weight.copy_(weight.float() + adapter.delta())
        _remove_hooks(layer)
        parent = chunk.get_submodule(path.rpartition(".")[0])
        delattr(parent, path.rpartition(".")[2] + ADAPTER_SUFFIX)
    if hasattr(chunk, "embedding"):
        _remove_hooks(chunk.embedding)
    chunk.requires_grad_(True)


def _remove_hooks(module: Any) -> None:
    """Take away what `add_adapters` registered."""
    for key, hook in list(module._forward_hooks.items()):
        if isinstance(hook, _Add) or hook is _require_gradient:
            del module._forward_hooks[key]


@torch.no_grad()
def _initialize(chunk: torch.nn.Module, seed: int) -> None:
    rank = parallel_state.get_tensor_model_parallel_rank()
    for name, parameter in global_parameter_names(chunk):
        if name.endswith("lora_B"):
            parameter.zero_()
        elif name.endswith("lora_A"):
            size = parallel_state.get_tensor_model_parallel_world_size()
            split = size if getattr(parameter, "tensor_model_parallel", False) else 1
            columns = parameter.shape[1] * split
            digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
            bound = 1 / math.sqrt(columns)
            whole = torch.empty(parameter.shape[0], columns).uniform_(-bound, bound, generator=generator)
            parameter.copy_(whole.chunk(split, 1)[rank if split > 1 else 0])
