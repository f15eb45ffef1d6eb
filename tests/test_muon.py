"""Muon: directions against the singular value decomposition, maps that share a weight, convolutions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from emu3_megatron.muon import ADAM_UPDATE_RMS, FusedMaps, Muon, orthogonalize


@pytest.mark.parametrize("shape", [(48, 48), (32, 96), (200, 40)])
def test_singular_values_become_one_and_vectors_stay(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    matrices = torch.randn(3, *shape, generator=generator, dtype=torch.float64) * 1e-4
    result = orthogonalize(matrices)
    u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
    projected = u.mT @ result @ vh.mT  # diagonal where the vectors are those of the argument
    values = projected.diagonal(dim1=1, dim2=2)
    assert torch.linalg.matrix_norm(projected - torch.diag_embed(values)).max() < 1e-9
    # Newton-Schulz takes smaller ones only part of the way.
    large = values[s / torch.linalg.matrix_norm(matrices)[:, None] > 0.02]
    assert large.min() > 0.6
    assert large.max() < 1.3
    torch.testing.assert_close(orthogonalize(matrices[1:2]), result[1:2])


def test_maps_that_share_a_weight_are_put_back_where_they_were() -> None:
    weight = torch.arange(24.0 * 5).view(24, 5)
    maps = FusedMaps(groups=3, parts=(4, 2, 2))
    queries, keys, values = maps.split(weight)
    assert queries[:, 0].tolist() == [5.0 * row for row in (0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19)]
    assert keys[:, 0].tolist() == [5.0 * row for row in (4, 5, 12, 13, 20, 21)]
    assert values.shape == keys.shape
    assert torch.equal(maps.join([queries, keys, values]), weight)


def train(weights: list[nn.Parameter], optimizer: Muon, gradients: list[list[Tensor]]) -> list[Tensor]:
    for step in gradients:
        for weight, gradient in zip(weights, step, strict=True):
            weight.grad = gradient.clone()
        optimizer.step()
    return [weight.detach() for weight in weights]


def by_the_formula(weight: Tensor, gradients: list[Tensor], rate: float, decay: float) -> Tensor:
    """One map, written down plainly in float64."""
    weight = weight.double()
    momentum = torch.zeros_like(weight)
    for gradient in gradients:
        momentum = 0.9 * momentum + 0.1 * gradient.double()
        x = 0.1 * gradient.double() + 0.9 * momentum
        x = x / x.pow(2).sum().sqrt()
        for _ in range(5):
            square = x @ x.T
            x = 3.4445 * x - 4.7750 * square @ x + 2.0315 * square @ square @ x
        weight = weight * (1 - rate * decay) - rate * 0.2 * math.sqrt(max(weight.shape)) * x
    return weight


def test_steps_are_those_of_the_formula_for_each_map() -> None:
    torch.manual_seed(2)
    plain, other, fused = (nn.Parameter(torch.randn(shape)) for shape in ((32, 48), (32, 48), (64, 40)))
    kernel = nn.Parameter(torch.randn(16, 8, 3, 3))
    weights = [plain, other, fused, kernel]
    before = [weight.detach().clone() for weight in weights]
    gradients = [[torch.randn_like(weight) for weight in weights] for _ in range(3)]
    maps = FusedMaps(2, (16, 8, 8))
    groups = [{"params": weights, "lr": 0.05, "weight_decay": 0.1}]
    after = train(weights, Muon(groups, momentum=0.9, fused={fused: maps}), gradients)
    for number in (0, 1, 3):
        expected = by_the_formula(
            before[number].flatten(1), [step[number].flatten(1) for step in gradients], 0.05, 0.1
        )
        torch.testing.assert_close(after[number].flatten(1).double(), expected, rtol=1e-4, atol=1e-5)
    expected = [
        by_the_formula(part, [maps.split(step[2])[index] for step in gradients], 0.05, 0.1)
        for index, part in enumerate(maps.split(before[2]))
    ]
    torch.testing.assert_close(after[2].double(), maps.join(expected), rtol=1e-4, atol=1e-5)


def test_an_update_is_as_large_as_adams() -> None:
    torch.manual_seed(3)
    weight = nn.Parameter(torch.zeros(64, 64))
    (after,) = train([weight], Muon([{"params": [weight], "lr": 1.0}], momentum=0.9), [[torch.randn(64, 64)]])
    assert after.square().mean().sqrt().item() == pytest.approx(ADAM_UPDATE_RMS, rel=0.3)


def test_a_saved_state_goes_on() -> None:
    torch.manual_seed(4)
    gradients = [[torch.randn(32, 32)] for _ in range(6)]
    start = torch.randn(32, 32)

    def optimizer(weight: nn.Parameter) -> Muon:
        return Muon([{"params": [weight], "lr": 0.1, "weight_decay": 0.01}], momentum=0.95)

    whole = nn.Parameter(start.clone())
    (expected,) = train([whole], optimizer(whole), gradients)
    first = nn.Parameter(start.clone())
    one = optimizer(first)
    train([first], one, gradients[:3])
    second = nn.Parameter(first.detach().clone())
    two = optimizer(second)
    two.load_state_dict(one.state_dict())
    (result,) = train([second], two, gradients[3:])
    assert torch.equal(result, expected)
