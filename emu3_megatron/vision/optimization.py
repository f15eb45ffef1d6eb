"""AdamW over parameters that may be measured in different units.

A parameter in units of u is trained as if it were u times a parameter of ordinary size: for Adam, which only
looks at the scale of gradients, that is a learning rate u times as large and an epsilon 1/u times, and in the
norm of all gradients its own counts u times.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

EPSILON = 1e-8


def make_optimizer(
    module: nn.Module, *, betas: tuple[float, float], units: Mapping[str, float] | None = None
) -> torch.optim.AdamW:
    """AdamW without weight decay over the parameters that need gradients.

    Args:
        module: what to train.
        betas: decay rates of the two moments.
        units: of the parameters that are not measured in 1, by name.
    """
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((units or {}).get(name, 1.0), []).append(parameter)
    described = [{"params": group, "unit": unit, "eps": EPSILON / unit} for unit, group in groups.items()]
    return torch.optim.AdamW(described, betas=betas, weight_decay=0.0, foreach=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the rate of parameters of unit 1, and that of the others in proportion."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["unit"]


def clip_gradients(optimizer: torch.optim.Optimizer, largest: float) -> Tensor:
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
