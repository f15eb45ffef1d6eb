"""Static key-value cache for generation."""

from __future__ import annotations

import torch


class KeyValueCache:
    """Keys and values of every layer of one model, allocated once.

    Prompts of different lengths are padded on the left. Pass the cache to the model as ``inference_context``;
    after all pipeline chunks have seen the same tokens call `advance`.

    Args:
        batch: Sequences.
        max_length: Most tokens of a sequence, padding included.
        groups: Key heads of one tensor-parallel rank.
        channels: Head size.
        dtype: Type of keys and values.
        device: Where they live.
        left_padding: int64 ``[batch]``: padding tokens before each prompt; None: no padding.
    """

    def __init__(
        self,
        *,
        batch: int,
        max_length: int,
        groups: int,
        channels: int,
        dtype: torch.dtype,
        device: torch.device,
        left_padding: torch.Tensor | None = None,
    ) -> None:
        self.batch, self.max_length = batch, max_length
        self.length = 0
        self._shape = (batch, groups, max_length, channels)
        self._dtype, self._device = dtype, device
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        if left_padding is not None and not bool(left_padding.any()):
            left_padding = None
        self.left_padding = None if left_padding is None else left_padding.to(device)
        self._mask: torch.Tensor | None = None
        self._mask_key = (-1, -1)

    def append(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store ``[tokens, batch, groups, channels]``; return all, ``[batch, groups, seen, channels]``.

        Raises:
            ValueError: the cache is full.
        """
        end = self.length + key.size(0)
        if end > self.max_length:
            raise ValueError(
                f"the sequence would reach {end} tokens but the key-value cache holds {self.max_length}; "
                "generate fewer tokens or raise max_length"
            )
        if layer not in self._layers:
            self._layers[layer] = tuple(  # type: ignore[assignment]
                torch.zeros(self._shape, dtype=self._dtype, device=self._device) for _ in range(2)
            )
        keys, values = self._layers[layer]
        keys[:, :, self.length : end] = key.permute(1, 2, 0, 3)
        values[:, :, self.length : end] = value.permute(1, 2, 0, 3)
        return keys[:, :, :end], values[:, :, :end]

    def advance(self, tokens: int) -> None:
        """Count `tokens` as seen; call once per forward pass through all chunks."""
        self.length += tokens

    def rewind(self, length: int) -> None:
        """Forget everything after the first `length` tokens."""
        self.length = length

    def positions(self, tokens: int) -> torch.Tensor:
        """int64 ``[batch, tokens]``: positions of the next `tokens`, counted from the first real token."""
        positions = torch.arange(self.length, self.length + tokens, device=self._device).expand(
            self.batch, -1
        )
        return (
            positions if self.left_padding is None else (positions - self.left_padding[:, None]).clamp_(min=0)
        )

    def mask(self, tokens: int) -> torch.Tensor | None:
        """bool ``[batch or 1, 1, tokens, seen]``, True = attend; None where everything is attended."""
        if tokens == 1 and self.left_padding is None:
            return None
        if self._mask_key != (self.length, tokens):
            self._mask_key = (self.length, tokens)
            query = torch.arange(self.length, self.length + tokens, device=self._device)[:, None]
            key = torch.arange(self.length + tokens, device=self._device)[None]
            mask = (key <= query)[None]
            if self.left_padding is not None:
                # A padding query attends to itself: a softmax over nothing is NaN.
                mask = mask & ((key[None] >= self.left_padding[:, None, None]) | (key == query)[None])
            self._mask = mask[:, None]
        return self._mask
