"""Dropout masks as functions of tokens."""

from __future__ import annotations

import torch

from emu3_megatron.model.dropout import AttentionDropout, TokenDropout, token_rows

TOKENS, CHANNELS, SHARE = 2048, 256, 0.1
DEVIATION = (SHARE * (1 - SHARE)) ** 0.5


def dropout(place: str = "here", group: object = None) -> TokenDropout:
    return TokenDropout(place, SHARE, group)  # type: ignore[arg-type]


def mask(tokens: torch.Tensor, place: str = "here") -> torch.Tensor:
    """bool ``[T, C]`` of what is kept."""
    part = dropout(place)
    part.tokens = tokens
    return part(torch.ones(len(tokens), 1, CHANNELS))[:, 0] != 0


def tokens_of(*windows: int, step: int = 7) -> torch.Tensor:
    return token_rows(step, windows, TOKENS // len(windows)).reshape(-1)


def within(values: torch.Tensor, samples: int, expected: float = 1 - SHARE) -> bool:
    """Six standard deviations: 5,000 values of a good generator stay within 4."""
    return bool(((values - expected).abs() < 6 * DEVIATION / samples**0.5).all())


def test_the_asked_share_is_dropped_in_every_row_and_channel() -> None:
    kept = mask(tokens_of(3)).double()
    assert within(kept.mean(), kept.numel())
    assert within(kept.mean(0), TOKENS)
    assert within(kept.mean(1), CHANNELS)


def test_what_is_kept_is_scaled_up() -> None:
    part = dropout()
    part.tokens = tokens_of(3)
    x = torch.randn(TOKENS, 1, CHANNELS, requires_grad=True)
    y = part(x)
    kept = y != 0
    torch.testing.assert_close(y[kept], x[kept] / (1 - SHARE))
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient, kept.float() / (1 - SHARE))


def test_channels_places_windows_and_steps_are_independent() -> None:
    kept = mask(tokens_of(3)).double() - (1 - SHARE)
    products = kept.T @ kept / TOKENS / DEVIATION**2
    products.fill_diagonal_(0)
    assert products.abs().max() < 7 / TOKENS**0.5
    for other in (mask(tokens_of(3), "there"), mask(tokens_of(4)), mask(tokens_of(3, step=8))):
        product = (kept * (other.double() - (1 - SHARE))).mean() / DEVIATION**2
        assert product.abs() < 6 / kept.numel() ** 0.5


def test_a_mask_belongs_to_its_token_wherever_it_is_held() -> None:
    two, one = tokens_of(5, 6), token_rows(7, [6], TOKENS // 2).reshape(-1)
    torch.testing.assert_close(mask(two)[TOKENS // 2 :], mask(one))
    order = torch.randperm(TOKENS)
    torch.testing.assert_close(mask(two[order]), mask(two)[order])


def test_tensor_parallel_ranks_hold_slices_under_sequence_parallelism() -> None:
    class Group:
        def __init__(self, rank: int) -> None:
            self._rank = rank

        def rank(self) -> int:
            return self._rank

        def size(self) -> int:
            return 4

    tokens, parts = tokens_of(5), []
    for rank in range(4):
        part = dropout(group=Group(rank))
        part.tokens = tokens
        parts.append(part(torch.ones(TOKENS // 4, 1, CHANNELS))[:, 0] != 0)
    torch.testing.assert_close(torch.cat(parts), mask(tokens))


def test_without_tokens_it_draws_from_the_random_state_and_in_evaluation_not_at_all() -> None:
    part, x = dropout(), torch.randn(8, 1, CHANNELS)
    torch.manual_seed(1)
    first = part(x)
    torch.manual_seed(1)
    torch.testing.assert_close(first, torch.nn.functional.dropout(x, SHARE))
    assert part.eval()(x) is x


def test_attention_drops_by_query_head_and_key() -> None:
    tokens, positions = tokens_of(2).reshape(4, -1), torch.arange(64).expand(4, 64)
    part, heads = AttentionDropout(3, SHARE), torch.arange(8)
    kept = part.keep(tokens[:, :64], heads, positions)
    assert kept.shape == (4, 8, 64, 64)
    assert within(kept.double().mean((0, 2, 3)), 4 * 64 * 64)
    assert within(kept.double().mean((0, 1, 2)), 4 * 8 * 64)
    some = part.keep(tokens[1:2, 10:20], heads[4:], positions[:1, 30:])
    torch.testing.assert_close(some, kept[1:2, 4:, 10:20, 30:])
    assert not torch.equal(kept, AttentionDropout(4, SHARE).keep(tokens[:, :64], heads, positions))
