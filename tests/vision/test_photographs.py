"""The figures that the photographs proof compares with."""

from __future__ import annotations

from tests.proofs.photographs import block_means, photograph


def test_block_means_are_as_good_as_they_can_be() -> None:
    """More levels are never worse, and a plain picture at a level comes back as it is."""
    pixels = photograph("chelsea.png", 128)
    errors = [(block_means(pixels, (n, n, n)) - pixels).square().mean() for n in (4, 8, 32)]
    assert errors[0] > errors[1] > errors[2]
    plain = pixels * 0 + 1
    assert (block_means(plain, (32, 32, 32)) - plain).abs().max() < 1e-5
