"""RMSNorm, feed-forward and output layers, and the layer specification."""

from __future__ import annotations

import copy
from importlib.metadata import version
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

from emu3_megatron.model.attention import PackedAttention, PackedSelfAttention
from emu3_megatron.model.config import ModelConfig, ModelConfigError
from emu3_megatron.model.loss import (
    LEAST_FUSED_WEIGHTS,
    TokenLosses,
    WeightedLoss,
    vocabulary_parallel_linear_cross_entropy,
    weighted_linear_cross_entropy,
)
from emu3_megatron.parallel.config import ParallelConfig


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm, computed in fp32.

    Unlike megatron-core's wrapper of the torch norm it may run under sequence parallelism: its weight is
    marked so that the gradient is summed over the tensor-parallel group.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **unused: object) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise the last dimension of `x`."""
        return _RMSNormFunction.apply(x, self.weight, self.eps)


class _RMSNormFunction(torch.autograd.Function):
    """Few passes over memory: on CPU torch's composite form makes twice as many."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        wide = x.float()
        inverse = (
            torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.size(-1)).add_(eps).rsqrt_()
        )
        ctx.save_for_backward(x, weight, inverse)
        return (wide * inverse).to(x.dtype).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        x, weight, inverse = ctx.saved_tensors
        gradient, wide, scale = gradients[0].float(), x.float(), weight.float()
        product = gradient * wide
        weight_gradient = product.flatten(0, -2).t() @ inverse.flatten()
        coefficient = (product @ scale).unsqueeze(-1).mul_(inverse).mul_(inverse).mul_(inverse)
        result = (gradient * scale).mul_(inverse).addcmul_(wide, coefficient.div_(x.size(-1)), value=-1)
        return result.to(x.dtype), weight_gradient.to(weight.dtype), None


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up over the halves of the last dimension; only the input is kept for backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        gate, up = x.chunk(2, -1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (x,) = ctx.saved_tensors
        gate, up = x.chunk(2, -1)
        result = torch.empty_like(x)
        gate_gradient, up_gradient = result.chunk(2, -1)
        torch.mul(gradients[0], F.silu(gate), out=up_gradient)
        torch.mul(gradients[0], up, out=gate_gradient)
        torch.ops.aten.silu_backward.grad_input(gate_gradient, gate, grad_input=gate_gradient)
        return result


class GatedFeedForward(MLP):
    """megatron-core's MLP with the gated activation as one operation."""

    def __init__(self, config: Any, **unused: object) -> None:
        submodules = MLPSubmodules(
            linear_fc1=tensor_parallel.ColumnParallelLinear, linear_fc2=tensor_parallel.RowParallelLinear
        )
        super().__init__(
            config=config, submodules=submodules, tp_group=parallel_state.get_tensor_model_parallel_group()
        )

    def forward(
        self, hidden_states: torch.Tensor, *args: object, **unused: object
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Output ``[T, B, hidden]`` and the bias of its projection (None)."""
        gated, _ = self.linear_fc1(hidden_states)
        output, bias = self.linear_fc2(_SwiGLU.apply(gated))
        return output, bias


class OutputLayer(tensor_parallel.ColumnParallelLinear):
    """The output layer: logits, or losses without logits.

    Losses are computed inside the module's call, so that hooks of the distributed optimizer (which gathers
    parameters before a module's forward) see the weight being used.
    """

    def forward(self, input_: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Logits; with ``labels=`` `TokenLosses`, with ``weights=`` too a `WeightedLoss`."""
        if "labels" not in kwargs:
            return super().forward(input_, *args, **kwargs)
        return self._losses(input_, **kwargs)

    def _losses(
        self,
        hidden: torch.Tensor,
        *,
        labels: torch.Tensor,
        weights: torch.Tensor | None = None,
        vocabulary_size: int,
        chunk_size: int | None = None,
        z_loss: float = 0.0,
    ) -> TokenLosses | WeightedLoss:
        common: dict[str, Any] = {
            "vocabulary_size": vocabulary_size,
            "chunk_size": chunk_size,
            "tp_group": self.tp_group,
            "sequence_parallel": self.sequence_parallel,
        }
        if weights is None:
            return vocabulary_parallel_linear_cross_entropy(hidden, self.weight, labels, **common)
        buffer = self._gradient_buffer()
        loss = weighted_linear_cross_entropy(
            hidden, self.weight, labels, weights, z_loss=z_loss, weight_gradient=buffer, **common
        )
        if buffer is None:
            return loss
        return loss._replace(total=_GradientIsInTheBuffer.apply(loss.total, self.weight))

    def _gradient_buffer(self) -> torch.Tensor | None:
        """megatron-core's fp32 gradient of the weight, where it exists and is worth going straight to."""
        if not torch.is_grad_enabled() or self.weight.numel() < LEAST_FUSED_WEIGHTS:
            return None
        return getattr(self.weight, "main_grad", None)


class _GradientIsInTheBuffer(torch.autograd.Function):
    """Passes a loss through, and in backward says of a weight that its gradient has been added already.

    megatron-core's data-parallel hook, which starts the reduction, wants to see a gradient all the same; it
    drops it unread. The weight itself stands in, since it has the shape and costs nothing.
    """

    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.weight = weight
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        ctx.weight.grad_added_to_main_grad = True
        ctx.weight.grad = ctx.weight.detach()
        return gradients[0], None


def uses_transformer_engine(config: ModelConfig, *, cuda: bool) -> bool:
    """Whether the layers come from Transformer Engine.

    Raises:
        ModelConfigError: it is asked for and cannot be used.
    """
    if config.attention_backend == "torch" or (config.attention_backend == "auto" and not cuda):
        return False
    try:
        import transformer_engine.pytorch  # noqa: F401
    except ImportError as error:
        if config.attention_backend == "auto":
            return False
        raise ModelConfigError(
            f"model.attention_backend=transformer_engine, but it cannot be imported ({error}); install "
            "the `gpu` extra or use attention_backend=auto"
        ) from error
    if not cuda:
        raise ModelConfigError("model.attention_backend=transformer_engine needs platform cuda; use torch")
    return True


MASK_LIMIT = 1 << 30
"""Bytes that the masks of one micro-batch may take on a GPU."""


def describe_attention(
    config: ModelConfig, parallel: ParallelConfig, *, context_length: int, cuda: bool
) -> str:
    """One line on what computes attention, and what it can do.

    Args:
        config: The model.
        parallel: The layout.
        context_length: Tokens of a window.
        cuda: Whether the platform is CUDA.

    Raises:
        ModelConfigError: on a GPU, the masks of a window that is one document would not fit.
    """
    context = parallel.context_parallel_size
    engine = uses_transformer_engine(config, cuda=cuda)
    communication = parallel.context_communication(transformer_engine=engine)
    if engine:
        name = f"Transformer Engine {version('transformer-engine')}, all documents in one call"
    elif context == 1 or communication == "a2a":
        name = f"torch {torch.__version__}, one causal call for documents of equal or similar length"
    else:
        # A rank has two chunks of each document, of 2 * context; together they look at 2 * context + 1.
        mask = context_length**2 * (2 * context + 1) // (4 * context**2)
        if cuda and mask > MASK_LIMIT:
            raise ModelConfigError(
                f"context_parallel_size={context} without Transformer Engine takes masks of "
                f"{mask / 2**30:.1f} GiB a rank for one document of {context_length} tokens, more than "
                f"{MASK_LIMIT / 2**30:.0f}; install the `gpu` extra, or set parallel.cp_comm to a2a"
            )
        name = f"torch {torch.__version__}, a mask for each document's chunks"
    if context > 1:
        name += f", context parallelism by {communication}"
    return f"attention: {name}; dropout {config.attention_dropout:g}"


def block_specification(config: ModelConfig, transformer: Any, *, cuda: bool, vp_stage: int | None) -> Any:
    """Layer specification of one pipeline chunk.

    Args:
        config: The model.
        transformer: Its `TransformerConfig`.
        cuda: Whether the platform is CUDA.
        vp_stage: Which of the rank's layer groups; None without interleaving.
    """
    if uses_transformer_engine(config, cuda=cuda):
        return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
    layer = copy.deepcopy(get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=config.qk_layernorm))
    parts = layer.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = RMSNorm
    parts.mlp = GatedFeedForward
    attention = parts.self_attention
    attention.module = PackedSelfAttention
    attention.submodules.core_attention = PackedAttention
    if config.qk_layernorm:
        attention.submodules.q_layernorm = attention.submodules.k_layernorm = RMSNorm
    count = get_num_layers_to_build(transformer, vp_stage)
    return TransformerBlockSubmodules([layer] * count, RMSNorm)
