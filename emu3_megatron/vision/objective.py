"""What is asked of reconstructions: squared and absolute error, LPIPS, and what the discriminator says.

Shapes: N frames, C channels, H W height and width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from emu3_megatron.vision.discriminator import Adversary
from emu3_megatron.vision.losses import pixel_weights, reconstruction_loss
from emu3_megatron.vision.perceptual import PerceptualDistance
from emu3_megatron.vision.training_config import VisionTrainingConfig


class Objective:
    """The losses of decoded pixels, with the networks that some of them need.

    Args:
        config: the run.
        device: where to train.
    """

    def __init__(self, config: VisionTrainingConfig, device: torch.device) -> None:
        self.config = config
        self.adversary: Adversary | None = None
        self.perceptual: PerceptualDistance | None = None
        if config.discriminator.weight:
            self.adversary = Adversary(config.discriminator, config.model.out_channels, device)
        if config.loss.perceptual_weight:
            self.perceptual = PerceptualDistance(
                config.loss.perceptual_network, config.loss.perceptual_weights, "loss.perceptual_weights"
            ).to(device)

    def __call__(
        self,
        reconstruction_NCHW: Tensor,
        target_NCHW: Tensor,
        foreground_N1HW: Tensor,
        *,
        step: int,
        last_layer: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and its parts by name.

        Args:
            reconstruction_NCHW: decoded pixels.
            target_NCHW: the pictures.
            foreground_N1HW: where they show more than background.
            step: of the training.
            last_layer: weights that make the pixels, for the adaptive weight.
        """
        config = self.config.loss
        weights = pixel_weights(
            target_NCHW,
            foreground_N1HW,
            foreground_weight=config.foreground_weight,
            edge_weight=config.edge_weight,
            frames_alike=config.frames_alike,
        )
        loss = reconstruction_loss(reconstruction_NCHW, target_NCHW, weights, l1_weight=config.l1_weight)
        parts = {"reconstruction": loss}
        if self.perceptual is not None:
            parts["perceptual"] = self.perceptual(reconstruction_NCHW, target_NCHW).float().mean()
            loss = loss + config.perceptual_weight * parts["perceptual"]
        if self.adversary is not None and step >= self.config.discriminator.start:
            judged, weight = self.adversary.judge(reconstruction_NCHW, loss, last_layer)
            parts |= {"adversarial": judged, "adversarial_weight": weight}
            loss = loss + weight * judged
        return loss, parts
