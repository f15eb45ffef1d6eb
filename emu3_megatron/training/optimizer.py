"""AdamW or Muon through megatron-core, with our schedule and an update that can be left out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from emu3_megatron.muon import FusedMaps, Muon
from emu3_megatron.training.config import OptimizerConfig, Precision


def wrap_for_data_parallelism(
    chunks: Sequence[Any], config: OptimizerConfig, on_gradients: Callable[[], None] | None = None
) -> list[Any]:
    """Give every chunk megatron-core's gradient buffers (fp32) and its data-parallel reduction.

    Gradients are summed over ranks, not averaged: the loss is already divided by the global sum of weights.

    Args:
        chunks: The model's chunks on this rank.
        config: Sharding and overlap.
        on_gradients: Called once a step when this rank has its own gradients, before they are reduced.
    """
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=config.use_distributed_optimizer,
        overlap_grad_reduce=config.overlap_grad_reduce,
        overlap_param_gather=config.overlap_param_gather,
    )
    wrapped = [
        DistributedDataParallel(chunk.config, ddp, chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(chunks)
    ]
    _connect_schedule(wrapped, config, on_gradients)
    return wrapped


def _connect_schedule(
    wrapped: Sequence[Any], config: OptimizerConfig, on_gradients: Callable[[], None] | None
) -> None:
    """Tell megatron-core's schedules how to finish gradients, and when not to reduce them."""
    from megatron.core.distributed import finalize_model_grads

    def finalize(model: list[torch.nn.Module], _num_tokens: object, **groups: object) -> None:
        if on_gradients is not None:
            on_gradients()
        # The count would divide gradients once more; ours are already divided by the sum of weights.
        finalize_model_grads(model, None, **groups)

    settings: dict[str, Any] = {"finalize_model_grads_func": finalize}
    if config.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in wrapped]
        settings["no_sync_func"] = no_sync if len(no_sync) > 1 else no_sync[0]
    for chunk in wrapped:
        for name, value in settings.items():
            setattr(chunk.config, name, value)


class Optimizer:
    """One optimizer step in two halves, so that a harmful update can be left out between them.

    Args:
        chunks: Wrapped chunks of this rank.
        config: Kind, clipping, sharding.
        precision: Precision of the model's parameters.
    """

    def __init__(self, chunks: Sequence[Any], config: OptimizerConfig, precision: Precision) -> None:
        self._chunks = list(chunks)
        self._clip = config.clip_grad
        self._weight_decay = config.weight_decay
        make = _make_with_muon if config.kind == "muon" else _make
        self.megatron = make(self._chunks, config, precision)

    def zero_gradients(self) -> None:
        """Clear buffers before a step's first micro-batch."""
        for chunk in self._chunks:
            chunk.zero_grad_buffer()
        self.megatron.zero_grad()

    def gradient_norm(self) -> float:
        """Bring gradients to the main parameters; their global norm, the same on all ranks."""
        self.megatron.prepare_grads()
        return float(self.megatron.get_grad_norm())

    def update(self, gradient_norm: float, learning_rate: float) -> None:
        """Clip to the configured norm and take the step."""
        for group in self.megatron.param_groups:
            group["lr"] = learning_rate * group["lr_mult"]
            group["weight_decay"] = self._weight_decay * group["wd_mult"]
        self._clip_to(gradient_norm)
        self.megatron.step_with_ready_grads()

    @property
    def parts(self) -> list[Any]:
        """megatron-core's optimizers, each of some of the weights."""
        return list(self.megatron.chained_optimizers)

    def _clip_to(self, gradient_norm: float) -> None:
        from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

        # Without this test every gradient would be listed only to find that nothing is to be done.
        if 0 < self._clip < gradient_norm:
            for part in self.parts:
                parameters = part.get_parameters()
                if parameters:
                    clip_grad_by_total_norm_fp32(parameters, self._clip, gradient_norm)


def buffered_parameters(part: Any) -> list[nn.Parameter]:
    """The model's parameters in the order in which a distributed optimizer numbers its states."""
    return [parameter for buffer in part.buffers for parameter in buffer.param_index_map]


def _make(chunks: list[Any], config: OptimizerConfig, precision: Precision) -> Any:
    """megatron-core's Adam over the parameters that need gradients, a `ChainedOptimizer`."""
    return _make_chain(chunks, _megatron_config(config, precision))


def _megatron_config(config: OptimizerConfig, precision: Precision) -> Any:
    from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig

    bf16 = precision == "bf16"
    return MegatronOptimizerConfig(
        optimizer="adam",
        lr=config.learning_rate,
        min_lr=config.min_learning_rate,
        weight_decay=config.weight_decay,
        adam_beta1=config.beta1,
        adam_beta2=config.beta2,
        adam_eps=config.epsilon,
        clip_grad=config.clip_grad,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=config.use_distributed_optimizer,
        overlap_param_gather=config.overlap_param_gather,
    )


def _make_chain(chunks: list[Any], config: Any) -> Any:
    from megatron.core.optimizer import get_megatron_optimizer

    return get_megatron_optimizer(
        config, chunks, use_gloo_process_groups=torch.distributed.get_backend() == "nccl"
    )


def _make_with_muon(chunks: list[Any], config: OptimizerConfig, precision: Precision) -> Any:
    """Muon for the matrices of the decoder's layers and Adam for all else, chained.

    megatron-core's own Muon needs a package that no registry has. Its wrappers (master weights, checkpoints)
    take any optimizer, though: here they are made around one of its own, which Muon then replaces.
    """
    from megatron.core import parallel_state
    from megatron.core.optimizer import ChainedOptimizer

    matrices = {
        weight: name
        for chunk in chunks
        for name, weight in chunk.named_parameters()
        if weight.requires_grad
        and weight.dim() == 2
        and not getattr(weight, "is_embedding_or_output_parameter", False)
    }
    others = [
        weight
        for chunk in chunks
        for weight in chunk.parameters()
        if weight.requires_grad and weight not in matrices
    ]
    settings = _megatron_config(config, precision)  # one for all parts, as the chain demands
    with _frozen(others):
        muon = _make_chain(chunks, settings).chained_optimizers
    with _frozen(list(matrices)):
        adam = _make_chain(chunks, settings).chained_optimizers
    fused = {weight: _fused_maps(name, weight, chunks[0].config) for weight, name in matrices.items()}
    for part in muon:
        if part.optimizer is None:
            continue
        for group in part.param_groups:
            group["lr_mult"] = config.muon_rate
        trained = _trained_weights(part)
        part.optimizer = Muon(
            part.param_groups,
            momentum=config.muon_momentum,
            fused={trained.get(weight, weight): maps for weight, maps in fused.items() if maps is not None},
            tensor_parallel_group=parallel_state.get_tensor_model_parallel_group()
            if parallel_state.get_tensor_model_parallel_world_size() > 1
            else None,
        )
        part.init_state_fn = lambda optimizer, _config=None: optimizer.make_state()
    return ChainedOptimizer([*muon, *adam])


@contextmanager
def _frozen(weights: Sequence[nn.Parameter]) -> Iterator[None]:
    """Hide weights from megatron-core's search for what to train."""
    for weight in weights:
        weight.requires_grad = False
    try:
        yield
    finally:
        for weight in weights:
            weight.requires_grad = True


def _trained_weights(part: Any) -> dict[Tensor, Tensor]:
    """The fp32 master of each bf16 weight; empty where the weights themselves are trained."""
    model = chain.from_iterable(getattr(part, "float16_groups", ()))
    masters = chain.from_iterable(getattr(part, "fp32_from_float16_groups", ()))
    return dict(zip(model, masters, strict=True))


def _fused_maps(name: str, weight: Tensor, model: Any) -> FusedMaps | None:
    """The maps that megatron-core keeps in one weight of a layer; None where it is a single one."""
    if name.endswith("linear_qkv.weight"):
        head = model.kv_channels
        queries = model.num_attention_heads // model.num_query_groups * head
        return FusedMaps(weight.size(0) // (queries + 2 * head), (queries, head, head))
    if name.endswith("linear_fc1.weight") and model.gated_linear_unit:
        return FusedMaps(1, (weight.size(0) // 2,) * 2)
    return None
