"""Low-rank adapters of a checkpoint, added to the weights they stand beside as those are read."""

from __future__ import annotations

from torch import Tensor

from emu3_megatron.conversion.lazy import LazyTensors, Renamed
from emu3_megatron.model.config import ADAPTER_SUFFIX, LoRAConfig


class Merged(Renamed):
    """The tensors of a checkpoint without its adapters, whose product is part of the weights.

    Args:
        source: Our tensors, with two matrices beside every adapted weight.
        lora: What the checkpoint was trained with.
    """

    def __init__(self, source: LazyTensors, lora: LoRAConfig) -> None:
        super().__init__(source, {name: name for name in source if ADAPTER_SUFFIX not in name})
        self._lora = lora

    def __getitem__(self, name: str) -> Tensor:
        """Read one tensor, with its two matrices where it has an adapter; the sum is made in fp32."""
        weight = super().__getitem__(name)
        layer = name.removesuffix(".weight") + ADAPTER_SUFFIX
        if f"{layer}.lora_A" not in self._source:
            return weight
        thin, wide = (self._source[f"{layer}.lora_{half}"].float() for half in ("A", "B"))
        return (weight.float() + self._lora.scale * (wide @ thin)).to(weight.dtype)
