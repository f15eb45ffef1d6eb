"""The adversary, the averages and the units: each against its definition, and all of them in one training."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn

from emu3_megatron.vision import VisionTokenizer
from emu3_megatron.vision.averages import CODEBOOK, WeightAverages
from emu3_megatron.vision.discriminator import Adversary, Discriminator, adaptive_weight, hinge_loss
from emu3_megatron.vision.optimization import clip_gradients, make_optimizer, set_learning_rate
from emu3_megatron.vision.training import VisionTrainer
from emu3_megatron.vision.training_config import (
    DataConfig,
    DiscriminatorConfig,
    LossConfig,
    ScheduleConfig,
    VisionTrainingConfig,
)
from tests.vision.test_perceptual import random_backbone
from tests.vision.test_training import MODEL, squares


def everything(folder: Path, **changes: object) -> VisionTrainingConfig:
    """A training with every loss, images and clips, and averaged weights."""
    values: dict[str, object] = {
        "output": str(folder / "run"),
        "model": MODEL,
        "data": DataConfig(height=32, width=32, frames=4),
        "schedule": ScheduleConfig(
            steps=9,
            batch_size=2,
            whole_batch_size=2,
            clip_batch_size=1,
            clip_every=3,
            crop=None,
            warmup_steps=2,
        ),
        "loss": LossConfig(
            continuous_steps=2,
            revive_every=2,
            perceptual_weight=0.1,
            perceptual_network="alex",
            perceptual_weights=str(random_backbone(folder, "alex")),
        ),
        "discriminator": DiscriminatorConfig(weight=0.2, start=4, channels=8, layers=2),
        "average_decay": 0.9,
        "checkpoint_every": 0,
        "log_every": 3,
    }
    return VisionTrainingConfig(**(values | changes))


def test_the_discriminator_judges_patches_of_one_picture_at_a_time() -> None:
    torch.manual_seed(0)
    network = Discriminator(3, 8, 3)
    x = torch.rand(2, 3, 32, 40)
    logits = network(x)
    assert logits.shape == (2, 1, 2, 3)
    torch.testing.assert_close(network(x[:1]), logits[:1], rtol=1e-4, atol=1e-6)
    least = DiscriminatorConfig(layers=3).least_side()
    assert network(x[..., :least, :least]).numel() == 2


def test_the_hinge_loss_is_nothing_beyond_the_margin() -> None:
    assert hinge_loss(torch.tensor([1.0, 3.0]), torch.tensor([-1.0, -2.0])) == 0
    assert hinge_loss(torch.zeros(2), torch.zeros(2)) == 1


def test_the_adaptive_weight_lets_both_losses_pull_equally() -> None:
    torch.manual_seed(0)
    layer = torch.randn(4, 3, requires_grad=True)
    pixels = torch.randn(5, 4) @ layer
    error, judged = pixels.square().mean(), 7 * pixels.sin().mean()
    weight = adaptive_weight(error, judged, layer)
    norms = [
        torch.autograd.grad(loss, layer, retain_graph=True)[0].norm() for loss in (error, weight * judged)
    ]
    torch.testing.assert_close(norms[0], norms[1], rtol=1e-3, atol=0)


def test_an_adversary_learns_to_tell_and_is_left_alone_by_the_other_side() -> None:
    torch.manual_seed(0)
    config = DiscriminatorConfig(weight=0.5, adaptive=False, channels=8, layers=2, learning_rate_share=2.0)
    adversary = Adversary(config, 3, torch.device("cpu"))
    real, fake = torch.rand(4, 3, 16, 16), torch.rand(4, 3, 16, 16) - 1
    losses = [float(adversary.learn(real, fake, 1e-3, 1.0)) for _ in range(60)]
    assert losses[-1] < 0.3 * losses[0]
    assert adversary.optimizer.param_groups[0]["lr"] == 2e-3
    before = [p.clone() for p in adversary.parameters]
    fake.requires_grad_(True)
    loss, weight = adversary.judge(fake, loss_of(fake), fake)
    (weight * loss).backward()
    assert weight == 0.5
    assert loss > 0.5, "a reconstruction that is recognised costs much"
    assert fake.grad.abs().sum() > 0
    assert all(torch.equal(a, b) for a, b in zip(before, adversary.parameters, strict=True))


def loss_of(pixels: torch.Tensor) -> torch.Tensor:
    return pixels.square().mean()


def test_averages_follow_weights_take_moved_codes_and_give_the_weights_back() -> None:
    tokenizer = VisionTokenizer(MODEL)
    averages = WeightAverages(tokenizer, 0.5)
    with torch.no_grad():
        before = tokenizer.decoder.conv_out.weight.clone()
        tokenizer.decoder.conv_out.weight += 1
        tokenizer.codebook.add_(1)
    moved = torch.zeros(len(tokenizer.codebook), dtype=torch.bool)
    moved[3] = True
    averages.update(tokenizer, moved)
    kept = 2 / 11  # the first updates forget more than the decay
    torch.testing.assert_close(averages.values["decoder.conv_out.weight"], before + 1 - kept)
    codes = tokenizer.codebook - averages.values[CODEBOOK]
    torch.testing.assert_close(codes[3], torch.zeros(4))
    torch.testing.assert_close(codes[4], torch.full((4,), kept))
    for _ in range(60):
        averages.update(tokenizer, moved)
    torch.testing.assert_close(averages.values["decoder.conv_out.weight"], before + 1)
    fingerprint = tokenizer.fingerprint
    with averages.applied(tokenizer):
        assert torch.equal(tokenizer.codebook, averages.values[CODEBOOK])
    assert tokenizer.fingerprint == fingerprint


class Line(nn.Module):
    """y = scale * slope * x + offset."""

    def __init__(self, scale: float, slope: float) -> None:
        super().__init__()
        self.scale = scale
        self.slope, self.offset = nn.Parameter(torch.tensor(slope)), nn.Parameter(torch.tensor(0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * self.slope * x + self.offset


def test_a_parameter_in_other_units_is_trained_as_in_its_own() -> None:
    unit = 2.0**-20
    torch.manual_seed(0)
    x = torch.randn(64) / unit
    outcomes = []
    for model, units in ((Line(unit, 1.5), {}), (Line(1.0, 1.5 * unit), {"slope": unit})):
        optimizer = make_optimizer(model, betas=(0.9, 0.99), units=units)
        norms = []
        for _ in range(20):
            optimizer.zero_grad()
            (model(x) + x * unit).square().mean().backward()
            norms.append(clip_gradients(optimizer, 0.5))
            set_learning_rate(optimizer, 0.05)
            optimizer.step()
        outcomes.append(torch.stack([*norms, model.scale * model.slope / unit, model.offset]).detach())
    torch.testing.assert_close(outcomes[0], outcomes[1], rtol=1e-4, atol=1e-5)
    assert outcomes[0][-2] < 1, "it learned"


def test_a_training_with_every_loss_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    dataset = squares(12, 3, size=32)
    whole = VisionTrainer(everything(tmp_path), dataset).fit()
    for stop in (3, 6):
        config = dataclasses.replace(everything(tmp_path), output=str(tmp_path / f"stopped-{stop}"))
        stopped = VisionTrainer(config, dataset)
        for _ in range(stop):
            metrics = stopped.train_step()
            stopped.step += 1
        assert ("adversarial" in metrics) == (stop > 4), "the adversary begins at its step"
        stopped.save_state()
        assert VisionTrainer(config, dataset).fit().fingerprint == whole.fingerprint
    live = VisionTrainer(
        dataclasses.replace(config, average_decay=0.0, output=str(tmp_path / "live")), dataset
    )
    assert live.fit().fingerprint != whole.fingerprint, "the averages are the result"


def test_reduced_precision_trains(tmp_path: Path) -> None:
    config = everything(tmp_path, precision="bf16")
    trainer = VisionTrainer(config, squares(12, 3, size=32))
    for _ in range(6):
        metrics = trainer.train_step()
        trainer.step += 1
    assert all(torch.isfinite(value) for value in metrics.values())
    assert all(p.dtype == torch.float32 for p in trainer.tokenizer.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"average_decay": 1.0}, r"average_decay is 1\.0"),
        ({"discriminator": DiscriminatorConfig(weight=1.0, layers=4)}, r"layers 4: it needs 48"),
        ({"data": DataConfig(height=16, width=32, frames=4)}, "LPIPS needs 32"),
        ({"data": DataConfig(height=32, width=32, folders=["x"])}, "without data.stream"),
        ({"data": DataConfig(height=32, width=32, scale=(1.0, 0.5))}, r"data\.scale is \[1\.0, 0\.5\]"),
        ({"warm_start": "x.pt"}, r"continuous_steps is 2 with warm_start"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        everything(tmp_path, **changes).check(1)
