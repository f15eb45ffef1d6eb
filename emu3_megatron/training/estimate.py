"""The arithmetic of a run before it starts: batch, parameters, memory of a rank."""

from __future__ import annotations

from dataclasses import dataclass

from emu3_megatron.training.config import TrainingConfig
from emu3_megatron.training.throughput import layer_matrix_parameters, training_flops

GIB = 2**30
MIB = 2**20
BYTES_FP32 = 4
LOSS_CHUNK_BYTES = 3 * 16 * 2**20
"""Logits of a chunk in the compute type, in fp32, and their gradient, at the default chunk size."""


@dataclass(frozen=True)
class Memory:
    """Bytes of the fullest rank."""

    weights: float
    gradients: float
    optimizer: float
    activations: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.activations


def describe(
    config: TrainingConfig, world_size: int, vocabulary_size: int | None, padded_size: int | None
) -> str:
    """Readable lines: layout, tokens a step, parameters, operations, memory.

    Args:
        config: The resolved configuration.
        world_size: Processes.
        vocabulary_size: Ids in use, or None while the datasets do not exist.
        padded_size: Rows of embedding and output layer, or None.
    """
    parallel, trainer, data = config.parallel, config.trainer, config.data
    ranks = parallel.data_parallel_size(world_size)
    tokens = trainer.global_batch_size * data.context_length
    lines = [
        f"layout            {world_size} processes = tensor {parallel.tensor_model_parallel_size} x pipeline "
        f"{parallel.pipeline_model_parallel_size} x context {parallel.context_parallel_size} x data {ranks}",
        f"a step            {trainer.global_batch_size} windows x {data.context_length} "
        f"tokens = {tokens:,} tokens, "
        f"in {trainer.global_batch_size // (ranks * trainer.micro_batch_size)} micro-batches a rank",
        f"the run           {trainer.steps:,} steps = {trainer.steps * tokens:,} tokens",
    ]
    if vocabulary_size is None or padded_size is None:
        return "\n".join(
            [*lines, "vocabulary        unknown until the datasets exist; parameters and memory too"]
        )
    parameters = config.model.parameter_count(padded_size)
    memory = rank_memory(config, ranks, padded_size)
    # An upper bound: every window one document.
    pairs = trainer.global_batch_size * data.context_length**2 / 2
    flops = training_flops(config.model, vocabulary_size, tokens, pairs)
    return "\n".join(
        [
            *lines,
            f"vocabulary        {vocabulary_size:,} ids in {padded_size:,} rows",
            f"parameters        {parameters:,}",
            f"operations        {flops / 1e12:,.3f} TFLOP a step, if every window is one document",
            f"memory of a rank  {readable(memory.total)} = weights {readable(memory.weights)} + gradients "
            f"{readable(memory.gradients)} + optimizer {readable(memory.optimizer)} + activations, about "
            f"{readable(memory.activations)}; libraries and communication buffers come on top",
        ]
    )


def readable(size: float) -> str:
    """Bytes in GiB, or in MiB below one."""
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / MIB:.1f} MiB"


def rank_memory(config: TrainingConfig, data_ranks: int, padded_size: int) -> Memory:
    """Memory of the fullest rank: the first or last pipeline stage, which has a vocabulary matrix too."""
    model, parallel = config.model, config.parallel
    stages = parallel.pipeline_model_parallel_size
    vocabulary = padded_size * model.hidden_size * (2 if stages == 1 else 1)
    body = max(parallel.stage_layers(model.num_layers)) * (
        layer_matrix_parameters(model) + 2 * model.hidden_size
    )
    held = (vocabulary + body) / parallel.tensor_model_parallel_size
    half = config.trainer.precision == "bf16"
    shards = data_ranks * parallel.context_parallel_size if config.optimizer.use_distributed_optimizer else 1
    # Two moments; a bf16 run has fp32 master weights besides, and so has an fp32 run with a distributed
    # optimizer.
    states = 3 if half or config.optimizer.use_distributed_optimizer else 2
    average = held * BYTES_FP32 if config.ema.decay else 0.0
    return Memory(
        weights=held * (2 if half else BYTES_FP32) + average,
        gradients=held * BYTES_FP32,
        optimizer=held * states * BYTES_FP32 / shards,
        activations=activation_bytes(config),
    )


def activation_bytes(config: TrainingConfig) -> float:
    """What forward keeps for backward on the first stage, and the loss's chunk of logits.

    Counted per token and layer: what the norms, projections, attention and the gated feed-forward layer save.
    With full recomputation a layer keeps its input, and one layer is expanded at a time. The first of P
    pipeline stages holds P micro-batches.
    """
    model, parallel = config.model, config.parallel
    width = 2 if config.trainer.precision == "bf16" else BYTES_FP32
    tensor = parallel.tensor_model_parallel_size
    spread = tensor if parallel.sequence_parallel else 1
    heads = model.head_size * (2 * model.num_attention_heads + 2 * model.num_query_groups)
    layer = width * (6 * model.hidden_size / spread + (heads + 4 * model.ffn_hidden_size) / tensor)
    layers = max(parallel.stage_layers(model.num_layers))
    per_token = layer * layers
    if model.recompute == "full":
        per_token = width * model.hidden_size / spread * layers + layer
    tokens = config.trainer.micro_batch_size * config.data.context_length / parallel.context_parallel_size
    return per_token * tokens * parallel.pipeline_model_parallel_size + LOSS_CHUNK_BYTES
