"""Tiny models and a tokenizer for the tests of generation and conversion."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from emu3_megatron.grammar import Dialect
from emu3_megatron.model import ModelConfig, build_model
from emu3_megatron.parallel import platform
from emu3_megatron.parallel.config import ParallelConfig
from emu3_megatron.parallel.groups import destroy_parallel, initialize_parallel
from emu3_megatron.vocabulary import Vocabulary

VOCABULARY = Vocabulary.build("test", text_size=128, codebook_size=64)


class AsciiTokenizer:
    """One id per ASCII character."""

    size = 128
    fingerprint = "ascii"

    def normalize(self, text: str) -> str:
        return text.encode("ascii", "ignore").decode()

    def encode(self, text: str) -> list[int]:
        return list(text.encode("ascii", "ignore"))

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode("ascii", "replace")


def dialect(name: str = "emu3") -> Dialect:
    return Dialect.preset(name, VOCABULARY, AsciiTokenizer())


def model_config(**overrides: object) -> ModelConfig:
    fields = {
        "num_layers": 2,
        "hidden_size": 32,
        "ffn_hidden_size": 48,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "init_method_std": 0.3,
        "max_position_embeddings": 512,
    }
    return ModelConfig.preset("tiny", **{**fields, **overrides})


def tiny_model(config: ModelConfig | None = None, *, seed: int = 0, parallel: ParallelConfig | None = None):
    """A model with random weights large enough that its choices are not uniform."""
    config = config or model_config()
    (model,) = build_model(
        config,
        vocabulary_padded_size=VOCABULARY.padded_size,
        vocabulary_size=VOCABULARY.size,
        parallel=parallel or ParallelConfig(),
        seed=seed,
        precision="fp32",
    )
    return model.eval()


@contextmanager
def one_process() -> Iterator[None]:
    """A world of one process on the CPU."""
    torch.set_num_threads(1)
    initialize_parallel(ParallelConfig(), platform.install("cpu"), seed=0)
    try:
        yield
    finally:
        destroy_parallel()
