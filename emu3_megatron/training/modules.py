"""Small questions that several parts of training ask."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from emu3_megatron.errors import UserError


def unwrap(module: Any) -> Any:
    """The model inside its data-parallel wrapper."""
    while hasattr(module, "module"):
        module = module.module
    return module


def is_rank_zero() -> bool:
    """Whether this is the rank that writes what is written once."""
    return torch.distributed.get_rank() == 0


def load_by_name(name: str, key: str) -> Any:
    """What ``module:attribute`` names, for parts that a configuration chooses.

    Args:
        name: The name.
        key: Where it stands in the configuration, for the message.

    Raises:
        UserError: there is no such thing.
    """
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{key}={name!r} is not an importable `module:name` ({error})") from error
