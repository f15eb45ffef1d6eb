"""The megatron-core GPT: presets, build, attention and loss.

Importing this package needs nothing of megatron-core; `build_model` does, after `platform.install`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from emu3_megatron.model.config import LoRAConfig, ModelConfig, ModelConfigError

if TYPE_CHECKING:
    from emu3_megatron.model.build import build_model

__all__ = ["LoRAConfig", "ModelConfig", "ModelConfigError", "build_model"]


def __getattr__(name: str) -> Any:
    if name == "build_model":  # late, so that a configuration can be read before the platform is chosen
        from emu3_megatron.model.build import build_model

        return build_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
