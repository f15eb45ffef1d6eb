"""Guided images: tokens/s of one and of 8 at a time, against the memory's bandwidth.

Usage: python benchmarks/gpu/generation.py [--model emu3_8b --batch 1 8 --rows 16 --columns 16] [--smoke]

A guided image is two rows of the batch. The bound is what reading the weights of one step once would take,
the layers and the vision slice of the output layer, at the bandwidth that copying a block of memory shows.
``--smoke`` takes a toy model on a CPU.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[2])]

import common
import numpy as np
import torch

from emu3_megatron.grammar import Dialect
from emu3_megatron.model import ModelConfig
from emu3_megatron.parallel.config import ParallelConfig
from emu3_megatron.text.bytes import ByteTokenizer
from emu3_megatron.vocabulary import Vocabulary

GUIDANCE, TOP_K = 3.0, 2048
BLOCK = 1 << 30
"""Bytes that are copied to measure the bandwidth."""


def build(name: str, vocabulary: Vocabulary, precision: str) -> Any:
    """A model with random weights and the layers that generation opens files with."""
    from emu3_megatron.inference.bundle import LAYERS
    from emu3_megatron.model import build_model

    (model,) = build_model(
        ModelConfig.preset(name, attention_backend=LAYERS),
        vocabulary_padded_size=vocabulary.padded_size,
        vocabulary_size=vocabulary.size,
        parallel=ParallelConfig(),
        seed=1,
        precision=precision,  # type: ignore[arg-type]
    )
    return model.eval()


def bytes_per_step(model: Any, vocabulary: Vocabulary) -> int:
    """What one step must read: every layer, and the rows of the output layer that vision tokens have."""
    layers = sum(weight.nbytes for weight in model.decoder.parameters())
    row = model.output_layer.weight[0].nbytes
    return int(layers + vocabulary.codebook_size * row)


def bandwidth(device: torch.device, size: int) -> float:
    """Bytes a second that a copy reads and writes."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = partial(target.copy_, source)
    return 2 * size / common.seconds(copy, repeats=5, cuda=device.type == "cuda")


def images(
    model: Any, dialect: Dialect, batch: int, rows: int, columns: int
) -> tuple[Callable[[], None], int]:
    """A call that generates, and how many new tokens it makes."""
    from emu3_megatron.inference import Engine, Request, Sampling

    vocabulary, span = dialect.vocabulary, dialect.open_span(rows, columns)
    length = dialect.span_length(rows, columns) - len(span)

    def prompt(text: str) -> np.ndarray:
        return np.concatenate([[vocabulary.bos], dialect.encode_text(text), span])

    requests = [
        Request(
            prompt=prompt(f"circle {number}"),
            negative_prompt=prompt(""),
            sampling=Sampling(guidance=GUIDANCE, top_k=TOP_K),
            seed=number,
            max_new_tokens=length,
            stop=frozenset([vocabulary.eoi]),
        )
        for number in range(batch)
    ]
    engine = Engine(model, dialect)

    def generate() -> None:
        if not all(completion.finished for completion in engine.generate(requests)):
            raise RuntimeError("an image is incomplete")

    return generate, batch * length


def main() -> None:
    """Measure and print a line of JSON for every batch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="emu3_8b", help="a preset")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="images at a time")
    parser.add_argument("--rows", type=int, default=16, help="of vision tokens")
    parser.add_argument("--columns", type=int, default=16, help="of vision tokens")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--smoke", action="store_true", help="toy sizes on a CPU")
    arguments = parser.parse_args()
    machine = common.start(smoke=arguments.smoke)
    common.show(**common.environment(machine))
    name, precision, vocabulary, block = arguments.model, "bf16", common.VOCABULARY, BLOCK
    if arguments.smoke:
        name, precision, vocabulary, block = "tiny", "fp32", common.SMOKE_VOCABULARY, 1 << 20
        arguments.rows = arguments.columns = 2
        arguments.repeats = 1
    model = build(name, vocabulary, precision)
    dialect = Dialect.preset("emu3", vocabulary, ByteTokenizer())
    speed, read = bandwidth(machine.device, block), bytes_per_step(model, vocabulary)
    for batch in arguments.batch:
        generate, tokens = images(model, dialect, batch, arguments.rows, arguments.columns)
        spent = common.seconds(generate, repeats=arguments.repeats, cuda=machine.is_cuda)
        bound = tokens / (arguments.rows * arguments.columns * read / speed)
        common.show(
            model=name,
            precision=precision,
            images=batch,
            rows_of_the_batch=2 * batch,
            vision_tokens=arguments.rows * arguments.columns,
            tokens_per_second=tokens / spent,
            bound_tokens_per_second=bound,
            share_of_the_bound=tokens / spent / bound,
            gigabytes_per_step=read / 1e9,
            bandwidth_gigabytes_per_second=speed / 1e9,
        )


if __name__ == "__main__":
    main()
