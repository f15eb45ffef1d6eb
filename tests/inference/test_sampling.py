"""Properties of drawing a token."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from emu3_megatron.inference.sampling import Sampling, UniformStream, _sample_together, guide, sample

LOGITS = torch.log(torch.tensor([[0.05, 0.4, 0.1, 0.3, 0.15]]))


def frequencies(settings: Sampling, count: int = 4000) -> np.ndarray:
    stream = UniformStream(0)
    drawn = sample(LOGITS.expand(count, -1), [settings] * count, [stream.next() for _ in range(count)])
    return np.bincount(drawn.numpy(), minlength=5) / count


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (Sampling(), [0.05, 0.4, 0.1, 0.3, 0.15]),
        (Sampling(top_k=None), [0.05, 0.4, 0.1, 0.3, 0.15]),
        (Sampling(top_k=2), [0, 4 / 7, 0, 3 / 7, 0]),
        (Sampling(top_k=1), [0, 1, 0, 0, 0]),
        (Sampling(top_p=0.6), [0, 4 / 7, 0, 3 / 7, 0]),
        (Sampling(top_p=0.01), [0, 1, 0, 0, 0]),
        (Sampling(min_p=0.3), [0, 8 / 17, 0, 6 / 17, 3 / 17]),
        (Sampling(top_k=3, top_p=0.5), [0, 4 / 7, 0, 3 / 7, 0]),
        (Sampling(temperature=0.5), np.array([0.0025, 0.16, 0.01, 0.09, 0.0225]) / 0.285),
        (Sampling(temperature=0.0), [0, 1, 0, 0, 0]),
    ],
)
def test_frequencies_are_the_probabilities(settings: Sampling, expected: list[float]) -> None:
    measured = frequencies(settings)
    np.testing.assert_allclose(measured, expected, atol=0.03)
    assert not measured[np.asarray(expected) == 0].any()


def test_rows_have_settings_of_their_own() -> None:
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    settings = [
        Sampling(temperature=0),
        Sampling(top_k=3),
        Sampling(top_k=None, top_p=0.5),
        Sampling(min_p=0.2),
    ]
    uniforms = [0.3, 0.9, 0.99, 0.5]
    together = sample(logits, settings, uniforms)
    alone = [int(sample(logits[i : i + 1], [settings[i]], [uniforms[i]])) for i in range(4)]
    assert together.tolist() == alone


def test_rows_are_drawn_alike_on_all_devices() -> None:
    """On a CPU rows are drawn one by one, elsewhere together: by the same rule."""
    generator = torch.Generator().manual_seed(0)
    settings = [
        Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
        for temperature in (0.0, 0.7, 1.0)
        for top_k in (None, 1, 20)
        for top_p in (0.5, 1.0)
        for min_p in (0.0, 0.1)
    ]
    logits = torch.randn(len(settings), 50, generator=generator).mul_(8).round_().div_(4)  # with ties
    greedy = torch.tensor([each.temperature == 0 for each in settings])
    for uniforms in torch.rand(20, len(settings), generator=generator).tolist():
        together = _sample_together(logits, settings, uniforms, greedy)
        assert sample(logits, settings, uniforms).tolist() == together.tolist()


def test_the_ends_of_the_interval_stay_inside() -> None:
    for uniform in (0.0, np.nextafter(1.0, 0.0)):
        assert int(sample(LOGITS, [Sampling(top_k=2)], [uniform])) in (1, 3)


def test_streams_depend_on_the_seed_alone() -> None:
    first, again, other = ([UniformStream(seed)] for seed in (5, 5, 6))
    draws = [[stream.next() for _ in range(2000)] for (stream,) in (first, again, other)]
    assert draws[0] == draws[1] != draws[2]
    assert len(set(draws[0])) == 2000
    assert 0 <= min(draws[0]) <= max(draws[0]) < 1


def test_guidance_on_logits_and_on_log_probabilities_agree() -> None:
    one, other = torch.randn(2, 3, 9, generator=torch.Generator().manual_seed(0)).unbind()
    scale = torch.tensor([0.5, 1.0, 3.0])
    by_logits = guide(one, other, scale).softmax(1)
    torch.testing.assert_close(guide(one.log_softmax(1), other.log_softmax(1), scale).softmax(1), by_logits)


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}, {"min_p": 1.0}, {"guidance": -1.0}],
)
def test_settings_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    (name,) = wrong
    with pytest.raises(ValueError, match=name):
        Sampling(**wrong)


def test_a_negative_seed_is_refused() -> None:
    with pytest.raises(ValueError, match="seed=-1"):
        UniformStream(-1)
