"""What the GPU benchmarks share: a platform, packed windows of random ids, and a whole training step.

They need torch, megatron-core and this package's Python files, not its C++ extension, and use Transformer
Engine where it is installed. ``--smoke`` runs them on a CPU at toy sizes, to see that they run.
"""

from __future__ import annotations

import importlib.metadata
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from emu3_megatron.model import ModelConfig
from emu3_megatron.parallel import platform
from emu3_megatron.parallel.config import ParallelConfig
from emu3_megatron.vocabulary import Vocabulary

VOCABULARY = Vocabulary.preset("emu3")
SMOKE_VOCABULARY = Vocabulary.preset("tiny")


def start(*, smoke: bool) -> platform.Platform:
    """Choose the device and make process groups of one process."""
    from emu3_megatron.parallel.groups import initialize_parallel

    machine = platform.install("cpu" if smoke else "cuda")
    initialize_parallel(ParallelConfig(), machine, seed=1)
    return machine


def environment(machine: platform.Platform) -> dict[str, str]:
    """Device and versions, to state with every figure."""
    found = {"device": torch.cuda.get_device_name() if machine.is_cuda else "CPU"}
    found["torch"] = torch.__version__
    if machine.is_cuda:
        found["cuda"] = str(torch.version.cuda)
    for name in ("megatron-core", "transformer-engine", "flash-attn"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    return found


@dataclass(frozen=True)
class Window:
    """A packed window on the device."""

    tokens: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor
    packed: Any
    host_cu_seqlens: torch.Tensor
    """Cumulative lengths of the documents, on the CPU."""
    attention_pairs: float
    """(query, key) pairs under the causal document mask."""


def random_window(
    size: int, document: int, vocabulary: Vocabulary, device: torch.device, seed: int
) -> Window:
    """Documents of `document` tokens, give or take a tenth, filling `size` tokens."""
    from emu3_megatron.parallel.context import packed_sequence_parameters

    generator = torch.Generator().manual_seed(seed)
    lengths: list[int] = []
    while (left := size - sum(lengths)) > 0:
        drawn = int(document * (0.9 + 0.2 * torch.rand((), generator=generator).item()))
        lengths.append(min(left, max(1, drawn)))
    cu = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    tokens, labels = torch.randint(0, vocabulary.size, (2, 1, size), generator=generator)
    return Window(
        tokens=tokens.to(device),
        labels=labels.to(device),
        weights=torch.full((1, size), 1 / size, device=device),
        packed=packed_sequence_parameters(cu.to(device), max(lengths)),
        host_cu_seqlens=cu,
        attention_pairs=sum(length * (length + 1) / 2 for length in lengths),
    )


class TrainingStep:
    """Forward, loss without logits, backward, clipping, Adam: all that a step of training does on one device.

    Args:
        config: The model.
        vocabulary: Ids.
        precision: ``bf16`` or ``fp32``.
        learning_rate: Of Adam.
    """

    def __init__(
        self, config: ModelConfig, vocabulary: Vocabulary, precision: str, learning_rate: float = 1e-4
    ) -> None:
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

        from emu3_megatron.model import build_model

        (self.chunk,) = build_model(
            config,
            vocabulary_padded_size=vocabulary.padded_size,
            vocabulary_size=vocabulary.size,
            parallel=ParallelConfig(),
            seed=1,
            precision=precision,  # type: ignore[arg-type]
        )
        ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
        self.model = DistributedDataParallel(self.chunk.config, ddp, self.chunk)
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=learning_rate,
                weight_decay=0.1,
                adam_beta2=0.95,
                clip_grad=1.0,
                bf16=precision == "bf16",
                params_dtype=self.chunk.config.params_dtype,
                use_distributed_optimizer=True,
            ),
            [self.model],
        )

    def __call__(self, window: Window) -> torch.Tensor:
        """One step; the loss, on the device."""
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        hidden = self.model(
            window.tokens,
            None,
            None,
            packed_seq_params=window.packed,
            host_cu_seqlens=window.host_cu_seqlens,
        )
        total = self.chunk.weighted_loss(hidden, window.labels, window.weights).total
        total.backward()
        self.model.finish_grad_sync()
        self.optimizer.step()
        return total.detach()


def seconds(function: Callable[[], object], *, repeats: int, cuda: bool) -> float:
    """Median wall seconds of a call, after two that warm up."""
    times = []
    for number in range(repeats + 2):
        if cuda:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        function()
        if cuda:
            torch.cuda.synchronize()
        if number >= 2:
            times.append(time.perf_counter() - begin)
    return sorted(times)[len(times) // 2]


def show(**values: object) -> None:
    """One line of JSON, to be kept with the figures."""
    print(json.dumps({key: _rounded(value) for key, value in values.items()}), flush=True)


def _rounded(value: object) -> object:
    return float(f"{value:.4g}") if isinstance(value, float) else value
