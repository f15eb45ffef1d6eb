"""Generation by random models in every dialect, and whether the grammar takes the results."""

from __future__ import annotations

import numpy as np

from emu3_megatron.grammar import Image, Video
from emu3_megatron.inference.engine import Engine, Request
from emu3_megatron.inference.sampling import Sampling
from tests.inference import worlds

DIALECTS = ("emu3", "emu3-frames", "emu3.5")
REQUESTS = 5
"""Per model: spans of random sizes, and one document from nothing."""


def random_sampling(generator: np.random.Generator) -> Sampling:
    """Any temperature, cut and guidance."""
    return Sampling(
        temperature=float(generator.choice([0.0, 0.3, 1.0, 5.0])),
        top_k=[None, 1, 7, 2048][generator.integers(4)],
        top_p=float(generator.choice([0.1, 0.9, 1.0])),
        min_p=float(generator.choice([0.0, 0.2])),
        guidance=float(generator.choice([0.0, 1.0, 3.0, 9.0])),
    )


def faults(seed: int) -> list[str]:
    """What a random model of some shape, dialect and sizes writes that its grammar does not take."""
    generator = np.random.default_rng(seed)
    config = worlds.model_config(
        num_layers=int(generator.integers(1, 3)),
        hidden_size=int(generator.choice([16, 32])),
        num_query_groups=int(generator.choice([1, 2, 4])),
        init_method_std=float(generator.choice([0.02, 0.3, 3.0])),
    )
    dialect = worlds.dialect(DIALECTS[seed % len(DIALECTS)])
    vocabulary = dialect.vocabulary
    engine = Engine(worlds.tiny_model(config, seed=seed), dialect, max_rows=int(generator.integers(2, 9)))
    requests, sizes = [], []
    for number in range(REQUESTS - 1):
        height, width, frames = (int(n) for n in generator.integers(1, 7, 3))
        video = bool(generator.integers(2)) and dialect.rules.video is not None
        more = {"frames": frames, "fps": 12.0, "seconds": 1.5} if video else {}
        span = dialect.open_span(height, width, **more)
        words = "abc"[: generator.integers(4)]
        sampling = random_sampling(generator)
        negative = np.concatenate([[vocabulary.bos], span])
        requests.append(
            Request(
                prompt=np.concatenate([[vocabulary.bos], dialect.encode_text(words), span]),
                negative_prompt=negative if sampling.guidance != 1 else None,
                sampling=sampling,
                seed=int(generator.integers(2**31)) + number,
                stop=frozenset([vocabulary.eoi]),
            )
        )
        sizes.append((frames, height, width) if video else (height, width))
    free = Request(
        prompt=np.array([vocabulary.bos]), seed=seed, max_new_tokens=int(generator.integers(1, 50))
    )
    found = []
    everything = [*requests, free]
    for request, size, completion in zip(
        everything, [*sizes, None], engine.generate(everything), strict=True
    ):
        ids = np.concatenate([request.prompt, completion.ids])
        try:
            if size is None and not completion.finished:
                dialect.automaton().start(ids)
                continue
            document = dialect.parse(ids if size is None else np.append(ids, vocabulary.eos))
        except ValueError as error:
            found.append(f"model {seed}: {error}")
            continue
        if size is not None:
            (span,) = (part for part in document.segments if isinstance(part, Image | Video))
            if span.codes.shape != size:
                found.append(f"model {seed}: a span of {span.codes.shape}, {size} was asked for")
    return found
