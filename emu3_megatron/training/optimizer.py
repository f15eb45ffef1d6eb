"""AdamW through megatron-core: plain or distributed, with our schedule and an update that can be left out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

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
        config: Adam, clipping, sharding.
        precision: Precision of the model's parameters.
    """

    def __init__(self, chunks: Sequence[Any], config: OptimizerConfig, precision: Precision) -> None:
        from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
        from megatron.core.optimizer import get_megatron_optimizer

        bf16 = precision == "bf16"
        self._chunks = list(chunks)
        self._clip = config.clip_grad
        self._weight_decay = config.weight_decay
        self.megatron = get_megatron_optimizer(
            MegatronOptimizerConfig(
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
            ),
            self._chunks,
            use_gloo_process_groups=torch.distributed.get_backend() == "nccl",
        )

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

    def buffered_parameters(self) -> list[torch.nn.Parameter]:
        """The model's parameters in the order in which the distributed optimizer numbers its states."""
        return [
            parameter
            for part in self.megatron.chained_optimizers
            for buffer in part.buffers
            for parameter in buffer.param_index_map
        ]

    def _clip_to(self, gradient_norm: float) -> None:
        from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

        # Without this test every gradient would be listed only to find that nothing is to be done.
        if 0 < self._clip < gradient_norm:
            for part in self.megatron.chained_optimizers:
                parameters = part.get_parameters()
                if parameters:
                    clip_grad_by_total_norm_fp32(parameters, self._clip, gradient_norm)
