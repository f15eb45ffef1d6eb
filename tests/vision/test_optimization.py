"""The vision tokenizer's optimizers: which weights Muon trains, and a saved state."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from emu3_megatron.muon import ADAM_UPDATE_RMS, Muon
from emu3_megatron.vision.optimization import Optimizers, clip_gradients, make_optimizer, set_learning_rate


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 32, 3), nn.SiLU(), nn.Conv2d(32, 48, 3), nn.GroupNorm(8, 48))


def train(model: nn.Module, optimizer: Optimizers, steps: int, seed: int, rate: float = 0.01) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(2, 3, 12, 12, generator=generator)).cos().sum().backward()
        clip_gradients(optimizer, 1.0)
        set_learning_rate(optimizer, rate)
        optimizer.step()


def test_muon_trains_wide_weights_and_adam_the_others() -> None:
    model = network()
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    optimizer = make_optimizer(model, betas=(0.9, 0.99), units={"2.weight": 0.5}, muon_rate=4.0)
    (muon,) = (part for part in optimizer.parts if isinstance(part, Muon))
    assert [id(weight) for group in muon.param_groups for weight in group["params"]] == [id(model[2].weight)]
    train(model, optimizer, 1, seed=1)
    for name, weight in model.named_parameters():
        moved = (weight.detach() - before[name]).square().mean().sqrt().item()
        # 0.01 by Adam's first step; the rate times the share times the unit, of Adam's usual size, by Muon.
        expected = 0.01 * 4.0 * 0.5 * ADAM_UPDATE_RMS if name == "2.weight" else 0.01
        assert moved == pytest.approx(expected, rel=0.35), name


def test_without_a_rate_there_is_no_muon() -> None:
    optimizer = make_optimizer(network(), betas=(0.9, 0.99))
    assert [type(part) for part in optimizer.parts] == [torch.optim.AdamW]


def test_a_state_of_one_optimizer_is_taken_over_and_no_other_number() -> None:
    model = network()
    optimizer = make_optimizer(model, betas=(0.9, 0.99))
    train(model, optimizer, 2, seed=3)
    other = make_optimizer(network(), betas=(0.9, 0.99))
    other.load_state_dict(optimizer.parts[0].state_dict())
    assert other.parts[0].state_dict()["state"].keys() == optimizer.parts[0].state_dict()["state"].keys()
    with pytest.raises(ValueError, match=r"schedule\.muon_rate"):
        make_optimizer(model, betas=(0.9, 0.99), muon_rate=1.0).load_state_dict(optimizer.state_dict())


def test_a_saved_state_goes_on() -> None:
    first, second = network(), network()
    one = make_optimizer(first, betas=(0.9, 0.99), muon_rate=1.0)
    train(first, one, 1, seed=5)
    state, weights = copy.deepcopy((one.state_dict(), first.state_dict()))
    train(first, one, 2, seed=6)
    second.load_state_dict(weights)
    two = make_optimizer(second, betas=(0.9, 0.99), muon_rate=1.0)
    two.load_state_dict(state)
    train(second, two, 2, seed=6)
    for (name, weight), other in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(weight, other), name
