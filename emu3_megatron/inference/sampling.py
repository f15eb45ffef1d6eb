"""Drawing a token from logits: temperature, top-k, top-p, min-p, with the randomness of each request its own.

Every request has a stream of uniform numbers that depends on its seed alone, and a token is the point where
the cumulative probability, over ids in their order, passes the next number. What else is in the batch changes
neither.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[np.floating[Any]]

_BLOCK = 1024
"""Uniform numbers drawn at a time."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn. Raises `ValueError` for values out of range."""

    temperature: float = 1.0
    """Logits are divided by it; 0 takes the most probable token (greedy)."""
    top_k: int | None = 2048
    """Keep this many most probable ids (released image generation: 2048); None keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of most probable ids that holds this much probability, after `top_k`."""
    min_p: float = 0.0
    """Drop ids less probable than this fraction of the most probable one."""
    guidance: float = 1.0
    """Classifier-free guidance: logits = unconditional + guidance * (conditional - unconditional); 1 is off
    (released image generation: 3)."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        rules = {
            "temperature": (self.temperature >= 0, "must be 0 (greedy) or more"),
            "top_k": (self.top_k is None or self.top_k >= 1, "must be at least 1, or None for all"),
            "top_p": (0 < self.top_p <= 1, "must be in (0, 1]"),
            "min_p": (0 <= self.min_p < 1, "must be in [0, 1)"),
            "guidance": (self.guidance >= 0, "must be 0 or more; 1 is off"),
        }
        for name, (holds, rule) in rules.items():
            if not holds:
                raise ValueError(f"sampling: {name}={getattr(self, name)} {rule}")


class UniformStream:
    """Uniform numbers in [0, 1) that depend on the seed only (Philox, counter-based)."""

    def __init__(self, seed: int) -> None:
        if seed < 0:
            raise ValueError(f"seed={seed} must not be negative")
        self._generator = np.random.Generator(np.random.Philox(key=seed % (1 << 128)))
        self._block = np.empty(0)
        self._used = 0

    def next(self) -> float:
        """The next number."""
        if self._used == len(self._block):
            self._block = self._generator.random(_BLOCK)
            self._used = 0
        self._used += 1
        return float(self._block[self._used - 1])


def guide(conditional_BV: Tensor, unconditional_BV: Tensor, scale_B: Tensor) -> Tensor:
    """Classifier-free guidance on logits.

    Other code applies it to log-probabilities; the results differ by a constant per row, so by nothing.
    """
    # in place: of a small model the passes over the logits are a good part of a step
    return (conditional_BV - unconditional_BV).mul_(scale_B[:, None]).add_(unconditional_BV)


def sample(logits_BV: Tensor, settings: Sequence[Sampling], uniforms: Sequence[float]) -> Tensor:
    """Draw one column per row.

    Args:
        logits_BV: fp32.
        settings: one per row.
        uniforms: one number in [0, 1) per row; not read where the temperature is 0.

    Returns:
        int64 ``[B]``, the columns.
    """
    greedy_B = torch.tensor([each.temperature == 0 for each in settings])
    if bool(greedy_B.all()) and logits_BV.device.type != "cpu":
        return logits_BV.argmax(dim=1)
    device = logits_BV.device
    if device.type == "cpu":
        rows = zip(logits_BV.numpy(), settings, uniforms, strict=True)
        return torch.tensor([_draw(*row) for row in rows])
    return _sample_together(logits_BV, settings, uniforms, greedy_B)


def _draw(logits_V: Array, settings: Sampling, uniform: float) -> int:
    """Draw from one row on the CPU.

    What `_sample_together` does, in a fraction of its time: numpy selects the k-th largest much faster than
    torch, and only ids that are kept are looked at again.
    """
    columns = len(logits_V)
    if settings.temperature == 0:
        return int(logits_V.argmax())
    kept = None
    if settings.top_k is not None and settings.top_k < columns:
        place = columns - settings.top_k
        kept = np.flatnonzero(logits_V >= np.partition(logits_V, place)[place])
    scores = (logits_V if kept is None else logits_V[kept]).astype(np.float64) / settings.temperature
    probabilities = np.exp(scores - scores.max())
    if settings.top_p < 1:
        order = np.argsort(-probabilities, kind="stable")
        cumulative = probabilities[order].cumsum()
        before = cumulative - probabilities[order]
        probabilities[order[before >= settings.top_p * cumulative[-1]]] = 0.0
    if settings.min_p > 0:
        probabilities[probabilities < settings.min_p * probabilities.max()] = 0.0
    cumulative = probabilities.cumsum()
    drawn = int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"))
    # rounding may put the target at the very end, behind the last id that was kept
    drawn = min(drawn, int(np.flatnonzero(probabilities)[-1]))
    return drawn if kept is None else int(kept[drawn])


def _sample_together(
    logits_BV: Tensor, settings: Sequence[Sampling], uniforms: Sequence[float], greedy_B: Tensor
) -> Tensor:
    """Draw from all rows in a few operations on their device."""
    device = logits_BV.device
    temperature_B = torch.tensor([each.temperature or 1.0 for each in settings], device=device)
    logits_BV = logits_BV / temperature_B[:, None]
    logits_BV = _keep_top_k(logits_BV, [each.top_k for each in settings])
    probabilities_BV = logits_BV.double().softmax(dim=1)
    probabilities_BV = _keep_top_p(probabilities_BV, [each.top_p for each in settings])
    probabilities_BV = _keep_min_p(probabilities_BV, [each.min_p for each in settings])
    cumulative_BV = probabilities_BV.cumsum(dim=1)
    target_B = torch.tensor(uniforms, dtype=torch.float64, device=device) * cumulative_BV[:, -1]
    drawn_B = torch.searchsorted(cumulative_BV, target_B[:, None], right=True)[:, 0]
    # rounding may put the target at the very end, behind the last id that was kept
    last_kept_B = (probabilities_BV > 0).long().cumsum(dim=1).argmax(dim=1)
    drawn_B = torch.minimum(drawn_B, last_kept_B)
    return torch.where(greedy_B.to(device), logits_BV.argmax(dim=1), drawn_B)


def _keep_top_k(logits_BV: Tensor, top_k: Sequence[int | None]) -> Tensor:
    """Logits below the k-th largest become minus infinity; ties with it stay."""
    columns = logits_BV.shape[1]
    wanted = [min(k or columns, columns) for k in top_k]
    if min(wanted) == columns:
        return logits_BV
    # rows that keep everything need no threshold, and would make topk sort the whole vocabulary
    largest = max(k for k in wanted if k < columns)
    values_BK = logits_BV.topk(largest, dim=1).values
    index_B1 = torch.tensor([min(k, largest) - 1 for k in wanted], device=logits_BV.device)[:, None]
    threshold_B1 = values_BK.gather(1, index_B1)
    everything_B1 = torch.tensor([k == columns for k in wanted], device=logits_BV.device)[:, None]
    return logits_BV.masked_fill((logits_BV < threshold_B1) & ~everything_B1, float("-inf"))


def _keep_top_p(probabilities_BV: Tensor, top_p: Sequence[float]) -> Tensor:
    """Zero the ids outside the smallest set of most probable ids that holds `top_p`."""
    if min(top_p) >= 1:
        return probabilities_BV
    limit_B1 = torch.tensor(top_p, dtype=probabilities_BV.dtype, device=probabilities_BV.device)[:, None]
    ordered_BV, order_BV = probabilities_BV.sort(dim=1, descending=True, stable=True)
    before_BV = ordered_BV.cumsum(dim=1) - ordered_BV
    dropped_BV = torch.zeros_like(probabilities_BV, dtype=torch.bool)
    dropped_BV.scatter_(1, order_BV, (before_BV >= limit_B1) & (limit_B1 < 1))
    return probabilities_BV.masked_fill(dropped_BV, 0.0)


def _keep_min_p(probabilities_BV: Tensor, min_p: Sequence[float]) -> Tensor:
    """Zero the ids less probable than a fraction of the most probable one."""
    if max(min_p) <= 0:
        return probabilities_BV
    fraction_B1 = torch.tensor(min_p, dtype=probabilities_BV.dtype, device=probabilities_BV.device)[:, None]
    threshold_B1 = fraction_B1 * probabilities_BV.max(dim=1, keepdim=True).values
    return probabilities_BV.masked_fill(probabilities_BV < threshold_B1, 0.0)
