"""Tokens per second of one training step: this package against a plain PyTorch model of the same size.

Usage: OMP_NUM_THREADS=1 python benchmarks/model_step.py [--hidden-size 192 --num-layers 6 ...]

Both train on the CPU, one thread, fp32, the same matrices (RMSNorm, grouped-query attention, SwiGLU, rotary
positions), AdamW (torch's fused kernel) and gradient clipping. The plain model is timed on the same packed
windows with a dense document mask, and on windows of equal rows of 128 tokens with a causal kernel and no
mask, which is the best case for it. Rounds alternate and the least CPU time of each counts, so that other
work on the machine disturbs the ratio little.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

from emu3_megatron.parallel import platform

warnings.filterwarnings("ignore")
PLATFORM = platform.install("cpu")

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from torch import nn

from emu3_megatron.model import ModelConfig, build_model
from emu3_megatron.parallel.config import ParallelConfig
from emu3_megatron.parallel.context import packed_sequence_parameters
from emu3_megatron.parallel.groups import initialize_parallel

EQUAL_ROW = 128


@dataclass
class Window:
    tokens: torch.Tensor
    labels: torch.Tensor
    cu_seqlens: torch.Tensor


def packed_windows(tokens: int, vocabulary_size: int, count: int) -> list[Window]:
    """Windows like the sample corpus': captioned images near 95 tokens, clips near 210, short texts."""
    random = np.random.default_rng(0)
    windows = []
    for _ in range(count):
        lengths: list[int] = []
        while sum(lengths) < tokens:
            kinds = [random.normal(95, 4), random.normal(210, 5), random.integers(8, 40)]
            length = int(random.choice(kinds, p=[0.75, 0.15, 0.1]))
            lengths.append(max(1, min(length, tokens - sum(lengths))))
        windows.append(window(lengths, vocabulary_size))
    return windows


def window(lengths: list[int], vocabulary_size: int) -> Window:
    """Random tokens in documents of these lengths."""
    tokens, labels = torch.randint(0, vocabulary_size, (2, 1, sum(lengths)))
    return Window(tokens, labels, torch.tensor([0, *lengths]).cumsum(0).to(torch.int32))


class PlainLayer(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden, head = config.hidden_size, config.head_size
        self.heads, self.groups, self.head = config.num_attention_heads, config.num_query_groups, head
        self.norm1, self.norm2 = (nn.RMSNorm(hidden, eps=config.layernorm_epsilon) for _ in range(2))
        self.query = nn.Linear(hidden, self.heads * head, bias=False)
        self.key, self.value = (nn.Linear(hidden, self.groups * head, bias=False) for _ in range(2))
        self.out = nn.Linear(self.heads * head, hidden, bias=False)
        self.gate, self.up = (nn.Linear(hidden, config.ffn_hidden_size, bias=False) for _ in range(2))
        self.down = nn.Linear(config.ffn_hidden_size, hidden, bias=False)

    def _heads(self, x: torch.Tensor, count: int) -> torch.Tensor:
        return x.view(*x.shape[:2], count, self.head).transpose(1, 2)

    def forward(
        self, x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        def turn(y: torch.Tensor) -> torch.Tensor:
            first, second = y.chunk(2, -1)
            return y * cosine + torch.cat((-second, first), -1) * sine

        normed = self.norm1(x)
        query = turn(self._heads(self.query(normed), self.heads))
        key = turn(self._heads(self.key(normed), self.groups))
        value = self._heads(self.value(normed), self.groups)
        mixed = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=True
        )
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        normed = self.norm2(x)
        return x + self.down(F.silu(self.gate(normed)) * self.up(normed))


class PlainModel(nn.Module):
    def __init__(self, config: ModelConfig, rows: int) -> None:
        super().__init__()
        self.base, self.head_size = config.rotary_base, config.head_size
        self.embedding = nn.Embedding(rows, config.hidden_size)
        self.layers = nn.ModuleList([PlainLayer(config) for _ in range(config.num_layers)])
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.output = nn.Linear(config.hidden_size, rows, bias=False)

    def forward(
        self, tokens: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        exponents = torch.arange(0, self.head_size, 2) / self.head_size
        angles = torch.outer(positions.float(), 1.0 / self.base**exponents).repeat(1, 2)
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, angles.cos(), angles.sin(), mask)
        return self.output(self.norm(x))


def our_step(config: ModelConfig, rows: int, in_use: int) -> Callable[[Window], None]:
    """A training step of this package."""
    layout = ParallelConfig()
    initialize_parallel(layout, PLATFORM, seed=1)
    (chunk,) = build_model(
        config, vocabulary_padded_size=rows, vocabulary_size=in_use, parallel=layout, seed=1
    )
    model = DistributedDataParallel(chunk.config, DistributedDataParallelConfig(), chunk)
    settings = OptimizerConfig(optimizer="adam", lr=1e-3, weight_decay=0.1, adam_beta2=0.95, clip_grad=1.0)
    optimizer = get_megatron_optimizer(settings, [model])

    def step(data: Window) -> None:
        model.zero_grad_buffer()
        optimizer.zero_grad()
        hidden = model(data.tokens, packed_seq_params=packed_sequence_parameters(data.cu_seqlens))
        weights = torch.full(data.labels.shape, 1 / data.labels.numel())
        chunk.weighted_loss(hidden, data.labels, weights).total.backward()
        optimizer.step()

    return step


def plain_step(config: ModelConfig, rows: int, *, masked: bool) -> Callable[[Window], None]:
    """A training step of the plain model, on the packed window or on equal rows."""
    model = PlainModel(config, rows)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-3, weight_decay=0.1, betas=(0.9, 0.95), fused=True
    )

    def step(data: Window) -> None:
        tokens, labels, mask = data.tokens, data.labels, None
        if masked:
            index = torch.arange(tokens.size(1))
            document = torch.bucketize(index, data.cu_seqlens[1:], right=True)
            positions = index - data.cu_seqlens[document]
            mask = (document[:, None] == document) & (index[:, None] >= index)
        else:
            tokens, positions = tokens.view(-1, EQUAL_ROW), torch.arange(EQUAL_ROW)
        optimizer.zero_grad()
        F.cross_entropy(model(tokens, positions, mask).view(-1, rows), labels.view(-1)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, value in {
        "hidden-size": 192,
        "num-layers": 6,
        "ffn-hidden-size": 512,
        "num-attention-heads": 6,
        "num-query-groups": 2,
        "window": 2048,
        "vocabulary": 2700,
        "rounds": 12,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default {value}")
    arguments = vars(parser.parse_args())
    size, in_use, rounds = (arguments.pop(name) for name in ("window", "vocabulary", "rounds"))
    config = ModelConfig.preset("tiny", **arguments)
    rows = -(-in_use // 1024) * 1024
    torch.set_num_threads(1)
    windows = packed_windows(size, in_use, 4)
    equal = [window([EQUAL_ROW] * (size // EQUAL_ROW), in_use)]
    ours = our_step(config, rows, in_use)
    runs = {
        "emu3-megatron, packed": (ours, windows),
        "plain torch, packed, dense mask": (plain_step(config, rows, masked=True), windows),
        "emu3-megatron, equal rows": (ours, equal),
        "plain torch, equal rows": (plain_step(config, rows, masked=False), equal),
    }
    least = dict.fromkeys(runs, float("inf"))
    for number in range(rounds + 1):
        for name, (step, data) in runs.items():
            start = time.process_time()
            step(data[number % len(data)])
            if number:  # the first round warms up
                least[name] = min(least[name], time.process_time() - start)
    print(f"torch {torch.__version__}, {config.parameter_count(rows) / 1e6:.1f}M parameters, window {size}")
    for name, seconds in least.items():
        print(f"{name:34s} {seconds * 1e3:8.1f} CPU ms {size / seconds:9.0f} tokens/s/core")


if __name__ == "__main__":
    main()
