"""The adversary of the vision tokenizer: a PatchGAN that tells pictures from reconstructions.

Shapes: N frames, C channels, H W height and width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from emu3_megatron.vision.optimization import clip_gradients, make_optimizer, set_learning_rate
from emu3_megatron.vision.processes import average_gradients, averaged
from emu3_megatron.vision.training_config import DiscriminatorConfig

LARGEST_ADAPTIVE_WEIGHT = 1e4
"""Bound of the adaptive weight (Esser et al. 2021)."""


class Discriminator(nn.Module):
    """A convolutional network that judges overlapping patches (Isola et al. 2017).

    Its norms are group norms: the judgement of a picture does not depend on the others of its batch, nor on
    how many processes share the batch.
    """

    def __init__(self, in_channels: int, channels: int, layers: int) -> None:
        super().__init__()
        parts: list[nn.Module] = [nn.Conv2d(in_channels, channels, 4, 2, 1), nn.LeakyReLU(0.2)]
        before = channels
        for index in range(1, layers + 1):
            after, stride = channels * min(2**index, 8), 2 if index < layers else 1
            parts += [nn.Conv2d(before, after, 4, stride, 1, bias=False)]
            parts += [nn.GroupNorm(min(32, after), after), nn.LeakyReLU(0.2)]
            before = after
        parts.append(nn.Conv2d(before, 1, 4, 1, 1))
        self.network = nn.Sequential(*parts)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Logits [N, 1, h, w]: positive for a picture, negative for a reconstruction."""
        return self.network(x_NCHW)


def hinge_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """The discriminator's loss: a logit beyond its margin of 1 costs nothing."""
    return 0.5 * (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean())


def adaptive_weight(error: Tensor, adversarial: Tensor, last_layer: Tensor) -> Tensor:
    """Weight at which both losses pull equally at the last layer (Esser et al. 2021), over all processes."""
    gradients = [torch.autograd.grad(loss, last_layer, retain_graph=True)[0] for loss in (error, adversarial)]
    norms = averaged(torch.stack([gradient.norm() for gradient in gradients]))
    return (norms[0] / (norms[1] + 1e-4)).clamp(0, LARGEST_ADAPTIVE_WEIGHT)


class Adversary:
    """The discriminator with its optimizer, and what it asks of reconstructions.

    Args:
        config: its size and rates.
        in_channels: of a pixel.
        device: where to train.
    """

    def __init__(self, config: DiscriminatorConfig, in_channels: int, device: torch.device) -> None:
        self.config = config
        self.network = Discriminator(in_channels, config.channels, config.layers).to(device)
        self.parameters = list(self.network.parameters())
        self.optimizer = make_optimizer(self.network, betas=(0.5, 0.9))

    def judge(self, reconstruction_NCHW: Tensor, error: Tensor, last_layer: Tensor) -> tuple[Tensor, Tensor]:
        """Loss of reconstructions that are recognised, and its weight.

        Args:
            reconstruction_NCHW: decoded pixels.
            error: the other losses of these pixels, for the adaptive weight.
            last_layer: weights that make the pixels.
        """
        self.network.requires_grad_(False)
        loss = -self.network(reconstruction_NCHW).float().mean()
        if not self.config.adaptive:
            return loss, torch.full_like(loss, self.config.weight)
        return loss, self.config.weight * adaptive_weight(error, loss, last_layer)

    def learn(self, target_NCHW: Tensor, reconstruction_NCHW: Tensor, rate: float, largest: float) -> Tensor:
        """One step of the discriminator; gives its loss.

        Args:
            target_NCHW: pictures.
            reconstruction_NCHW: decoded pixels; they get no gradient.
            rate: the tokenizer's learning rate at this step.
            largest: norm at which gradients are clipped.
        """
        self.network.requires_grad_(True)
        logits = self.network(torch.cat((target_NCHW, reconstruction_NCHW.detach()))).float()
        loss = hinge_loss(*logits.chunk(2))
        self.optimizer.zero_grad()
        loss.backward()
        average_gradients(self.parameters)
        clip_gradients(self.optimizer, largest)
        set_learning_rate(self.optimizer, rate * self.config.learning_rate_share)
        self.optimizer.step()
        return loss.detach()

    def state_dict(self) -> dict[str, Any]:
        """Everything a rerun needs."""
        return {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
