"""The engine against `generate` of transformers: the same weights give the same tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from emu3_megatron.inference.sampling import Sampling
from tests.inference import worlds
from tests.inference.test_engine import image_request

SIZES = [(1, 1), (2, 7), (5, 3), (6, 6), (4, 9)]
TIE = 1e-4
"""Where the two best logits are closer than this, either may be taken."""


@pytest.fixture(scope="module", autouse=True)
def _world() -> Iterator[None]:
    with worlds.one_process():
        yield


def twins(seed: int) -> tuple[Any, Any]:
    """A random model of ours and transformers' with the same weights."""
    from emu3_megatron.conversion import LAYOUTS, WeightMap
    from emu3_megatron.conversion.configuration import architecture, text_config

    config = worlds.model_config()
    ours = worlds.tiny_model(config, seed=seed)
    values = text_config(config, worlds.VOCABULARY, "float32")
    theirs = transformers.Emu3ForCausalLM(
        transformers.models.emu3.configuration_emu3.Emu3TextConfig(**values)
    )
    weight_map = WeightMap(architecture(config, worlds.VOCABULARY), LAYOUTS["emu3"])
    theirs.load_state_dict(dict(weight_map.to_hugging_face(ours.state_dict())))
    theirs.generation_config.eos_token_id = worlds.VOCABULARY.eoi
    return ours, theirs.eval()


def greedy(model: Any, request: Any, after: list[int]) -> list[int]:
    """What transformers generates after the prompt and `after`.

    The negative prompt ends in the same span head as the prompt: in transformers' own example it does not,
    and the two streams are at different places of the grammar.
    """
    automaton = worlds.dialect().automaton()
    prompt, negative = (np.concatenate([ids, after]) for ids in (request.prompt, request.negative_prompt))

    def allowed(_: int, ids: torch.Tensor) -> list[int]:
        return automaton.allowed(automaton.start(ids.numpy())).ids().tolist()

    guidance = request.sampling.guidance
    guided = {"guidance_scale": guidance, "negative_prompt_ids": torch.from_numpy(negative)[None].long()}
    out = model.generate(
        torch.from_numpy(prompt)[None].long(),
        do_sample=False,
        max_new_tokens=100,
        prefix_allowed_tokens_fn=allowed,
        **(guided if guidance != 1 else {}),
    )
    return out[0, len(prompt) :].tolist()


def margin(model: Any, request: Any, after: list[int]) -> float:
    """How far the two best guided logits of vision tokens are apart after `after`."""
    prompts = (request.prompt, request.negative_prompt)
    ids = [torch.from_numpy(np.concatenate([start, after])).long()[None] for start in prompts]
    with torch.no_grad():
        one, other = (model(each).logits[0, -1, worlds.VOCABULARY.vision_offset :] for each in ids)
    best = (other + request.sampling.guidance * (one - other)).topk(2).values
    return float(best[0] - best[1])


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_greedy_tokens_are_those_of_transformers(seed: int, guidance: float) -> None:
    """Images of five sizes as one batch of ours, one by one there; near ties are counted, and few."""
    from emu3_megatron.inference.engine import Engine

    ours, theirs = twins(seed)
    requests = [
        image_request("a red square"[: 3 + i], *size, sampling=Sampling(temperature=0, guidance=guidance))
        for i, size in enumerate(SIZES)
    ]
    ties = 0
    for request, completion in zip(requests, Engine(ours, worlds.dialect()).generate(requests), strict=True):
        assert completion.finished
        expected = completion.ids.tolist()
        same = 0
        while (rest := greedy(theirs, request, expected[:same])) != expected[same:]:
            same += next(
                i for i, pair in enumerate(zip(rest, expected[same:], strict=True)) if len(set(pair)) > 1
            )
            assert margin(theirs, request, expected[:same]) < TIE, f"token {same} of {len(expected)}"
            same, ties = same + 1, ties + 1
    assert ties <= 1
