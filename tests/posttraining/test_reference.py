"""Losses and gradients of every recipe equal a plain computation by transformers, document by document.

The reference sees neither windows, nor classes, nor our loss: each document goes alone through a Llama of
transformers with the same weights, and the weight of a label follows from what the document was written from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from emu3_megatron.parallel import platform

platform.install("cpu")

from emu3_megatron.data import Mixture, Plan, Source, Template  # noqa: E402
from emu3_megatron.data.loader import Batch  # noqa: E402
from emu3_megatron.model import ModelConfig, build_model  # noqa: E402
from emu3_megatron.parallel.config import ParallelConfig  # noqa: E402
from emu3_megatron.parallel.groups import destroy_parallel, initialize_parallel  # noqa: E402
from emu3_megatron.training.config import LossConfig, OptimizerConfig  # noqa: E402
from emu3_megatron.training.metrics import MetricsLayout  # noqa: E402
from emu3_megatron.training.objective import NextToken  # noqa: E402
from emu3_megatron.training.optimizer import wrap_for_data_parallelism  # noqa: E402
from emu3_megatron.training.step import ForwardBackward  # noqa: E402
from tests.posttraining.documents import (  # noqa: E402
    VOCABULARY,
    Segments,
    conversation,
    span,
    text,
    write_dataset,
)
from tests.posttraining.recipes import CODES_ONLY, PRETRAINING, TEXT_ONLY  # noqa: E402

TOLERANCE = 1e-5
CONTEXT, WINDOWS = 192, 4
HIDDEN, FFN, LAYERS, HEADS, GROUPS = 32, 48, 2, 4, 2
HEAD = HIDDEN // HEADS

Rule = Callable[[int, bool], float]
"""Weight of a label from its id and whether it was written as an answer, a caption or a text (or is EOS)."""


@dataclass(frozen=True)
class Recipe:
    """Sources, each with its template, weights, and the same weights said another way."""

    sources: tuple[tuple[str, Template, LossConfig, Rule], ...]


def _pretraining(label: int, _: bool) -> float:
    is_visual = label >= VOCABULARY.vision_offset or label in (VOCABULARY.eol, VOCABULARY.eof)
    return 0.5 if is_visual else 1.0


def _codes(label: int, _: bool) -> float:
    return float(label >= VOCABULARY.vision_offset)


def _said(_: int, said: bool) -> float:
    return float(said)


BEFORE, DROPPED, AFTER = (
    Template(),
    Template(caption_dropout=0.5),
    Template(caption_after_probability=1.0),
)
RECIPES = {
    "pre-training": Recipe((("pairs", DROPPED, PRETRAINING, _pretraining),)),
    "quality": Recipe((("pairs", DROPPED, CODES_ONLY, _codes),)),
    "understanding, stage 1": Recipe(
        (("pairs", AFTER, TEXT_ONLY, _said), ("texts", BEFORE, TEXT_ONLY, _said))
    ),
    "understanding, stage 2": Recipe((("talks", BEFORE, TEXT_ONLY, _said),)),
    "unified": Recipe((("pairs", BEFORE, CODES_ONLY, _codes), ("talks", BEFORE, TEXT_ONLY, _said))),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Datasets of pairs, texts and conversations."""
    folder = tmp_path_factory.mktemp("documents")
    words = ("a cat", "two dogs", "sea", "the old man")
    write_dataset(folder / "pairs", [[text(w), span(2, 2 + n, n)] for n, w in enumerate(words)])
    write_dataset(folder / "texts", [[text(w * 3)] for w in words])
    write_dataset(
        folder / "talks",
        [
            conversation(((0, "q"), w), ((1, 2, "and?"), "b"), (("r",), "bye"))
            if n % 2
            else conversation((("q",), w))
            for n, w in enumerate(words)
        ],
    )
    return folder


@pytest.fixture(scope="module")
def chunks() -> Iterator[list[Any]]:
    layout = ParallelConfig()
    initialize_parallel(layout, platform.install("cpu"), seed=1)
    shape = ModelConfig(
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        ffn_hidden_size=FFN,
        num_attention_heads=HEADS,
        num_query_groups=GROUPS,
        max_position_embeddings=CONTEXT,
        embedding_dropout=0.0,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        init_method_std=0.2,
    )
    model = build_model(
        shape,
        vocabulary_padded_size=VOCABULARY.padded_size,
        vocabulary_size=VOCABULARY.size,
        parallel=layout,
        seed=3,
        precision="fp32",
    )
    yield wrap_for_data_parallelism(model, OptimizerConfig(use_distributed_optimizer=False))
    destroy_parallel()


def as_llama(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our tensors (weights or gradients) under the names and in the order of transformers' Llama."""
    result = {
        "model.embed_tokens.weight": tensors["embedding.word_embeddings.weight"][: VOCABULARY.size],
        "model.norm.weight": tensors["decoder.final_layernorm.weight"],
        "lm_head.weight": tensors["output_layer.weight"][: VOCABULARY.size],
    }
    for number in range(LAYERS):
        ours, theirs = f"decoder.layers.{number}.", f"model.layers.{number}."
        per_group = HEADS // GROUPS + 2
        qkv = tensors[ours + "self_attention.linear_qkv.weight"].view(GROUPS, per_group, HEAD, HIDDEN)
        gate, up = tensors[ours + "mlp.linear_fc1.weight"].chunk(2)
        result |= {
            f"{theirs}input_layernorm.weight": tensors[ours + "input_layernorm.weight"],
            f"{theirs}self_attn.q_proj.weight": qkv[:, :-2].reshape(-1, HIDDEN),
            f"{theirs}self_attn.k_proj.weight": qkv[:, -2].reshape(-1, HIDDEN),
            f"{theirs}self_attn.v_proj.weight": qkv[:, -1].reshape(-1, HIDDEN),
            f"{theirs}self_attn.o_proj.weight": tensors[ours + "self_attention.linear_proj.weight"],
            f"{theirs}post_attention_layernorm.weight": tensors[ours + "pre_mlp_layernorm.weight"],
            f"{theirs}mlp.gate_proj.weight": gate,
            f"{theirs}mlp.up_proj.weight": up,
            f"{theirs}mlp.down_proj.weight": tensors[ours + "mlp.linear_fc2.weight"],
        }
    return result


def llama(chunks: list[Any]) -> torch.nn.Module:
    """transformers' Llama with our weights."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY.size,
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5,
        rope_theta=1e6,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    model = transformers.LlamaForCausalLM(config)
    weights = {name: p.detach().clone() for name, p in chunks[0].module.named_parameters()}
    model.load_state_dict(as_llama(weights), strict=True)
    return model


def written(
    segments: Segments, template: Template, *, after: bool, kept: int
) -> tuple[list[int], list[bool]]:
    """A document as ids, and which of them were said by the model; spelled out again, without `Template`."""
    pair = [mode for _, mode in segments] == [0, 1]
    parts = list(segments)
    if pair:
        (caption, _), picture = parts
        parts = [picture, (caption, 0)] if after else [(caption[:kept], 0), picture]
    ids, said = [VOCABULARY.bos], [False]
    for tokens, mode in parts:
        ids += tokens.tolist()
        said += [mode == 0] * len(tokens)
    return [*ids, VOCABULARY.eos], [*said, True]


def reference(plan: Plan, recipe: Recipe, model: torch.nn.Module) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients, document by document."""
    total, weight_total = torch.zeros(()), 0.0
    for index in range(WINDOWS):
        window = plan.window(index)
        for place in np.flatnonzero(window.source >= 0).tolist():
            first, length = int(window.cu_seqlens[place]), int(window.length[place])
            _, template, _, rule = recipe.sources[int(window.source[place])]
            dataset = plan.mixture.sources[int(window.source[place])].dataset
            segments = dataset.document(int(window.document[place]))
            kept = len(segments[0][0])
            after = template.caption_after_probability == 1.0
            if length < sum(len(ids) for ids, _ in segments) + 2 and not after:
                kept = 0  # the caption was dropped
            ids, said = written(segments, template, after=after, kept=kept)
            assert ids == window.tokens[first : first + length].tolist()
            logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            for position, (label, is_said) in enumerate(zip(ids[1:], said[1:], strict=True)):
                weight = rule(label, is_said)
                total = total - weight * logits[position, label]
                weight_total += weight
    loss = total / weight_total
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return loss.item(), gradients


@pytest.mark.parametrize("name", RECIPES)
def test_losses_and_gradients_equal_a_plain_computation(folder: Path, chunks: list[Any], name: str) -> None:
    recipe = RECIPES[name]
    sources = [Source(path=str(folder / each[0]), template=each[1]) for each in recipe.sources]
    plan = Plan(Mixture(sources), seed=2, context_length=CONTEXT, block_draws=64)
    losses = [each[2] for each in recipe.sources]
    objective = NextToken(losses, end_token=VOCABULARY.eos, device=torch.device("cpu"))
    layout = MetricsLayout(tuple(plan.mixture.names))
    chunks[0].zero_grad_buffer()
    batches = [Batch.collate([plan.window(index), plan.window(index + 1)]) for index in (0, 2)]
    sums, extras = ForwardBackward(chunks, objective, layout, device=torch.device("cpu"))(batches)
    ours = {name: p.main_grad for name, p in chunks[0].module.named_parameters()}
    loss, gradients = reference(plan, recipe, llama(chunks))
    value = objective.value(layout.totals(layout.vector(sums, extras)))
    assert value == pytest.approx(loss, rel=TOLERANCE)
    for key, expected in gradients.items():
        torch.testing.assert_close(as_llama(ours)[key], expected, rtol=TOLERANCE, atol=TOLERANCE)
