"""Shape of the decoder: fields, presets, parameter count."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from emu3_megatron.errors import UserError
from emu3_megatron.parallel.config import LayoutError, ParallelConfig

AttentionBackend = Literal["auto", "torch", "transformer_engine"]
Recompute = Literal["none", "selective", "full"]
FP8Format = Literal["off", "hybrid", "e4m3"]
FP8Recipe = Literal["delayed", "tensorwise", "blockwise", "mxfp8"]


class ModelConfigError(UserError):
    """A model shape that cannot be built; one line with value, rule and remedy."""


@dataclass(kw_only=True)
class ModelConfig:
    """A Llama-2-style decoder: RMSNorm, grouped-query attention, SwiGLU, rotary positions; no biases by
    default.

    Defaults are Emu3's (arXiv 2409.18869, table 3, and the released configuration).
    """

    num_layers: int = 32
    """Transformer layers."""
    hidden_size: int = 4096
    """Width of the residual stream."""
    ffn_hidden_size: int = 14336
    """Width of the gated feed-forward layer."""
    num_attention_heads: int = 32
    """Query heads."""
    num_query_groups: int = 8
    """Key and value heads."""
    kv_channels: int | None = None
    """Size of one head; None: hidden_size / num_attention_heads."""
    max_position_embeddings: int = 131_072
    """Longest document in tokens; rotary tables are made up to what a window needs."""
    rotary_base: int = 1_000_000
    """Base of the rotary frequencies."""
    layernorm_epsilon: float = 1e-5
    """Epsilon of every RMSNorm."""
    qk_layernorm: bool = False
    """RMSNorm on queries and keys of each head (Emu3.5)."""
    qkv_bias: bool = False
    """Biases on queries, keys and values (Qwen2)."""
    embedding_dropout: float = 0.1
    """Dropout after the token embedding."""
    attention_dropout: float = 0.1
    """Dropout on attention probabilities."""
    hidden_dropout: float = 0.1
    """Dropout on the output of attention and of the feed-forward layer, before the residual sum."""
    init_method_std: float = 0.02
    """Standard deviation of the initial weights."""
    scaled_output_init: bool = False
    """Divide the initial deviation of the two residual output layers by sqrt(2 * num_layers)."""
    attention_backend: AttentionBackend = "auto"
    """`auto`: Transformer Engine where it is installed and the platform is CUDA, else `torch`."""
    recompute: Recompute = "none"
    """What backward computes again: `none`, attention (`selective`) or whole layers (`full`)."""

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> ModelConfig:
        """A named shape, see `PRESETS`; `overrides` replace fields.

        Raises:
            ModelConfigError: unknown preset or field.
        """
        if name not in PRESETS:
            raise ModelConfigError(f"unknown model preset {name!r}; known presets: {', '.join(PRESETS)}")
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(overrides) - known):
            raise ModelConfigError(
                f"unknown model fields {unknown}; known fields: {', '.join(sorted(known))}"
            )
        return cls(**{**PRESETS[name], **overrides})

    @property
    def head_size(self) -> int:
        """Size of one attention head."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    def validate(self, parallel: ParallelConfig | None = None) -> None:
        """Refuse shapes that cannot be built, alone or under a layout.

        Raises:
            ModelConfigError: a field has an impossible value.
            LayoutError: the shape does not divide over the layout.
        """
        for name in _POSITIVE:
            if getattr(self, name) < 1:
                raise ModelConfigError(f"model.{name}={getattr(self, name)} must be at least 1")
        if self.kv_channels is None and self.hidden_size % self.num_attention_heads:
            raise ModelConfigError(
                f"model.hidden_size={self.hidden_size} is not divisible by num_attention_heads="
                f"{self.num_attention_heads}; change one of them or set kv_channels"
            )
        if self.head_size % 2:
            raise ModelConfigError(f"model: the head size {self.head_size} must be even for rotary positions")
        if self.num_attention_heads % self.num_query_groups:
            raise ModelConfigError(
                f"model.num_attention_heads={self.num_attention_heads} must be a multiple of "
                f"num_query_groups={self.num_query_groups}"
            )
        for name in ("embedding_dropout", "attention_dropout", "hidden_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ModelConfigError(f"model.{name}={getattr(self, name)} must lie in [0, 1)")
        if self.attention_backend not in ("auto", "torch", "transformer_engine"):
            raise ModelConfigError(
                f"model.attention_backend={self.attention_backend!r} must be auto, torch or "
                "transformer_engine"
            )
        if self.recompute not in ("none", "selective", "full"):
            raise ModelConfigError(f"model.recompute={self.recompute!r} must be none, selective or full")
        if parallel is not None:
            self._validate_layout(parallel)

    def _validate_layout(self, parallel: ParallelConfig) -> None:
        parallel.validate()
        tensor = parallel.tensor_model_parallel_size
        for name in ("num_query_groups", "ffn_hidden_size"):
            if getattr(self, name) % tensor:
                raise LayoutError(
                    f"model.{name}={getattr(self, name)} is not divisible by "
                    f"tensor_model_parallel_size={tensor}; lower the degree"
                )
        parallel.stage_layers(self.num_layers)
        if self.attention_backend != "auto":  # auto depends on the machine: decided when the model is built
            engine = self.attention_backend == "transformer_engine"
            parallel.context_communication(transformer_engine=engine)
        heads, context = self.num_attention_heads // tensor, parallel.context_parallel_size
        if parallel.cp_comm == "a2a" and heads % context:
            raise LayoutError(
                f"parallel.cp_comm=a2a needs the {heads} query heads of a tensor-parallel rank to be "
                f"divisible by context_parallel_size={context}; use cp_comm=all_gather"
            )

    def parameter_count(self, vocabulary_size: int) -> int:
        """Parameters with `vocabulary_size` rows in each of the embedding and the output layer."""
        head = self.head_size
        attention = self.hidden_size * head * 2 * (self.num_attention_heads + self.num_query_groups)
        norms = 2 * self.hidden_size + (2 * head if self.qk_layernorm else 0)
        biases = head * (self.num_attention_heads + 2 * self.num_query_groups) if self.qkv_bias else 0
        layer = attention + biases + 3 * self.hidden_size * self.ffn_hidden_size + norms
        return 2 * vocabulary_size * self.hidden_size + self.num_layers * layer + self.hidden_size


ADAPTER_SUFFIX = "_adapter"
"""Ends the name of every adapter's module, and stands in no other name."""

LoRATarget = Literal["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]


@dataclass(kw_only=True)
class LoRAConfig:
    """Low-rank adapters beside frozen linear layers (arXiv 2106.09685); they alone are trained."""

    rank: int = 0
    """Rank of every adapter; 0 trains the whole model (ours)."""
    alpha: float = 32.0
    """An adapter's output is multiplied by alpha / rank (ours)."""
    dropout: float = 0.0
    """Dropout on an adapter's input (ours)."""
    targets: list[LoRATarget] = field(
        default_factory=lambda: ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]
    )
    """Layers that get adapters, in every decoder layer: query, key and value; output of attention; gate and
    up; down (ours: all)."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.rank < 0:
            raise ModelConfigError(f"lora.rank={self.rank} must not be negative; 0 is off")
        if self.rank and not self.targets:
            raise ModelConfigError("lora.targets is empty; name at least one of linear_qkv, linear_proj, ...")
        if self.alpha <= 0:
            raise ModelConfigError(f"lora.alpha={self.alpha} must be positive")
        if not 0.0 <= self.dropout < 1.0:
            raise ModelConfigError(f"lora.dropout={self.dropout} must lie in [0, 1)")

    @property
    def scale(self) -> float:
        """What an adapter's output is multiplied by."""
        return self.alpha / self.rank


_POSITIVE = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups")
_NO_DROPOUT = {"embedding_dropout": 0.0, "attention_dropout": 0.0, "hidden_dropout": 0.0}

PRESETS: dict[str, dict[str, Any]] = {
    "emu3_8b": {},
    "emu3_1_5b": {
        "num_layers": 16,
        "hidden_size": 2048,
        "ffn_hidden_size": 6144,
        "num_attention_heads": 16,
        "num_query_groups": 8,
    },
    "emu3.5_34b": {
        "num_layers": 64,
        "hidden_size": 5120,
        "ffn_hidden_size": 25600,
        "num_attention_heads": 64,
        "num_query_groups": 8,
        "kv_channels": 128,
        "max_position_embeddings": 32_768,
        "qk_layernorm": True,
    },
    "tiny": {
        "num_layers": 4,
        "hidden_size": 128,
        "ffn_hidden_size": 384,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "max_position_embeddings": 4096,
        **_NO_DROPOUT,
    },
}
"""Fields that differ from the defaults. Sources: emu3_8b arXiv 2409.18869; emu3.5_34b arXiv 2510.26583
(its RMSNorm epsilon and rotary base are unpublished: Emu3's are used); emu3_1_5b and tiny are ours."""
