"""How long a step takes, and which layout of a cluster is fastest: a model with stated assumptions.

It counts operations and bytes; it knows nothing of kernels. It is for comparing layouts, and for seeing
which of compute, bubble and communication dominates, before anything is run.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

from emu3_megatron.errors import UserError
from emu3_megatron.parallel.config import ParallelConfig
from emu3_megatron.training.command_line import check_layout
from emu3_megatron.training.config import TrainingConfig
from emu3_megatron.training.estimate import Memory, adapter_parameters, rank_memory
from emu3_megatron.training.throughput import layer_matrix_parameters


@dataclass(kw_only=True)
class Cluster:
    """The assumptions about the machines."""

    processes: int
    """Devices."""
    devices_per_node: int = 8
    """Devices joined by the fast links."""
    memory_gib: float = 80.0
    """Memory of a device."""
    reserve_gib: float = 6.0
    """Of it, for the driver, communication buffers and fragmentation."""
    peak_tflops: float = 989.0
    """Dense peak of a device in the run's precision (H100: 989 in bf16)."""
    efficiency: float = 0.55
    """Share of the peak that matrix products and attention reach."""
    node_gbytes: float = 350.0
    """Bandwidth of a device to others of its node, GB/s in one direction (NVLink 4: 450 peak)."""
    network_gbytes: float = 40.0
    """Bandwidth of a device to other nodes, GB/s in one direction (400 Gbit/s: 50 peak)."""

    def __post_init__(self) -> None:
        """Check ranges."""
        for field in fields(self):
            if getattr(self, field.name) <= 0 and field.name != "reserve_gib":
                raise UserError(f"{field.name}={getattr(self, field.name)} must be positive")

    def bandwidth(self, span: int) -> float:
        """Bytes per second within a group whose ranks lie in `span` neighbouring devices."""
        return 1e9 * (self.node_gbytes if span <= self.devices_per_node else self.network_gbytes)


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step; the parts add up."""

    compute: float
    """The slowest pipeline stage at work, recomputation included."""
    bubble: float
    """That stage waiting for the pipeline to fill and drain."""
    tensor: float
    """Collectives of tensor parallelism, not overlapped."""
    context: float
    """Keys and values exchanged by context parallelism, not overlapped."""
    data: float
    """Gradients and parameters over data-parallel ranks, as far as they are not overlapped."""

    @property
    def total(self) -> float:
        """All of it."""
        return self.compute + self.bubble + self.tensor + self.context + self.data


@dataclass(frozen=True)
class Choice:
    """A layout with what it costs."""

    config: TrainingConfig
    memory: Memory
    time: StepTime


def step_time(
    config: TrainingConfig, cluster: Cluster, vocabulary_size: int, document_tokens: float | None = None
) -> StepTime:
    """Predict a step.

    Args:
        config: The run.
        cluster: The machines.
        vocabulary_size: Ids in use.
        document_tokens: Typical length of a document, which bounds attention; None: every window is one
            document, which is the most it can cost.
    """
    parallel, trainer, model = config.parallel, config.trainer, config.model
    tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    context = parallel.context_parallel_size
    data = parallel.data_parallel_size(cluster.processes)
    micro_batches = trainer.global_batch_size // (data * trainer.micro_batch_size)
    tokens = trainer.micro_batch_size * config.data.context_length / context
    length = min(document_tokens or config.data.context_length, config.data.context_length)
    channels = model.num_attention_heads * model.head_size
    attention = 6.0 * length * channels * tokens / tensor
    products = 6.0 * layer_matrix_parameters(model) * tokens / tensor
    again = {"none": 0.0, "selective": attention / 3, "full": (attention + products) / 3}[model.recompute]
    frozen = config.frozen_copies * (attention + products) / 3  # forward alone
    # Forward, and gradients of activations and of weights; frozen weights have none.
    share = 2 / 3 if config.lora.rank else 1.0
    layer = attention + products * share + again + frozen
    output = 6.0 * vocabulary_size * model.hidden_size * tokens / tensor * (share + config.frozen_copies / 3)
    *earlier, last = parallel.stage_layers(model.num_layers)
    stage = max([*earlier, last + output / layer]) * layer
    seconds = stage / (cluster.peak_tflops * 1e12 * cluster.efficiency)
    idle = (pipeline - 1) / (parallel.virtual_pipeline_model_parallel_size or 1)
    return StepTime(
        compute=micro_batches * seconds,
        bubble=idle * seconds,
        tensor=micro_batches * _tensor_seconds(config, cluster, tokens),
        context=micro_batches * _context_seconds(config, cluster, tokens),
        data=_data_seconds(config, cluster, data, vocabulary_size),
    )


def _tensor_seconds(config: TrainingConfig, cluster: Cluster, tokens: float) -> float:
    """Of one micro-batch: in every layer two all-reduces (or gather and scatter) forward and two backward."""
    size = config.parallel.tensor_model_parallel_size
    width = _width(config)
    layers = max(config.parallel.stage_layers(config.model.num_layers))
    # A ring all-reduce sends every byte twice, less the own share.
    volume = 4 * layers * 2 * (size - 1) / size * tokens * config.model.hidden_size * width
    return volume / cluster.bandwidth(size)


def _context_seconds(config: TrainingConfig, cluster: Cluster, tokens: float) -> float:
    """Of one micro-batch: keys and values gathered in forward, their gradients scattered in backward."""
    size = config.parallel.context_parallel_size
    tensor = config.parallel.tensor_model_parallel_size
    layers = max(config.parallel.stage_layers(config.model.num_layers))
    held = 2 * config.model.num_query_groups * config.model.head_size / tensor * tokens * _width(config)
    return 2 * layers * held * (size - 1) / cluster.bandwidth(size * tensor)


def _data_seconds(config: TrainingConfig, cluster: Cluster, data: int, vocabulary_size: int) -> float:
    """Gradients scattered (fp32) and parameters gathered, or gradients reduced on every rank."""
    parallel, model = config.parallel, config.model
    size = data * parallel.context_parallel_size
    vocabularies = 2 if parallel.pipeline_model_parallel_size == 1 else 1
    body = max(parallel.stage_layers(model.num_layers)) * layer_matrix_parameters(model)
    held = body + vocabularies * vocabulary_size * model.hidden_size
    if config.lora.rank:
        held = adapter_parameters(config, max(parallel.stage_layers(model.num_layers)))
    sharded = config.optimizer.use_distributed_optimizer
    gradients = 0.0 if config.optimizer.overlap_grad_reduce else 4.0 * (1 if sharded else 2)
    weights = 0.0 if config.optimizer.overlap_param_gather or not sharded else _width(config)
    span = size * parallel.tensor_model_parallel_size
    held_bytes = held / parallel.tensor_model_parallel_size * (gradients + weights)
    return held_bytes * (size - 1) / size / cluster.bandwidth(span)


def _width(config: TrainingConfig) -> int:
    return 2 if config.trainer.precision == "bf16" else 4


def search(
    config: TrainingConfig,
    cluster: Cluster,
    vocabulary_size: int,
    padded_size: int,
    document_tokens: float | None = None,
) -> list[Choice]:
    """Every layout that the run can have on the cluster and that fits its memory, fastest first.

    Tried: tensor parallelism within a node, with sequence parallelism; pipeline, interleaved too; context
    parallelism; micro-batches of 1, 2 and 4 windows; recomputation of nothing, of attention, of everything.
    """
    limit = (cluster.memory_gib - cluster.reserve_gib) * 2**30
    found = []
    for candidate in _candidates(config, cluster):
        try:
            check_layout(candidate, cluster.processes)
        except ValueError:
            continue
        data = candidate.parallel.data_parallel_size(cluster.processes)
        memory = rank_memory(candidate, data, padded_size, document_tokens)
        if memory.total <= limit:
            time = step_time(candidate, cluster, vocabulary_size, document_tokens)
            found.append(Choice(candidate, memory, time))
    return sorted(found, key=lambda choice: choice.time.total)


def _candidates(config: TrainingConfig, cluster: Cluster) -> Iterator[TrainingConfig]:
    degrees = [2**power for power in range(12) if 2**power <= cluster.processes]
    tensors = [degree for degree in degrees if degree <= cluster.devices_per_node]
    for tensor, pipeline, virtual, context, micro, recompute in itertools.product(
        tensors, degrees, (None, 2, 4), degrees, (1, 2, 4), ("none", "selective", "full")
    ):
        if tensor * pipeline * context > cluster.processes or (virtual and pipeline == 1):
            continue
        candidate = copy.deepcopy(config)
        candidate.parallel = ParallelConfig(
            tensor_model_parallel_size=tensor,
            pipeline_model_parallel_size=pipeline,
            virtual_pipeline_model_parallel_size=virtual,
            context_parallel_size=context,
            sequence_parallel=tensor > 1,
            cp_comm=config.parallel.cp_comm,
        )
        candidate.trainer = replace(config.trainer, micro_batch_size=micro)
        candidate.model = replace(config.model, recompute=recompute)  # type: ignore[arg-type]
        yield candidate
