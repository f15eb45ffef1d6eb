"""Speed: tokens per second, and model FLOPs utilisation against a stated peak."""

from __future__ import annotations

from emu3_megatron.model import ModelConfig

PEAK_TFLOPS = {
    "A100": 312.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "H200": 989.0,
    "B200": 2250.0,
}
"""Dense bf16 peak of a device whose name contains the key, from NVIDIA's data sheets; the first match
counts."""


def device_peak_tflops(device_name: str) -> float | None:
    """Peak of a GPU by its name, or None where the table has none."""
    return next((peak for key, peak in PEAK_TFLOPS.items() if key in device_name), None)


def training_flops(config: ModelConfig, vocabulary_size: int, tokens: float, attention_pairs: float) -> float:
    """Floating-point operations of forward and backward, recomputation not counted.

    Six for each weight of a matrix and token, and twelve for each (query, key) pair, channel and layer: four
    in the forward pass (scores and values), twice that in the backward pass.

    Args:
        config: Shape of the decoder.
        vocabulary_size: Ids in use; rows of padding do no useful work.
        tokens: Tokens that went through the model.
        attention_pairs: Pairs under the causal document mask, of one layer and head.
    """
    channels = config.num_attention_heads * config.head_size
    body = config.num_layers * layer_matrix_parameters(config)
    output = vocabulary_size * config.hidden_size
    return 6.0 * tokens * (body + output) + 12.0 * attention_pairs * channels * config.num_layers


def layer_matrix_parameters(config: ModelConfig) -> int:
    """Weights in the matrices of one layer: query, key, value, projection, gate, up, down."""
    query = config.num_attention_heads * config.head_size
    key_value = 2 * config.num_query_groups * config.head_size
    return config.hidden_size * (2 * query + key_value + 3 * config.ffn_hidden_size)
