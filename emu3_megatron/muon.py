"""Muon: momentum whose singular values are all made one, for the matrices inside a network.

After K. Jordan and others, "Muon: An optimizer for hidden layers in neural networks" (2024); the size of an
update is that of "Muon is Scalable for LLM Training" (arXiv 2502.16982), so that one learning rate serves
these matrices and what Adam trains.

megatron-core keeps several maps in one weight (query, key and value; gate and up) and cuts weights over
tensor-parallel ranks. Here each map is orthogonalized by itself and whole, so that an update depends neither
on what shares its storage nor on the layout. The weight of a convolution is one map, of the inputs under the
kernel to the outputs.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic; five steps bring most singular values into [0.7, 1.2] (Jordan 2024)."""

NEWTON_SCHULZ_STEPS = 5
ADAM_UPDATE_RMS = 0.2
"""Root mean square of Adam's updates in units of the learning rate (arXiv 2502.16982)."""


def orthogonalize(matrices: Tensor) -> Tensor:
    """Roughly the nearest semi-orthogonal matrices: U V^T where the argument is U S V^T.

    Args:
        matrices: ``[N, rows, columns]``, floating point. On a GPU the products are taken in bf16, which
            suffices (Jordan 2024).

    Returns:
        The same shape and dtype.
    """
    a, b, c = NEWTON_SCHULZ
    tall = matrices.size(1) > matrices.size(2)
    x = matrices.mT if tall else matrices
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-30)
    if x.is_cuda:
        x = x.bfloat16()
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


@dataclass(frozen=True)
class FusedMaps:
    """Which rows of a weight belong to which map: groups of rows, each with the same parts.

    ``(2, (d, d))`` is two groups of ``2 * d`` rows; the first map has the first ``d`` rows of each group.
    """

    groups: int
    parts: tuple[int, ...]

    def split(self, weight: Tensor) -> list[Tensor]:
        """The maps of ``[rows, columns]``, each ``[its rows, columns]``."""
        grouped = weight.view(self.groups, sum(self.parts), weight.size(1))
        return [part.reshape(-1, weight.size(1)) for part in grouped.split(self.parts, dim=1)]

    def join(self, maps: Sequence[Tensor]) -> Tensor:
        """Undo `split`."""
        grouped = [part.reshape(self.groups, -1, part.size(1)) for part in maps]
        return torch.cat(grouped, dim=1).flatten(0, 1)


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum and decoupled weight decay, on weights that may be cut over ranks.

    Weights of more than two dimensions are matrices of the first one by all others. State:
    ``momentum_buffer``, of the weight's shape and dtype.

    Args:
        weights: Weights of at least two dimensions, or groups of them. One that is cut over tensor-parallel
            ranks says so as megatron-core's do (``tensor_model_parallel``, ``partition_dim``).
        momentum: Decay of the momentum.
        fused: Weights that hold more than one map.
        tensor_parallel_group: Ranks that hold the other parts; None where there are none.
    """

    def __init__(
        self,
        weights: Iterable[Any],
        *,
        momentum: float,
        fused: Mapping[Tensor, FusedMaps] | None = None,
        tensor_parallel_group: torch.distributed.ProcessGroup | None = None,
    ) -> None:
        super().__init__(weights, {"lr": 0.0, "weight_decay": 0.0})
        self._momentum, self._fused, self._group = momentum, dict(fused or {}), tensor_parallel_group

    def make_state(self) -> None:
        """Momentum of zero for weights that have none yet, as before the first step."""
        for group in self.param_groups:
            for weight in group["params"]:
                if not self.state[weight]:
                    self.state[weight]["momentum_buffer"] = torch.zeros_like(weight)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take one step with the gradients in ``grad``, at the groups' learning rate and decay."""
        self.make_state()
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if not weights:
                continue
            gradients = [weight.grad for weight in weights]
            momenta = [self.state[weight]["momentum_buffer"] for weight in weights]
            torch._foreach_lerp_(momenta, gradients, 1 - self._momentum)
            directions = self._directions(weights, torch._foreach_lerp(gradients, momenta, self._momentum))
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_sub_(weights, torch._foreach_mul(directions, group["lr"]))

    def _directions(self, weights: Sequence[Tensor], momenta: Sequence[Tensor]) -> list[Tensor]:
        """What to subtract at a learning rate of one; maps of the same shape are treated at once."""
        fused = [self._fused.get(weight) for weight in weights]
        pieces = [
            maps.split(momentum) if maps else [momentum.flatten(1)]
            for maps, momentum in zip(fused, momenta, strict=True)
        ]
        alike: dict[tuple[int, ...], list[tuple[int, int]]] = defaultdict(list)
        for number, weight in enumerate(weights):
            cut = _cut_dimension(weight) if self._group is not None else -1
            for part, piece in enumerate(pieces[number]):
                alike[(cut, *piece.shape)].append((number, part))
        for (cut, *_), places in alike.items():
            stack = torch.stack([pieces[number][part] for number, part in places])
            for (number, part), direction in zip(places, self._orthogonal(stack, cut), strict=True):
                pieces[number][part] = direction
        return [
            (maps.join(parts) if maps else parts[0]).view_as(weight)
            for maps, parts, weight in zip(fused, pieces, weights, strict=True)
        ]

    def _orthogonal(self, stack: Tensor, cut: int) -> Tensor:
        """This rank's parts ``[N, rows, columns]`` of matrices that are cut along `cut` (-1: whole), made
        orthogonal as a whole and scaled to the size of Adam's updates."""
        whole = stack
        if self._group is not None and cut >= 0:
            parts = [torch.empty_like(stack) for _ in range(self._group.size())]
            torch.distributed.all_gather(parts, stack, group=self._group)
            whole = torch.cat(parts, dim=cut + 1)
        directions = orthogonalize(whole) * (ADAM_UPDATE_RMS * math.sqrt(max(whole.shape[1:])))
        if whole is stack or self._group is None:
            return directions
        return directions.chunk(self._group.size(), dim=cut + 1)[self._group.rank()]


def _cut_dimension(weight: Any) -> int:
    """The dimension along which a weight is cut over tensor-parallel ranks, or -1."""
    return int(weight.partition_dim) if getattr(weight, "tensor_model_parallel", False) else -1
