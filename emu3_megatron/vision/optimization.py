"""AdamW and Muon over parameters that may be measured in different units.

A parameter in units of u is trained as if it were u times a parameter of ordinary size: for Adam, which only
looks at the scale of gradients, that is a learning rate u times as large and an epsilon 1/u times, and in the
norm of all gradients its own counts u times. For Muon it is the learning rate alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from emu3_megatron.muon import Muon

EPSILON = 1e-8
MUON_MOMENTUM = 0.95
"""Decay of Muon's momentum (Jordan 2024)."""
MUON_LEAST_SIDE = 32
"""Muon trains matrices of at least so many rows and columns; narrow ones have few directions to even out."""


class Optimizers:
    """Optimizers of different parameters, used as one."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        self.parts = list(parts)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Groups of all parts."""
        return [group for part in self.parts for group in part.param_groups]

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def step(self) -> None:
        """Take a step with every part."""
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        """States of the parts, by position."""
        return {str(number): part.state_dict() for number, part in enumerate(self.parts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave, or what a single optimizer did, as in older states."""
        if "param_groups" in state:
            state = {"0": state}
        if len(state) != len(self.parts):
            raise ValueError(
                f"the saved state has {len(state)} optimizers and this run {len(self.parts)}: set "
                f"schedule.muon_rate as it was, or begin in another folder"
            )
        for number, part in enumerate(self.parts):
            part.load_state_dict(state[str(number)])


def make_optimizer(
    module: nn.Module,
    *,
    betas: tuple[float, float],
    units: Mapping[str, float] | None = None,
    muon_rate: float = 0.0,
) -> Optimizers:
    """Optimizers without weight decay for the parameters that need gradients.

    Args:
        module: what to train.
        betas: decay rates of Adam's two moments.
        units: of the parameters that are not measured in 1, by name.
        muon_rate: learning rate of Muon's matrices in units of Adam's; 0 gives them to Adam.
    """
    adam: dict[float, list[nn.Parameter]] = {}
    muon: dict[float, list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            kind = muon if muon_rate and _is_wide(parameter) else adam
            kind.setdefault((units or {}).get(name, 1.0), []).append(parameter)
    parts: list[torch.optim.Optimizer] = []
    if adam:
        groups = [{"params": group, "unit": unit, "eps": EPSILON / unit} for unit, group in adam.items()]
        parts.append(torch.optim.AdamW(groups, betas=betas, weight_decay=0.0, foreach=True))
    if muon:
        groups = [{"params": group, "unit": unit, "share": muon_rate} for unit, group in muon.items()]
        parts.append(Muon(groups, momentum=MUON_MOMENTUM))
    return Optimizers(parts)


def set_learning_rate(optimizer: Optimizers, rate: float) -> None:
    """Set Adam's rate for parameters of unit 1, and that of all others in proportion."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["unit"] * group.get("share", 1.0)


def clip_gradients(optimizer: Optimizers, largest: float) -> Tensor:
    """Scale all gradients down to a norm of `largest` where it is exceeded; give the norm before."""
    groups = [
        (group["unit"], [p.grad for p in group["params"] if p.grad is not None])
        for group in optimizer.param_groups
    ]
    norms = [torch.linalg.vector_norm(grad) * unit for unit, grads in groups for grad in grads]
    total = torch.linalg.vector_norm(torch.stack(norms))
    scale = (largest / (total + 1e-6)).clamp(max=1.0)
    for _, grads in groups:
        torch._foreach_mul_(grads, scale)
    return total


def _is_wide(parameter: Tensor) -> bool:
    return parameter.dim() > 1 and min(parameter.size(0), parameter[0].numel()) >= MUON_LEAST_SIDE
