"""Requests that join and leave a session while others run."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from emu3_megatron.inference.engine import Engine, Request
from emu3_megatron.inference.sampling import Sampling
from tests.inference import worlds
from tests.inference.test_engine import image_request


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with worlds.one_process():
        yield Engine(worlds.tiny_model(), worlds.dialect())


def requests(count: int) -> list:
    return [
        image_request(
            "red"[: 1 + index % 3],
            height=2 + index % 3,
            seed=index,
            max_new_tokens=40,
            sampling=Sampling(guidance=[1.0, 2.0][index % 2]),
        )
        for index in range(count)
    ]


def test_requests_join_at_any_step(engine: Engine) -> None:
    """A request that comes while others run gets what it gets alone, and its tokens as they come."""
    session = engine.session(max_rows=5, max_length=80)
    waiting, tickets, told = requests(7), [], []
    while waiting or session.busy:
        if waiting:
            told.append([])
            tickets.append(session.submit(waiting.pop(0), told[-1].extend))
        for _ in range(3):
            session.step()
    for request, ticket, tokens in zip(requests(7), tickets, told, strict=True):
        (alone,) = engine.generate([request])
        np.testing.assert_array_equal(ticket.completion().ids, alone.ids)
        assert tokens == alone.ids.tolist()
        assert ticket.finished


def test_cancelled_requests_leave_their_rows_to_others(engine: Engine) -> None:
    """One that runs, one that waits; the third gets what it gets alone, and the session comes to rest."""
    session = engine.session(max_rows=2, max_length=80)
    running, waiting, last = (session.submit(request) for request in requests(6)[1::2])
    session.step()
    begun = len(running.new)
    session.cancel(running)
    session.cancel(waiting)
    while session.busy:
        session.step()
    assert (len(running.new), waiting.new) == (begun, [])
    assert [running.finished, waiting.finished, last.finished] == [False, False, True]
    (alone,) = engine.generate(requests(6)[5:])
    np.testing.assert_array_equal(last.completion().ids, alone.ids)


def test_what_does_not_fit_is_refused(engine: Engine) -> None:
    session = engine.session(max_rows=1, max_length=80)
    with pytest.raises(ValueError, match="2 rows"):
        session.submit(image_request("red", max_new_tokens=40, sampling=Sampling(guidance=2.0)))
    with pytest.raises(ValueError, match="fewer tokens"):
        session.submit(image_request("red", max_new_tokens=100, sampling=Sampling()))
    with pytest.raises(ValueError, match="position 1"):
        session.submit(
            Request(prompt=np.array([worlds.VOCABULARY.bos, worlds.VOCABULARY.eoi]), max_new_tokens=1)
        )
    assert not session.busy


def test_a_cache_of_another_dtype(engine: Engine) -> None:
    """A wider cache changes nothing that greedy decoding could see."""
    wide = Engine(engine.model, engine.dialect, cache_dtype=torch.float64)
    greedy = [image_request("red", sampling=Sampling(temperature=0, guidance=scale)) for scale in (1.0, 2.0)]
    for left, right in zip(engine.generate(greedy), wide.generate(greedy), strict=True):
        np.testing.assert_array_equal(left.ids, right.ids)
