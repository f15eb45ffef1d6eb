"""Two questions that several parts of training ask."""

from __future__ import annotations

from typing import Any

import torch


def unwrap(module: Any) -> Any:
    """The model inside its data-parallel wrapper."""
    while hasattr(module, "module"):
        module = module.module
    return module


def is_rank_zero() -> bool:
    """Whether this is the rank that writes what is written once."""
    return torch.distributed.get_rank() == 0
