"""Initial weights that depend on the seed and the parameter's name alone.

Every matrix is drawn on the CPU in blocks of rows, each block from its own stream, so that a rank draws only
the rows it holds and any split over tensor or pipeline parallelism gives the same model.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator

import torch

from emu3_megatron.model.config import ModelConfig

_BLOCK_ELEMENTS = 2**18


def global_parameter_names(chunk: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Names and parameters of one pipeline chunk, with layers numbered (from 0) through the whole model."""
    layers = getattr(getattr(chunk, "decoder", None), "layers", [])
    offset = layers[0].layer_number - 1 if len(layers) else 0
    for name, parameter in chunk.named_parameters():
        parts = name.split(".")
        if parts[:2] == ["decoder", "layers"]:
            parts[2] = str(int(parts[2]) + offset)
        yield ".".join(parts), parameter


@torch.no_grad()
def initialize_weights(
    chunk: torch.nn.Module,
    config: ModelConfig,
    *,
    seed: int,
    tensor_rank: int,
    tensor_size: int,
    vocabulary_size: int,
) -> None:
    """Fill the parameters of one pipeline chunk.

    Norm weights become 1, biases 0; matrices are normal with ``init_method_std``, and see
    `scaled_output_init`; rows of the embedding and the output layer from `vocabulary_size` on are 0.
    """
    for name, parameter in global_parameter_names(chunk):
        if parameter.dim() == 1:
            parameter.fill_(0.0 if name.endswith(".bias") else 1.0)
            continue
        std = config.init_method_std
        if config.scaled_output_init and name.endswith(("linear_proj.weight", "linear_fc2.weight")):
            std /= math.sqrt(2 * config.num_layers)
        split = tensor_size if getattr(parameter, "tensor_model_parallel", False) else 1
        dimension = getattr(parameter, "partition_dim", 0)
        is_vocabulary = "word_embeddings" in name or "output_layer" in name
        limit = vocabulary_size if is_vocabulary else None
        _fill(name, parameter, std, seed, tensor_rank, split, dimension, limit)


def _fill(
    name: str,
    parameter: torch.Tensor,
    std: float,
    seed: int,
    rank: int,
    split: int,
    dimension: int,
    row_limit: int | None,
) -> None:
    rows, columns = parameter.shape
    if split == 1 or dimension == 1:
        parts = [(0, rows)]
    else:
        # A gated layer holds [gate; up], each split on its own.
        pieces = 2 if "linear_fc1" in name else 1
        size = rows // pieces
        parts = [(piece * size * split + rank * size, size) for piece in range(pieces)]
    if split > 1 and dimension == 1:
        whole, own = columns * split, slice(rank * columns, (rank + 1) * columns)
    else:
        whole, own = columns, slice(None)
    done = 0
    for begin, count in parts:
        for first, values in _rows(name, seed, begin, count, whole):
            if row_limit is not None and first + len(values) > row_limit:
                values[max(0, row_limit - first) :] = 0
            parameter[done : done + len(values)].copy_(values[:, own] * std)
            done += len(values)


def _rows(name: str, seed: int, begin: int, count: int, columns: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Standard normal rows from `begin`, block by block, each with the number of its first row."""
    block_rows = max(1, _BLOCK_ELEMENTS // columns)
    generator = torch.Generator()
    row = begin
    while row < begin + count:
        block = row // block_rows
        digest = hashlib.sha256(f"{seed}/{name}/{block}".encode()).digest()
        generator.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        values = torch.empty(block_rows, columns).normal_(generator=generator)
        stop = min((block + 1) * block_rows, begin + count)
        yield row, values[row - block * block_rows : stop - block * block_rows]
        row = stop
