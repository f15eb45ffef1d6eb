"""Moving averages of a tokenizer's weights: what a long adversarial training publishes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from emu3_megatron.vision.model import VisionTokenizer

CODEBOOK = "quantize.embedding.weight"
"""Name of the codebook among the tokenizer's weights."""


class WeightAverages:
    """Follows every floating-point weight and buffer of a tokenizer.

    Args:
        tokenizer: as it begins.
        decay: of the averages, per update; the first updates use less, so that the beginning is forgotten.
    """

    def __init__(self, tokenizer: VisionTokenizer, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.values = {name: tensor.clone() for name, tensor in _weights(tokenizer).items()}

    @torch.no_grad()
    def update(self, tokenizer: VisionTokenizer, moved_K: Tensor) -> None:
        """Move every average towards its weight; the codes that `moved_K` (bool) marks are taken as they are.

        A code that was given a new place has nothing to do with the latents near its old one.
        """
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        live = _weights(tokenizer)
        torch._foreach_lerp_(list(self.values.values()), [live[name] for name in self.values], 1 - decay)
        self.values[CODEBOOK][moved_K] = live[CODEBOOK][moved_K]

    @torch.no_grad()
    def copy_to(self, tokenizer: VisionTokenizer) -> None:
        """Overwrite the tokenizer's weights."""
        for name, tensor in _weights(tokenizer).items():
            tensor.copy_(self.values[name])

    @contextmanager
    def applied(self, tokenizer: VisionTokenizer) -> Iterator[None]:
        """Within the block the tokenizer has the averages; afterwards its own weights again."""
        kept = {name: tensor.clone() for name, tensor in _weights(tokenizer).items()}
        self.copy_to(tokenizer)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, tensor in _weights(tokenizer).items():
                    tensor.copy_(kept[name])

    def state_dict(self) -> dict[str, object]:
        """Everything a rerun needs."""
        return {"updates": self.updates, "values": self.values}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Restore what `state_dict` gave."""
        updates, values = state["updates"], state["values"]
        assert isinstance(updates, int)
        assert isinstance(values, dict)
        self.updates = updates
        for name, tensor in self.values.items():
            tensor.copy_(values[name])


def _weights(tokenizer: VisionTokenizer) -> dict[str, Tensor]:
    return {k: v.detach() for k, v in tokenizer.state_dict().items() if v.is_floating_point()}
