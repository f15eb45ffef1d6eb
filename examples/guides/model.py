"""Add a model: another shape of the decoder."""

from __future__ import annotations

from emu3_megatron.model import ModelConfig

# --8<-- [start:model]
SHAPE = {
    "num_layers": 24,
    "hidden_size": 2048,
    "ffn_hidden_size": 5632,
    "num_attention_heads": 16,
    "num_query_groups": 8,
    "qk_layernorm": True,
}


def parameters(vocabulary_size: int) -> int:
    """Parameters of the shape; `validate` refuses one that cannot be built."""
    config = ModelConfig(**SHAPE)
    config.validate()
    return config.parameter_count(vocabulary_size)


# --8<-- [end:model]

if __name__ == "__main__":
    print(f"{parameters(184_622):,}")
