"""Properties of the generation engine on tiny random models."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from emu3_megatron.grammar import Image, Text, Video
from emu3_megatron.inference.sampling import Sampling
from tests.inference import worlds


@pytest.fixture(scope="module", autouse=True)
def _world() -> Iterator[None]:
    with worlds.one_process():
        yield


@pytest.fixture(scope="module")
def model():
    return worlds.tiny_model()


@pytest.fixture(scope="module")
def engine(model):
    from emu3_megatron.inference.engine import Engine

    return Engine(model, worlds.dialect())


def image_request(text: str, height: int = 3, width: int = 4, **fields):
    """A request for one image; guided ones get the empty text as negative prompt."""
    from emu3_megatron.inference.engine import Request

    dialect = worlds.dialect()

    def prompt(text: str) -> np.ndarray:
        bos = np.array([dialect.vocabulary.bos])
        return np.concatenate([bos, dialect.encode_text(text), dialect.open_span(height, width)])

    fields.setdefault("stop", frozenset([dialect.vocabulary.eoi]))
    return Request(prompt=prompt(text), negative_prompt=prompt(""), **fields)


def whole_logits(model, ids: np.ndarray) -> torch.Tensor:
    """Logits of a sequence by the training forward pass: fp32 [N, vocabulary size]."""
    from emu3_megatron.parallel.context import packed_sequence_parameters

    tokens = torch.from_numpy(ids)[None]
    parameters = packed_sequence_parameters(torch.tensor([0, len(ids)], dtype=torch.int32))
    with torch.no_grad():
        return model(tokens, packed_seq_params=parameters, logits="all")[0]


def test_cached_logits_equal_uncached(model) -> None:
    """Any split of sequences of different lengths into feeds gives the logits of the whole sequence."""
    from emu3_megatron.inference.decoder import CachedDecoder

    generator = np.random.default_rng(0)
    sequences = [generator.integers(0, worlds.VOCABULARY.size, length) for length in (9, 14, 11)]
    decoder = CachedDecoder(model, max_rows=3, max_length=16)
    seen = [0, 0, 0]
    for counts in ([4, 7, 1], [1, 1, 1], [3, 2, 5], [1, 4, 4]):
        tokens = np.zeros((3, max(counts)), dtype=np.int64)
        for row, count in enumerate(counts):
            tokens[row, :count] = sequences[row][seen[row] : seen[row] + count]
        hidden = decoder.feed(torch.from_numpy(tokens), torch.tensor(seen), torch.tensor(counts))
        logits = decoder.logits(hidden, ((0, worlds.VOCABULARY.size),))
        seen = [a + b for a, b in zip(seen, counts, strict=True)]
        for row, length in enumerate(seen):
            expected = whole_logits(model, sequences[row][:length])[-1]
            torch.testing.assert_close(logits[row], expected, atol=1e-5, rtol=1e-4)


def test_logits_of_ranges_are_slices_of_all_logits(model) -> None:
    from emu3_megatron.inference.decoder import CachedDecoder

    decoder = CachedDecoder(model, max_rows=2, max_length=8)
    hidden = torch.randn(2, model.config.hidden_size)
    everything = decoder.logits(hidden, ((0, worlds.VOCABULARY.size),))
    some = decoder.logits(hidden, ((3, 7), (200, 230)))
    torch.testing.assert_close(some, torch.cat([everything[:, 3:7], everything[:, 200:230]], dim=1))


def test_moved_rows_keep_their_cache(model) -> None:
    from emu3_megatron.inference.decoder import CachedDecoder

    decoder = CachedDecoder(model, max_rows=4, max_length=8)
    tokens, zero, one = (
        torch.arange(12).view(4, 3),
        torch.zeros(4, dtype=torch.long),
        torch.ones(4, dtype=torch.long),
    )
    decoder.feed(tokens, zero, zero + 3)
    expected = decoder.feed(torch.full((4, 1), 5), zero + 3, one)[[1, 3]]
    decoder.keep_rows([1, 3])
    moved = decoder.feed(torch.full((2, 1), 5), zero[:2] + 3, one[:2])
    torch.testing.assert_close(moved, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_batched_equals_alone(engine, guidance: float, temperature: float) -> None:
    """Prompts, sizes, seeds and settings of the neighbours change nothing."""
    requests = [
        image_request(
            "a red square on a blue ground"[: 3 + 4 * index],
            height=1 + index % 3,
            width=2 + index % 2,
            seed=index,
            sampling=Sampling(
                guidance=guidance,
                temperature=temperature,
                top_k=[None, 5, 20][index % 3],
                top_p=[1.0, 0.9][index % 2],
                min_p=[0.0, 0.01][index % 2],
            ),
        )
        for index in range(7)
    ]
    together = engine.generate(requests)
    for request, completion in zip(requests, together, strict=True):
        (alone,) = engine.generate([request])
        np.testing.assert_array_equal(alone.ids, completion.ids)
        assert completion.finished


def test_few_rows_give_the_same_results(model) -> None:
    """Requests that wait for a free row, and rows that are reused, change nothing."""
    from emu3_megatron.inference.engine import Engine

    requests = [
        image_request(
            "x" * (1 + index % 5),
            height=1 + index % 4,
            seed=index,
            sampling=Sampling(guidance=[1.0, 2.0][index % 2]),
        )
        for index in range(12)
    ]
    many = Engine(model, worlds.dialect(), max_rows=64).generate(requests)
    finished = []
    few = Engine(model, worlds.dialect(), max_rows=3).generate(requests, progress=finished.append)
    assert sum(finished) == len(requests)
    for left, right in zip(many, few, strict=True):
        np.testing.assert_array_equal(left.ids, right.ids)


def test_guided_batch_equals_two_forward_passes(model, engine) -> None:
    """Greedy guidance picks the best of the logits of two separate, uncached forward passes at every step."""
    request = image_request("red", height=2, width=3, sampling=Sampling(guidance=2.5, temperature=0.0))
    (completion,) = engine.generate([request])
    vocabulary = worlds.VOCABULARY
    conditional, unconditional = list(request.prompt), list(request.negative_prompt)
    for token in completion.ids.tolist():
        if token >= vocabulary.vision_offset:
            one, other = (whole_logits(model, np.array(ids))[-1] for ids in (conditional, unconditional))
            guided = (other + 2.5 * (one - other))[vocabulary.vision_offset :]
            assert token == vocabulary.vision_offset + int(guided.argmax())
        conditional.append(token)
        unconditional.append(token)


def test_scale_of_one_turns_guidance_off(engine) -> None:
    plain = image_request("red", sampling=Sampling(guidance=1.0, temperature=0.0))
    nearly = replace(plain, sampling=Sampling(guidance=1.0 + 1e-9, temperature=0.0))
    np.testing.assert_array_equal(engine.generate([plain])[0].ids, engine.generate([nearly])[0].ids)


@pytest.mark.parametrize("name", ["emu3", "emu3-frames", "emu3.5"])
def test_generated_sequences_parse(name: str) -> None:
    """Whatever the weights, sizes and seeds, the grammar accepts the result and it has the size asked for."""
    from emu3_megatron.inference.engine import Engine, Request

    dialect = worlds.dialect(name)
    generator = np.random.default_rng(1)
    for seed in range(5):
        engine = Engine(worlds.tiny_model(seed=seed), dialect, max_rows=8)
        requests = []
        sizes = []
        for index in range(6):
            height, width, frames = (int(n) for n in generator.integers(1, 5, 3))
            video = index % 2 == 1 and dialect.rules.video is not None
            more = {"frames": frames, "fps": 12.0, "seconds": 1.5} if video else {}
            sizes.append((frames, height, width) if video else (height, width))
            prompt = np.concatenate(
                [
                    [dialect.vocabulary.bos],
                    dialect.encode_text("go"),
                    dialect.open_span(height, width, **more),
                ]
            )
            requests.append(Request(prompt=prompt, seed=index, stop=frozenset([dialect.vocabulary.eoi])))
        for request, size, completion in zip(requests, sizes, engine.generate(requests), strict=True):
            ids = np.concatenate([request.prompt, completion.ids, [dialect.vocabulary.eos]])
            text, span = dialect.parse(ids).segments
            assert text == Text("go")
            assert isinstance(span, Image | Video)
            assert span.codes.shape == size


@pytest.mark.slow
def test_sequences_of_random_models_parse() -> None:
    """Random shapes, weights, dialects, sizes and samplers; the proof ``generated-grammar`` runs 1,000."""
    from tests.inference.random_models import faults

    assert [fault for seed in range(60) for fault in faults(seed)] == []


def test_free_documents_parse(model) -> None:
    """Without any prompt but BOS the model may write text and spans of its own size; it stays in the
    grammar."""
    from emu3_megatron.inference.engine import Engine, Request

    dialect = worlds.dialect()
    requests = [
        Request(prompt=np.array([dialect.vocabulary.bos]), seed=seed, max_new_tokens=60) for seed in range(20)
    ]
    finished = 0
    for request, completion in zip(requests, Engine(model, dialect).generate(requests), strict=True):
        ids = np.concatenate([request.prompt, completion.ids])
        assert len(completion.ids) <= 60
        if completion.finished:
            finished += 1
            dialect.parse(ids)
        else:
            dialect.automaton().start(ids)
    assert finished


def test_forced_tokens_are_not_sampled(engine) -> None:
    (completion,) = engine.generate([image_request("red", height=3, width=4)])
    assert completion.sampled == 12
    assert len(completion.ids) == 3 * (4 + 1) + 2


def test_seed_decides(engine) -> None:
    requests = [image_request("red", seed=seed) for seed in (7, 7, 8)]
    first, second, other = engine.generate(requests)
    np.testing.assert_array_equal(first.ids, second.ids)
    assert not np.array_equal(first.ids, other.ids)


def test_forbidden_ids_are_never_produced(model) -> None:
    from emu3_megatron.inference.engine import Engine, Request

    dialect = worlds.dialect()
    vocabulary = dialect.vocabulary
    forbidden = frozenset([vocabulary.boi, *range(64)])
    requests = [
        Request(prompt=np.array([vocabulary.bos]), seed=seed, max_new_tokens=30, forbidden=forbidden)
        for seed in range(8)
    ]
    for completion in Engine(model, dialect).generate(requests):
        assert not forbidden & set(completion.ids.tolist())


def test_a_long_prompt_is_fed_in_pieces(model, monkeypatch: pytest.MonkeyPatch) -> None:
    from emu3_megatron.inference import engine as module
    from emu3_megatron.inference import session

    dialect = worlds.dialect()
    requests = [image_request("long " * 40, seed=1), image_request("short", seed=2)]
    whole = module.Engine(model, dialect).generate(requests)
    monkeypatch.setattr(session, "PREFILL_TOKENS", 2)
    for left, right in zip(whole, module.Engine(model, dialect).generate(requests), strict=True):
        np.testing.assert_array_equal(left.ids, right.ids)


def test_training_mode_is_restored(model) -> None:
    from emu3_megatron.inference.engine import Engine

    model.train()
    Engine(model, worlds.dialect()).generate([image_request("red")])
    assert model.training
    model.eval()


def test_one_row_is_enough_without_guidance(model, engine) -> None:
    """Captions are never guided; a guided request is told what it lacks."""
    from emu3_megatron.inference.engine import Engine

    single = Engine(model, worlds.dialect(), max_rows=1)
    requests = [image_request("red", seed=seed, sampling=Sampling(guidance=1.0)) for seed in range(2)]
    for found, expected in zip(single.generate(requests), engine.generate(requests), strict=True):
        np.testing.assert_array_equal(found.ids, expected.ids)
    with pytest.raises(ValueError, match="a guided request takes two"):
        single.generate([image_request("red", sampling=Sampling(guidance=2.0))])


def test_bad_requests_are_refused(model, engine) -> None:
    from emu3_megatron.inference.engine import Engine, Request

    with pytest.raises(ValueError, match="at least one token"):
        Request(prompt=np.array([], dtype=np.int64))
    with pytest.raises(ValueError, match="negative_prompt"):
        Request(prompt=np.array([1]), sampling=Sampling(guidance=2.0))
    with pytest.raises(ValueError, match="max_new_tokens"):
        Request(prompt=np.array([1]), max_new_tokens=0)
    with pytest.raises(ValueError, match="at least 1"):
        Engine(model, worlds.dialect(), max_rows=0)
    with pytest.raises(ValueError, match="position 1"):
        engine.generate([Request(prompt=np.array([worlds.VOCABULARY.bos, worlds.VOCABULARY.eoi]))])
    everything = frozenset(range(worlds.VOCABULARY.size))
    with pytest.raises(ValueError, match="forbids"):
        engine.generate([Request(prompt=np.array([worlds.VOCABULARY.bos]), forbidden=everything)])
