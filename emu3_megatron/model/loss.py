"""Cross entropy over a split vocabulary without ever holding all logits.

Logits exist for one chunk of tokens at a time, forward and backward. Shape legend: T tokens, C tokens of a
chunk, H hidden size, V rows of this rank's part of the output layer.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

_CHUNK_LOGITS = 2**22
"""Logits of one chunk on a CPU when no chunk size is given: 16 MiB in fp32."""

_LEAST_CHUNK = 128
"""Tokens of a chunk at least, on a CPU: every chunk reads the whole weight and writes its whole gradient,
which must pay."""

_GPU_CHUNK_LOGITS = 2**28
"""The same on a GPU: 1 GiB in fp32."""

_GPU_CHUNKS = (1024, 2048)
"""Tokens of a chunk at least and at most on a GPU. A weight costs a chunk of C tokens about 16 bytes of
traffic (itself twice, its gradient in half precision, the sum in fp32) and 6 C operations: on an H100 both
take as long at some 500 tokens."""

LEAST_FUSED_WEIGHTS = 2**24
"""Weights of a rank's output layer from which its gradient goes straight into megatron-core's buffer. Smaller
ones spend little on a gradient of their own for each micro-batch, which is then added as every other is."""


class TokenLosses(NamedTuple):
    """Per-token results, in the order of the labels."""

    losses: torch.Tensor
    """fp32 ``[T]``: -log p(label); equal on every tensor-parallel rank."""
    correct: torch.Tensor
    """bool ``[T]``: no other id has a larger logit than the label."""


class WeightedLoss(NamedTuple):
    """The weighted sum, differentiable, and per-token results for reports."""

    total: torch.Tensor
    """fp32 scalar: sum of weight * loss."""
    losses: torch.Tensor
    """fp32 ``[T]`` unweighted, detached."""
    correct: torch.Tensor
    """bool ``[T]``."""


def default_chunk_size(rows: int, *, cuda: bool) -> int:
    """Tokens per chunk where none is given.

    Args:
        rows: Ids of this rank.
        cuda: Whether the logits are on a GPU: then 1,024 to 2,048 tokens, as near 1 GiB of logits as that
            allows; else at least 128 tokens, near 16 MiB.
    """
    if cuda:
        least, most = _GPU_CHUNKS
        return min(most, max(least, _GPU_CHUNK_LOGITS // max(1, rows)))
    return max(_LEAST_CHUNK, _CHUNK_LOGITS // max(1, rows))


def vocabulary_parallel_linear_cross_entropy(
    hidden: torch.Tensor,
    weight_shard: torch.Tensor,
    labels: torch.Tensor,
    *,
    vocabulary_size: int,
    chunk_size: int | None = None,
    tp_group: torch.distributed.ProcessGroup | None = None,
    sequence_parallel: bool = False,
) -> TokenLosses:
    """Per-token cross entropy of ``hidden @ weight.T``; the logits are computed again in backward.

    Any function of the losses may follow. When it is a weighted sum, `weighted_linear_cross_entropy` does the
    same with one matrix product less.

    Args:
        hidden: ``[T, 1, H]`` or ``[T, H]``; under sequence parallelism this rank's part of the tokens.
        weight_shard: ``[V, H]``, this rank's rows of the output layer.
        labels: int64, T values in any shape, ids below `vocabulary_size`.
        vocabulary_size: Ids in use; rows beyond are padding and take no part in the softmax.
        chunk_size: Tokens of one chunk; None: see `default_chunk_size`.
        tp_group: Group that shares the vocabulary; None: not split.
        sequence_parallel: Whether `hidden` is split over `tp_group`.

    Returns:
        Losses and correctness of all T tokens, the same on every rank of the group.
    """
    split = _Split.of(weight_shard, vocabulary_size, tp_group)
    rows = _whole_sequence(hidden, split, sequence_parallel)
    chunk = chunk_size or default_chunk_size(split.real_rows, cuda=rows.is_cuda)
    losses, correct = _Recomputed.apply(rows, weight_shard, labels.reshape(-1), split, chunk)
    return TokenLosses(losses, correct)


def weighted_linear_cross_entropy(
    hidden: torch.Tensor,
    weight_shard: torch.Tensor,
    labels: torch.Tensor,
    weights: torch.Tensor,
    *,
    vocabulary_size: int,
    chunk_size: int | None = None,
    z_loss: float = 0.0,
    weight_gradient: torch.Tensor | None = None,
    tp_group: torch.distributed.ProcessGroup | None = None,
    sequence_parallel: bool = False,
) -> WeightedLoss:
    """Weighted sum of the token losses, with gradients made in forward while a chunk's logits are at hand.

    Arguments as in `vocabulary_parallel_linear_cross_entropy`, and:

    Args:
        hidden: See there.
        weight_shard: See there.
        labels: See there.
        weights: Float, T values.
        vocabulary_size: See there.
        chunk_size: See there.
        z_loss: Coefficient of ``log(Z) ** 2``, where Z is the softmax's denominator; it is part of `total`,
            weighted as the losses are, and not of `losses` (PaLM, arXiv 2204.02311, section 5).
        weight_gradient: fp32 ``[V, H]``: the gradient of `weight_shard` is added here, in forward, and the
            function returns none. The caller promises to differentiate `total` itself, not a multiple of it.
        tp_group: See there.
        sequence_parallel: See there.

    Returns:
        Only `total` is differentiable, with respect to `hidden` and `weight_shard`.
    """
    split = _Split.of(weight_shard, vocabulary_size, tp_group)
    rows = _whole_sequence(hidden, split, sequence_parallel)
    chunk = chunk_size or default_chunk_size(split.real_rows, cuda=rows.is_cuda)
    plan = _Plan(split, chunk, z_loss, weight_gradient)
    return WeightedLoss(
        *_Weighted.apply(rows, weight_shard, labels.reshape(-1), weights.reshape(-1).float(), plan)
    )


class _Split(NamedTuple):
    """The part of the vocabulary that this rank holds."""

    start: int
    real_rows: int  # rows below vocabulary_size; the rest are padding
    group: torch.distributed.ProcessGroup | None

    @classmethod
    def of(
        cls, weight: torch.Tensor, vocabulary_size: int, group: torch.distributed.ProcessGroup | None
    ) -> _Split:
        if group is not None and group.size() == 1:
            group = None
        start = 0 if group is None else group.rank() * weight.size(0)
        return cls(start, max(0, min(weight.size(0), vocabulary_size - start)), group)

    def reduce(self, tensor: torch.Tensor, op: Any = torch.distributed.ReduceOp.SUM) -> torch.Tensor:
        if self.group is not None:
            torch.distributed.all_reduce(tensor, op=op, group=self.group)
        return tensor


def _whole_sequence(hidden: torch.Tensor, split: _Split, sequence_parallel: bool) -> torch.Tensor:
    if split.group is not None:
        from megatron.core.tensor_parallel import mappings

        if sequence_parallel:
            hidden = mappings.gather_from_sequence_parallel_region(hidden, True, split.group)
        else:
            hidden = mappings.copy_to_tensor_model_parallel_region(hidden, split.group)
    return hidden.reshape(-1, hidden.size(-1))


class _Plan(NamedTuple):
    """How `_Weighted` works."""

    split: _Split
    chunk_size: int
    z_loss: float
    weight_gradient: torch.Tensor | None  # where to add it; None: return it


class _Chunk(NamedTuple):
    exponentials_CV: torch.Tensor
    denominator_C: torch.Tensor
    maximum_C: torch.Tensor
    local_C: torch.Tensor
    is_local_C: torch.Tensor


def _softmax_chunk(
    hidden_CH: torch.Tensor, weight: torch.Tensor, labels_C: torch.Tensor, split: _Split
) -> tuple[torch.Tensor, torch.Tensor, _Chunk]:
    """Losses, correctness and what a gradient needs, for one chunk."""
    logits = (hidden_CH @ weight[: split.real_rows].t()).float()
    local = labels_C - split.start
    is_local = (local >= 0) & (local < split.real_rows)
    local = local.clamp(0, max(0, split.real_rows - 1))
    if split.real_rows:
        maximum = logits.amax(1)
        target = logits.gather(1, local[:, None])[:, 0]
    else:  # only padding rows here
        maximum = logits.new_full((len(labels_C),), -torch.inf)
        target = torch.zeros_like(maximum)
    split.reduce(maximum, torch.distributed.ReduceOp.MAX)
    exponentials = logits.sub_(maximum[:, None]).exp_()
    if split.group is None:
        denominator = exponentials.sum(1)
    else:
        both = torch.stack([exponentials.sum(1), torch.where(is_local, target, torch.zeros_like(target))])
        denominator, target = split.reduce(both).unbind(0)
    losses = denominator.log() + maximum - target
    return losses, target >= maximum, _Chunk(exponentials, denominator, maximum, local, is_local)


def _gradient_of_logits(
    chunk: _Chunk, scale_C: torch.Tensor, dtype: torch.dtype, softmax_scale_C: torch.Tensor | None = None
) -> torch.Tensor:
    """scale * (softmax - onehot), written over the exponentials; the softmax may have a scale of its own."""
    outer_C = scale_C if softmax_scale_C is None else softmax_scale_C
    gradient = chunk.exponentials_CV.mul_((outer_C / chunk.denominator_C)[:, None])
    if gradient.size(1):
        gradient.scatter_add_(1, chunk.local_C[:, None], -(scale_C * chunk.is_local_C)[:, None])
    return gradient.to(dtype)


def _accumulate(
    gradient_CV: torch.Tensor,
    hidden_CH: torch.Tensor,
    weight: torch.Tensor,
    hidden_gradient_CH: torch.Tensor | None,
    weight_gradient: torch.Tensor | None,
) -> None:
    rows = gradient_CV.size(1)
    if hidden_gradient_CH is not None:
        torch.mm(gradient_CV, weight[:rows], out=hidden_gradient_CH)
    if weight_gradient is None:
        return
    if weight_gradient.dtype == gradient_CV.dtype:
        weight_gradient[:rows].addmm_(gradient_CV.t(), hidden_CH)
    else:  # half precision: products in half, sums over chunks in fp32
        weight_gradient[:rows] += gradient_CV.t() @ hidden_CH


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        split: _Split,
        chunk_size: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        losses = hidden.new_empty(len(hidden), dtype=torch.float32)
        correct = hidden.new_empty(len(hidden), dtype=torch.bool)
        for begin in range(0, len(hidden), chunk_size):
            part = slice(begin, begin + chunk_size)
            losses[part], correct[part], _ = _softmax_chunk(hidden[part], weight, labels[part], split)
        ctx.save_for_backward(hidden, weight, labels)
        ctx.split, ctx.chunk_size = split, chunk_size
        ctx.mark_non_differentiable(correct)
        return losses, correct

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        hidden, weight, labels = ctx.saved_tensors
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        hidden_gradient = torch.empty_like(hidden) if need_hidden else None
        weight_gradient = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        for begin in range(0, len(hidden), ctx.chunk_size):
            part = slice(begin, begin + ctx.chunk_size)
            _, _, chunk = _softmax_chunk(hidden[part], weight, labels[part], ctx.split)
            target = None if hidden_gradient is None else hidden_gradient[part]
            _accumulate(
                _gradient_of_logits(chunk, gradients[0][part], hidden.dtype),
                hidden[part],
                weight,
                target,
                weight_gradient,
            )
            del chunk  # or two chunks would exist while the next one is made
        if weight_gradient is not None:
            weight_gradient = weight_gradient.to(weight.dtype)
        return hidden_gradient, weight_gradient, None, None, None


class _Weighted(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        weights: torch.Tensor,
        plan: _Plan,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        losses = hidden.new_empty(len(hidden), dtype=torch.float32)
        correct = hidden.new_empty(len(hidden), dtype=torch.bool)
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        hidden_gradient = torch.empty_like(hidden) if need_hidden else None
        weight_gradient = plan.weight_gradient if need_weight else None
        if need_weight and weight_gradient is None:
            weight_gradient = torch.zeros_like(weight, dtype=torch.float32)
        z_total = losses.new_zeros(())
        for begin in range(0, len(hidden), plan.chunk_size):
            part = slice(begin, begin + plan.chunk_size)
            losses[part], correct[part], chunk = _softmax_chunk(
                hidden[part], weight, labels[part], plan.split
            )
            softmax_scale = None
            if plan.z_loss:
                log_z = chunk.denominator_C.log() + chunk.maximum_C
                z_total += plan.z_loss * torch.dot(weights[part], log_z.square())
                softmax_scale = weights[part] * (1 + 2 * plan.z_loss * log_z)
            if need_hidden or need_weight:
                target = None if hidden_gradient is None else hidden_gradient[part]
                _accumulate(
                    _gradient_of_logits(chunk, weights[part], hidden.dtype, softmax_scale),
                    hidden[part],
                    weight,
                    target,
                    weight_gradient,
                )
            del chunk  # or two chunks would exist while the next one is made
        if plan.weight_gradient is not None:
            weight_gradient = None
        elif weight_gradient is not None:
            weight_gradient = weight_gradient.to(weight.dtype)
        ctx.save_for_backward(hidden_gradient, weight_gradient)
        ctx.mark_non_differentiable(losses, correct)
        total = (losses * weights).sum()
        return total + z_total if plan.z_loss else total, losses, correct

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        hidden_gradient, weight_gradient = ctx.saved_tensors
        scale = gradients[0]
        if hidden_gradient is not None:
            hidden_gradient = hidden_gradient * scale.to(hidden_gradient.dtype)
        if weight_gradient is not None:
            weight_gradient = weight_gradient * scale.to(weight_gradient.dtype)
        return hidden_gradient, weight_gradient, None, None, None
