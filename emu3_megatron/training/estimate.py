"""The arithmetic of a run before it starts: batch, parameters, memory of a rank."""

from __future__ import annotations

from dataclasses import dataclass, replace

from emu3_megatron.model.loss import LEAST_FUSED_WEIGHTS, default_chunk_size
from emu3_megatron.parallel import platform
from emu3_megatron.training.config import TrainingConfig
from emu3_megatron.training.throughput import layer_matrix_parameters, training_flops

GIB = 2**30
MIB = 2**20
BYTES_FP32 = 4

CPU_ALLOCATOR = 96 * MIB
"""Freed blocks that glibc's malloc holds on a CPU. Blocks of more than 32 MiB go back to the system at once;
smaller ones, above all the 16 MiB of a chunk of logits, leave holes in the heap, so that this does not grow
with the model. Measured in six layouts with 247 to 475 MiB in use: 76 to 122 MiB."""

CPU_CODE = 25 * MIB
"""Pages of libtorch and of its kernels that the first step reads in, and small objects: 24 and 26 MiB in the
same layouts. What imports take comes on top."""


@dataclass(frozen=True)
class Memory:
    """Bytes of the fullest rank."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    allocator: float = 0.0
    """Freed blocks that the allocator does not give back; counted on a CPU only."""
    code: float = 0.0
    """Code that the first step reads in; counted on a CPU only."""

    @property
    def in_use(self) -> float:
        """What tensors take."""
        return self.weights + self.gradients + self.optimizer + self.activations

    @property
    def total(self) -> float:
        """All of it."""
        return self.in_use + self.allocator + self.code


def on_platform(config: TrainingConfig) -> TrainingConfig:
    """The run with the platform that ``auto`` comes to on this machine: the CPU only where there is no sign
    of an NVIDIA driver, as when it is started."""
    if config.platform != "auto":
        return config
    try:
        name = platform.choose()
    except platform.PlatformError:  # a GPU that cannot be used now
        name = "cuda"
    return replace(config, platform=name)


def describe(
    config: TrainingConfig,
    world_size: int,
    vocabulary_size: int | None,
    padded_size: int | None,
    document_tokens: float | None = None,
) -> str:
    """Readable lines: platform, layout, tokens a step, parameters, operations, memory.

    Args:
        config: The resolved configuration.
        world_size: Processes.
        vocabulary_size: Ids in use, or None while the datasets do not exist.
        padded_size: Rows of embedding and output layer, or None.
        document_tokens: See `rank_memory`.
    """
    parallel, trainer, data = config.parallel, config.trainer, config.data
    asked, config = config.platform, on_platform(config)
    ranks = parallel.data_parallel_size(world_size)
    tokens = trainer.global_batch_size * data.context_length
    lines = [
        f"platform          {config.platform}{_CHOSEN[config.platform] if asked == 'auto' else ''}",
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
    parameters = f"{config.model.parameter_count(padded_size):,}"
    if config.lora.rank:
        parameters += f", frozen, and {adapter_parameters(config):,} in adapters, which are trained"
    memory = rank_memory(config, ranks, padded_size, document_tokens)
    # An upper bound: every window one document.
    pairs = trainer.global_batch_size * data.context_length**2 / 2
    flops = training_flops(config.model, vocabulary_size, tokens, pairs)
    return "\n".join(
        [
            *lines,
            f"vocabulary        {vocabulary_size:,} ids in {padded_size:,} rows",
            f"parameters        {parameters}",
            f"operations        {flops / 1e12:,.3f} TFLOP a step, if every window is one document",
            f"memory of a rank  {readable(memory.total)} = weights {readable(memory.weights)} + gradients "
            f"{readable(memory.gradients)} + optimizer {readable(memory.optimizer)} + activations, about "
            f"{readable(memory.activations)}{_of_a_cpu(memory)}; libraries and communication buffers come "
            "on top",
        ]
    )


_CHOSEN = {
    "cpu": " (auto: this machine has no NVIDIA driver; for GPUs give --platform cuda)",
    "cuda": " (auto: this machine has an NVIDIA driver)",
}
"""Why a platform was assumed that the run does not name."""


def adapter_parameters(config: TrainingConfig, layers: int | None = None, tensor: int = 1) -> int:
    """Numbers in the adapters (LoRA) of `layers` layers (all by default) on one of `tensor` tensor-parallel
    ranks; 0 without adapters."""
    model, lora = config.model, config.lora
    if not lora.rank:
        return 0
    query = model.num_attention_heads * model.head_size
    key_value = 2 * model.num_query_groups * model.head_size
    # What is split over ranks, and what is not: the outputs of column-, the inputs of row-parallel layers.
    sizes = {
        "linear_qkv": (query + key_value, model.hidden_size),
        "linear_proj": (query, model.hidden_size),
        "linear_fc1": (2 * model.ffn_hidden_size, model.hidden_size),
        "linear_fc2": (model.ffn_hidden_size, model.hidden_size),
    }
    layer = lora.rank * sum(sizes[name][0] // tensor + sizes[name][1] for name in lora.targets)
    return layer * (model.num_layers if layers is None else layers)


def _of_a_cpu(memory: Memory) -> str:
    """The terms that only a CPU has."""
    if not memory.code:
        return ""
    return f" + allocator {readable(memory.allocator)} + code {readable(memory.code)}"


def readable(size: float) -> str:
    """Bytes in GiB, or in MiB below one."""
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / MIB:.1f} MiB"


def rank_memory(
    config: TrainingConfig, data_ranks: int, padded_size: int, document_tokens: float | None = None
) -> Memory:
    """Memory of the fullest rank: of the first pipeline stage, which holds the embedding and the most
    micro-batches, or of the last, which holds the output layer. With ``platform: cpu``, of the process above
    what imports take.

    Args:
        config: The run; ``platform: auto`` counts as a GPU, see `on_platform`.
        data_ranks: Data-parallel degree.
        padded_size: Rows of the embedding and the output layer.
        document_tokens: Typical length of a document, which on a CPU bounds what attention keeps where it
            has dropout; None: every window is one document.
    """
    stages = config.parallel.pipeline_model_parallel_size
    length = min(document_tokens or config.data.context_length, config.data.context_length)
    both = [_stage_memory(config, stage, data_ranks, padded_size, length) for stage in {0, stages - 1}]
    return max(both, key=lambda memory: memory.total)


def _stage_memory(
    config: TrainingConfig, stage: int, data_ranks: int, padded_size: int, length: float
) -> Memory:
    model, parallel = config.model, config.parallel
    stages = parallel.pipeline_model_parallel_size
    ends = (stage == 0) + (stage == stages - 1)
    layers = parallel.stage_layers(model.num_layers)[stage]
    body = layers * (layer_matrix_parameters(model) + 2 * model.hidden_size)
    vocabulary = ends * padded_size * model.hidden_size
    held = (vocabulary + body) / parallel.tensor_model_parallel_size
    half = config.trainer.precision == "bf16"
    shards = data_ranks * parallel.context_parallel_size if config.optimizer.use_distributed_optimizer else 1
    adapters = adapter_parameters(config, layers, parallel.tensor_model_parallel_size)
    trained = adapters if config.lora.rank else held
    # Adam has two moments of every weight, Muon one of the matrices inside layers.
    one_moment = adapters or layers * layer_matrix_parameters(model) / parallel.tensor_model_parallel_size
    moments = 2 * trained - (one_moment if config.optimizer.kind == "muon" else 0)
    masters = trained if half else 0  # fp32, where the weights are not
    average = (held + adapters) * BYTES_FP32 if config.ema.decay else 0.0
    copies = 1 + config.frozen_copies
    memory = Memory(
        weights=(held * copies + adapters) * (2 if half else BYTES_FP32) + average,
        gradients=trained * BYTES_FP32,
        optimizer=(moments + masters) * BYTES_FP32 / shards,
        activations=activation_bytes(config, stage, padded_size, length),
    )
    if config.platform != "cpu":
        return memory
    return replace(memory, allocator=min(CPU_ALLOCATOR, memory.in_use), code=CPU_CODE)


def activation_bytes(config: TrainingConfig, stage: int, padded_size: int, length: float) -> float:
    """What forward keeps for backward on a stage, and the largest working set beside it.

    Counted per token and layer: what the norms, projections, attention and the gated feed-forward layer save.
    With full recomputation a layer keeps its input, and one layer is expanded at a time.

    Args:
        config: The run.
        stage: Pipeline stage from 0.
        padded_size: Rows of the output layer.
        length: Tokens of a document.
    """
    model, parallel = config.model, config.parallel
    width = 2 if config.trainer.precision == "bf16" else BYTES_FP32
    tensor = parallel.tensor_model_parallel_size
    spread = tensor if parallel.sequence_parallel else 1
    residual = width * model.hidden_size / spread
    layer = _layer_bytes(config, width)
    dropped = _dropped_attention_bytes(config, width, length)
    backward = 3 * residual + width * 5 * model.ffn_hidden_size / tensor
    layers = parallel.stage_layers(model.num_layers)[stage]
    kept, expanded, again = (layer + dropped.kept) * layers, 0.0, 0.0
    if model.recompute == "selective":
        kept, again = layer * layers, dropped.kept
    elif model.recompute == "full":
        kept, expanded = residual * layers, layer + dropped.kept
    tokens = config.trainer.micro_batch_size * config.data.context_length / parallel.context_parallel_size
    working = (max(backward, dropped.backward + again) + expanded) * tokens
    if stage == parallel.pipeline_model_parallel_size - 1:
        kept += 3 * residual  # the last norm's output, its gradient, and the gathered hidden states
        working = max(working, _loss_bytes(config, padded_size / tensor, width))
    return kept * tokens * _micro_batches_held(config, stage) + working


def _layer_bytes(config: TrainingConfig, width: int) -> float:
    """What a layer keeps of a token, attention's probabilities apart."""
    model, tensor = config.model, config.parallel.tensor_model_parallel_size
    spread = tensor if config.parallel.sequence_parallel else 1
    residual = model.hidden_size / spread
    heads = model.head_size * (2 * model.num_attention_heads + 2 * model.num_query_groups)
    # Two norms keep input and output; the gated layer keeps both halves and their product.
    layer = width * (4 * residual + (heads + 3 * model.ffn_hidden_size) / tensor)
    if model.hidden_dropout:
        layer += 2 * residual  # masks of a byte
    if config.lora.rank and config.lora.dropout:
        inputs = {
            "linear_qkv": residual,
            "linear_proj": model.num_attention_heads * model.head_size / tensor,
            "linear_fc1": residual,
            "linear_fc2": model.ffn_hidden_size / tensor,
        }
        layer += (width + 1) * sum(inputs[name] for name in config.lora.targets)  # and a mask
    return layer


@dataclass(frozen=True)
class _DroppedAttention:
    """Bytes for each token that asks, of one layer."""

    kept: float = 0.0
    """For backward."""
    backward: float = 0.0
    """At a time in backward, besides."""


def _dropped_attention_bytes(config: TrainingConfig, width: int, length: float) -> _DroppedAttention:
    """What attention with dropout holds on a CPU: whole matrices of probabilities.

    Kernels of a GPU, and a CPU's without dropout, have none.
    """
    model, parallel = config.model, config.parallel
    if config.platform != "cpu" or not model.attention_dropout:
        return _DroppedAttention()
    heads = model.num_attention_heads / parallel.tensor_model_parallel_size
    # The softmax in fp32, its product with the mask, the mask; scaled queries and repeated keys and values.
    kept = heads * length * (BYTES_FP32 + width + 1)
    kept += heads * model.head_size * width * (1 + 2 * parallel.context_parallel_size)
    return _DroppedAttention(kept, backward=heads * length * 2 * BYTES_FP32)


def _loss_bytes(config: TrainingConfig, rows: float, width: int) -> float:
    """A chunk of logits, and the output layer's own gradient where it does not go to the buffer at once."""
    chunk = config.loss.chunk_size or default_chunk_size(int(rows), cuda=config.platform != "cpu")
    logits = chunk * rows * (BYTES_FP32 if width == BYTES_FP32 else BYTES_FP32 + 2 * width)
    weights = 0 if config.lora.rank else rows * config.model.hidden_size
    if weights < LEAST_FUSED_WEIGHTS:
        return logits + 2 * BYTES_FP32 * weights
    return logits + (0 if width == BYTES_FP32 else (width + BYTES_FP32) * weights)


def _micro_batches_held(config: TrainingConfig, stage: int) -> float:
    """Micro-batches whose activations a stage holds at once, in units of all its layers."""
    parallel, trainer = config.parallel, config.trainer
    stages, groups = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size
    if stages == 1:
        return 1.0
    if groups is None:
        return float(min(stages - stage, trainer.global_batch_size // trainer.micro_batch_size))
    return ((stages - stage - 1) * 2 + (groups - 1) * stages + 1) / groups
