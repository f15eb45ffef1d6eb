"""Attention backends over packed windows: time of forward and backward, memory, error against fp32.

Usage: python benchmarks/gpu/attention.py [--windows 8192 32768 --document 4300 --dropout 0.0] [--smoke]

Heads as in Emu3 8B (32 query, 8 key heads of 128), bf16. Backends: this package's packed attention (SDPA, one
call for documents of similar length), SDPA with a dense document mask, flex_attention, torch's and
flash-attn's varlen kernels, Transformer Engine. One that is missing, or has no attention dropout where
dropout is asked for, is named as skipped. TFLOP/s count the pairs under the document mask.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[2])]

import common
import torch
import torch.nn.functional as F

HEADS, GROUPS, SIZE = 32, 8, 128
DENSE_LIMIT = 16_384
"""A dense mask is not tried on longer windows."""

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Query ``[T, N, D]``, key and value ``[T, G, D]`` to ``[T, N * D]``."""


class Skipped(Exception):
    """Why a backend is not measured."""


def packed(window: common.Window, dropout: float) -> Attention:
    """This package's."""
    from emu3_megatron.model.attention import PackedAttention
    from emu3_megatron.model.packing import gather_rows, scatter_rows, window_layout

    config = SimpleNamespace(kv_channels=SIZE, attention_dropout=dropout, sequence_parallel=False)
    group = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    attention = PackedAttention(
        config, layer_number=1, pg_collection=SimpleNamespace(cp=group, tp=group)
    ).train()
    cu = window.packed.cu_seqlens_q
    layout = window_layout(cu, cp_size=1, cp_rank=0, all_to_all=False, device=cu.device)

    def run(*heads: torch.Tensor) -> torch.Tensor:
        return scatter_rows(attention(*(gather_rows(x, layout.entry) for x in heads), layout), layout.entry)

    return run


def dense(window: common.Window, dropout: float) -> Attention:
    """SDPA with a mask over the whole window."""
    size = window.tokens.numel()
    if size > DENSE_LIMIT:
        raise Skipped(f"a mask of {size} x {size}")
    place = torch.arange(size, device=window.tokens.device)
    document = torch.bucketize(place, window.packed.cu_seqlens_q[1:], right=True)
    mask = (document[:, None] == document) & (place[:, None] >= place)

    def run(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, enable_gqa=True)
        return out[0].transpose(0, 1).flatten(1)

    return run


def flex(window: common.Window, dropout: float) -> Attention:
    """torch's flex_attention, compiled."""
    if window.tokens.device.type != "cuda":
        raise Skipped("no backward on a CPU")
    if dropout:
        raise Skipped("no attention dropout")
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    size = window.tokens.numel()
    place = torch.arange(size, device=window.tokens.device)
    document = torch.bucketize(place, window.packed.cu_seqlens_q[1:], right=True)

    def allowed(_b: object, _h: object, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (document[query] == document[key]) & (query >= key)

    mask = create_block_mask(allowed, None, None, size, size, device=str(place.device))
    compiled = torch.compile(flex_attention)

    def run(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.transpose(0, 1)[None].contiguous() for x in (query, key, value))
        return compiled(q, k, v, block_mask=mask, enable_gqa=True)[0].transpose(0, 1).flatten(1)

    return run


def torch_varlen(window: common.Window, dropout: float) -> Attention:
    """torch's kernel over cumulative lengths."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError as error:
        raise Skipped("this torch has none") from error
    if window.tokens.device.type != "cuda":
        raise Skipped("needs CUDA")
    if dropout:
        raise Skipped("no attention dropout")
    cu, longest = window.packed.cu_seqlens_q, window.packed.max_seqlen_q

    def run(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        k, v = (x.repeat_interleave(HEADS // GROUPS, 1) for x in (key, value))
        # The last window size of (-1, 0) is how this kernel says causal.
        return varlen_attn(query, k, v, cu, cu, longest, longest, window_size=(-1, 0)).flatten(1)

    return run


def flash(window: common.Window, dropout: float) -> Attention:
    """flash-attn's varlen kernel."""
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError as error:
        raise Skipped("not installed") from error
    cu, longest = window.packed.cu_seqlens_q, window.packed.max_seqlen_q

    def run(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        out = flash_attn_varlen_func(
            query, key, value, cu, cu, longest, longest, dropout_p=dropout, causal=True
        )
        return out.flatten(1)

    return run


def transformer_engine(window: common.Window, dropout: float) -> Attention:
    """Transformer Engine's, which chooses among its own kernels."""
    try:
        from transformer_engine.pytorch import DotProductAttention
    except ImportError as error:
        raise Skipped("not installed") from error
    attention = DotProductAttention(
        HEADS,
        SIZE,
        num_gqa_groups=GROUPS,
        attention_dropout=dropout,
        qkv_format="thd",
        attn_mask_type="padding_causal",
    )
    parameters = window.packed

    def run(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return attention(
            query,
            key,
            value,
            cu_seqlens_q=parameters.cu_seqlens_q,
            cu_seqlens_kv=parameters.cu_seqlens_kv,
            max_seqlen_q=parameters.max_seqlen_q,
            max_seqlen_kv=parameters.max_seqlen_kv,
        ).flatten(1)

    return run


BACKENDS = {
    "packed SDPA (ours)": packed,
    "dense mask SDPA": dense,
    "flex_attention": flex,
    "torch varlen": torch_varlen,
    "flash-attn varlen": flash,
    "Transformer Engine": transformer_engine,
}


def reference(window: common.Window, heads: list[torch.Tensor]) -> Iterator[torch.Tensor]:
    """fp32 output of every document, from SDPA alone."""
    for begin, end in zip(
        window.packed.cu_seqlens_q[:-1].tolist(), window.packed.cu_seqlens_q[1:].tolist(), strict=True
    ):
        q, k, v = (x[begin:end].float().transpose(0, 1)[None] for x in heads)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        yield out[0].transpose(0, 1).flatten(1)


def measure(name: str, window: common.Window, dropout: float, repeats: int, dtype: torch.dtype) -> None:
    """One backend on one window."""
    device = window.tokens.device
    cuda, size = device.type == "cuda", window.tokens.numel()
    generator = torch.Generator(device=device).manual_seed(0)
    heads = [
        torch.randn(size, n, SIZE, device=device, dtype=dtype, generator=generator).requires_grad_()
        for n in (HEADS, GROUPS, GROUPS)
    ]
    try:
        attention = BACKENDS[name](window, dropout)
        with torch.no_grad():
            error = "with dropout"
            if not dropout:
                want = torch.cat(list(reference(window, heads)))
                error = float((attention(*heads).float() - want).norm() / want.norm())  # type: ignore[assignment]
    except Skipped as reason:
        common.show(window=size, dropout=dropout, backend=name, skipped=str(reason))
        return
    cotangent = torch.randn(size, HEADS * SIZE, device=device, dtype=dtype, generator=generator)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    spent = common.seconds(
        lambda: torch.autograd.grad(attention(*heads), heads, cotangent), repeats=repeats, cuda=cuda
    )
    common.show(
        window=size,
        dropout=dropout,
        backend=name,
        milliseconds=1e3 * spent,
        tflops=12 * window.attention_pairs * HEADS * SIZE / spent / 1e12,
        memory_mib=(torch.cuda.max_memory_allocated() - before) / 2**20 if cuda else "not measured",
        error=error,
    )


def main() -> None:
    """Measure every backend on every window and print a line of JSON for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--windows", type=int, nargs="+", default=[8192, 32_768, 131_072])
    parser.add_argument("--document", type=int, default=4300, help="tokens of a document")
    parser.add_argument("--dropout", type=float, nargs="+", default=[0.0, 0.1])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--smoke", action="store_true", help="toy sizes on a CPU")
    arguments = parser.parse_args()
    machine = common.start(smoke=arguments.smoke)
    common.show(**common.environment(machine))
    dtype = torch.bfloat16
    if arguments.smoke:
        arguments.windows, arguments.document, arguments.repeats, dtype = [96], 40, 1, torch.float32
    for size in arguments.windows:
        window = common.random_window(size, arguments.document, common.VOCABULARY, machine.device, seed=0)
        for dropout in arguments.dropout:
            for name in BACKENDS:
                measure(name, window, dropout, arguments.repeats, dtype)


if __name__ == "__main__":
    main()
