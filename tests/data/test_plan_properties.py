"""What holds of any plan: every document once an epoch, no source further than a document from its share."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from emu3_megatron.data import DatasetWriter, Mixture, Plan, Source
from emu3_megatron.data.plan import SHARE_BITS
from tests.data.builders import VOCABULARY, make_span, make_text

CONTEXT_LENGTH = 64

TEXTS = st.tuples(st.integers(1, 200), st.just(0))
"""Tokens of a text, which may be longer than a window."""

PAIRS = st.tuples(st.integers(1, 20), st.integers(1, 30))
"""Tokens of a caption, codes of a span."""


def write(folder: Path, name: str, documents: list[tuple[int, int]]) -> str:
    rng = np.random.default_rng(len(documents))
    with DatasetWriter(folder / name, name, vocabulary=VOCABULARY, num_shards=2) as writer:
        for number, (text, codes) in enumerate(documents):
            span = [(make_span(rng, codes), 1)] if codes else []
            writer.add_document([(make_text(rng, text), 0), *span], f"{name}-{number}")
    return str(folder / name)


@settings(max_examples=25, deadline=None)
@given(
    documents=st.lists(TEXTS | PAIRS, min_size=1, max_size=40),
    block_draws=st.integers(1, 50),
    blocks=st.integers(1, 6),
    seed=st.integers(0, 2**32),
    policy=st.sampled_from(["online", "offline"]),
    fill=st.booleans(),
)
def test_every_epoch_holds_every_document_once(
    tmp_path_factory, documents, block_draws: int, blocks: int, seed: int, policy, fill: bool
) -> None:
    """Wherever blocks and epochs end: blocks hold whole epochs and a part of one, in which no document comes
    twice; and all tokens of what is drawn are in the windows."""
    path = write(tmp_path_factory.mktemp("plan"), "a", documents)
    plan = Plan(
        Mixture([Source(path=path)]), seed=seed, context_length=CONTEXT_LENGTH, block_draws=block_draws,
        policy=policy, fill=fill, min_piece=2,
    )  # fmt: skip
    begun: Counter[int] = Counter()
    tokens: Counter[int] = Counter()
    for number in range(blocks):
        block = plan.block(number)
        begun.update(block.document[block.start == 0].tolist())
        for document, length in zip(block.document.tolist(), block.length.tolist(), strict=True):
            tokens[document] += length
    epochs, part = divmod(blocks * block_draws, len(documents))
    assert sum(begun.values()) == blocks * block_draws
    counts = [begun[document] for document in range(len(documents))]
    assert sorted(counts) == [epochs] * (len(documents) - part) + [epochs + 1] * part
    lengths = [sum(plan.mixture.sources[0].dataset.lengths(number)) + 2 for number in range(len(documents))]
    assert [tokens[number] for number in range(len(documents))] == [
        count * length for count, length in zip(counts, lengths, strict=True)
    ]


@settings(max_examples=25, deadline=None)
@given(
    sources=st.lists(
        st.tuples(st.lists(TEXTS | PAIRS, min_size=1, max_size=12), st.floats(0.01, 100.0)),
        min_size=1,
        max_size=4,
    ),
    block_draws=st.integers(1, 60),
    seed=st.integers(0, 2**32),
)
def test_sources_are_drawn_within_one_document_of_the_target(
    tmp_path_factory, sources, block_draws: int, seed: int
) -> None:
    """At the end of every block; the target is the share of draws that gives the share of tokens."""
    folder = tmp_path_factory.mktemp("plan")
    mixture = Mixture(
        [
            Source(path=write(folder, f"s{number}", documents), weight=weight)
            for number, (documents, weight) in enumerate(sources)
        ]
    )
    plan = Plan(mixture, seed=seed, context_length=CONTEXT_LENGTH, block_draws=block_draws)
    shares = mixture.draw_shares(capacity=CONTEXT_LENGTH)
    means = [np.mean([text + codes + (8 if codes else 0) + 2 for text, codes in each]) for each, _ in sources]
    weights = np.array([weight for _, weight in sources])
    tokens = np.array([float(share) for share in shares]) * means
    np.testing.assert_allclose(tokens / tokens.sum(), weights / weights.sum(), rtol=1e-9)
    drawn = [0] * len(sources)
    for number in range(12):
        here = [len(each.document) for each in plan._draw(number)]
        drawn = [total + more for total, more in zip(drawn, here, strict=True)]
        targets = [share * block_draws * (number + 1) for share in shares]
        assert all(abs(total - target) <= 1 for total, target in zip(drawn, targets, strict=True))
    far = 10**9
    here = [len(each.document) for each in plan._draw(far)]
    rounding = Fraction(far * block_draws, 2**SHARE_BITS)
    assert all(
        abs(count - share * block_draws) <= 1 + rounding for count, share in zip(here, shares, strict=True)
    )
