"""Metrics against their definitions and scikit-image; losses and the codebook against small exact cases."""

from __future__ import annotations

import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from emu3_megatron.vision.codebook import EmaCodebook
from emu3_megatron.vision.losses import (
    commitment_loss,
    foreground_mask,
    pixel_weights,
    reconstruction_loss,
    straight_through,
)
from emu3_megatron.vision.metrics import codebook_use, psnr, ssim
from emu3_megatron.vision.model import nearest_codes


def test_psnr_and_ssim_are_those_of_scikit_image() -> None:
    torch.manual_seed(0)
    x = torch.rand(2, 3, 24, 20) * 2 - 1
    y = (x + 0.2 * torch.randn_like(x)).clamp(-1, 1)
    a, b = x.numpy(), y.numpy()
    assert psnr(y, x) == pytest.approx(peak_signal_noise_ratio(a, b, data_range=2), abs=1e-4)
    options = {"data_range": 2, "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    theirs = [
        structural_similarity(p, q, channel_axis=0, win_size=11, **options) for p, q in zip(a, b, strict=True)
    ]
    assert ssim(y, x) == pytest.approx(sum(theirs) / 2, abs=1e-3)
    assert ssim(x, x) == pytest.approx(1)
    with pytest.raises(ValueError, match="11 pixels"):
        ssim(x[..., :8], y[..., :8])


def test_codebook_use_counts_codes() -> None:
    use = codebook_use(torch.tensor([[0, 1], [2, 3]]), 8)
    assert (use.used, use.fraction, use.bits, use.perplexity) == (4, 0.5, 2, 4)
    assert codebook_use(torch.zeros(5, dtype=torch.int64), 8).perplexity == 1


def test_foreground_and_edges_weigh_more() -> None:
    picture = torch.zeros(1, 3, 9, 9)
    picture[..., 4, 4] = 1
    mask = foreground_mask(picture, torch.zeros(1, 3))
    assert mask.sum() == 9
    weights = pixel_weights(picture, mask, foreground_weight=4, edge_weight=2)
    assert weights is not None
    assert weights[0, 0, 4, 4] == 1 + 4 + 1
    assert weights[0, 0, 0, 0] == 1
    assert pixel_weights(picture, mask, foreground_weight=0, edge_weight=0) is None
    plain = reconstruction_loss(picture + 1, picture, l1_weight=0.5)
    assert plain == pytest.approx(1.5)
    assert reconstruction_loss(picture + 1, picture, weights, l1_weight=0.5) > plain


def test_where_frames_count_alike_small_objects_weigh_as_much_as_large_ones() -> None:
    pictures = torch.zeros(2, 3, 32, 32)
    pictures[0, :, 4:8, 4:8] = 1
    pictures[1, :, 4:24, 4:24] = 1
    mask = foreground_mask(pictures, torch.zeros(2, 3))

    def added(frames_alike: bool) -> torch.Tensor:
        weights = pixel_weights(pictures, mask, foreground_weight=4, edge_weight=0, frames_alike=frames_alike)
        assert weights is not None
        return (weights - 1).sum((1, 2, 3))

    small, large = added(True)
    assert small.item() == pytest.approx(large.item(), rel=1e-5)
    assert added(True).sum().item() == pytest.approx(added(False).sum().item(), rel=1e-5)
    assert added(False)[1] > 10 * added(False)[0]


def test_straight_through_and_commitment_gradients() -> None:
    latents = torch.tensor([[1.0, 2.0]], requires_grad=True)
    codes = torch.tensor([[0.0, 2.5]], requires_grad=True)
    assert torch.equal(straight_through(latents, codes), codes)
    (3 * straight_through(latents, codes)).sum().backward()
    assert torch.equal(latents.grad, torch.full((1, 2), 3.0))
    commitment_loss(latents, codes, torch.tensor([2.0])).backward()
    assert codes.grad is None
    assert latents.grad[0, 0] == 3 + 2 * 2 * 1 / 2


def test_the_codebook_finds_clusters_follows_them_and_revives_the_dead() -> None:
    torch.manual_seed(0)
    centres = torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 4.0], [4.0, 4.0]])
    rows = centres.repeat_interleave(50, 0) + 0.1 * torch.randn(200, 2)
    codebook = EmaCodebook(torch.zeros(4, 2), decay=0.5, seed=0)
    weights = torch.ones(200)
    codebook.initialise(rows, weights)
    for _ in range(20):
        codes = torch.cdist(rows, codebook.vectors_KD).argmin(1)
        codebook.update(rows, codes, weights)
        codebook.revive(rows, codes, weights, 0)
    assert torch.cdist(centres, codebook.vectors_KD).amin(1).max() < 0.1

    moved = rows + 1
    for _ in range(20):
        codebook.update(moved, torch.cdist(moved, codebook.vectors_KD).argmin(1), weights)
    assert torch.cdist(centres + 1, codebook.vectors_KD).amin(1).max() < 0.1


def test_latents_of_little_weight_take_few_codes() -> None:
    torch.manual_seed(0)
    plain, busy = 0.3 * torch.randn(900, 2), 10 + torch.randn(100, 2)
    rows, weights = torch.cat((plain, busy)), torch.cat((torch.full((900,), 0.001), torch.ones(100)))
    codebook = EmaCodebook(torch.zeros(16, 2), decay=0.9, seed=0)
    codebook.initialise(rows, weights)
    assert (codebook.vectors_KD.norm(dim=1) > 5).sum() >= 14


def test_close_codes_merge_into_the_heaviest_and_copies_are_never_encoded() -> None:
    vectors = torch.tensor(
        [[0.1, 0.0], [0.0, 0.0], [5.0, 0.0], [0.0, 0.1], [0.0, 5.0], [9.0, 9.0], [0.05, 0.0]]
    )
    codebook = EmaCodebook(vectors, decay=0.9, seed=0)
    codebook.counts_K.copy_(torch.tensor([1.0, 9.0, 5.0, 2.0, 4.0, 3.0, 1.0]))
    codebook.sums_KD.copy_(vectors * codebook.counts_K[:, None])
    assert codebook.merge(4.0) == 4
    codebook.compact()
    assert torch.equal(vectors[:4], torch.tensor([[0.0, 0.0], [5.0, 0.0], [0.0, 5.0], [9.0, 9.0]]))
    assert torch.equal(nearest_codes(vectors, vectors), torch.tensor([0, 1, 2, 3, 0, 0, 0]))
