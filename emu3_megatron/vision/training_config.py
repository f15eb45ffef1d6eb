"""Configuration of the vision tokenizer's training."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from emu3_megatron.vision.config import VisionTokenizerConfig


@dataclass(kw_only=True)
class DataConfig:
    """What to train on."""

    manifests: list[str] = field(default_factory=list)
    """Manifests (JSON Lines) of the training media, read as one."""
    height: int = 64
    """Pixels; pictures of another size are scaled and cut."""
    width: int = 64
    """Pixels."""
    frames: int = 8
    """Frames of a clip; 0 leaves videos out."""
    splits: list[str] = field(default_factory=lambda: ["train"])
    """Values of a row's `split` to train on; rows without one count as "train"; empty takes all."""
    limit: int | None = None
    """At most this many images, and as many clips."""


@dataclass(kw_only=True)
class ScheduleConfig:
    """How long, on how much, and how fast."""

    steps: int = 1500
    """Optimizer steps."""
    batch_size: int = 16
    """Images of an image step, over all processes."""
    clip_batch_size: int = 4
    """Clips of a clip step, over all processes."""
    clip_every: int = 4
    """Every how many steps one is on clips; 0: never."""
    decoded_frames: int = 2
    """Frames of each clip that a step decodes, drawn at random; the others cost nothing to decode."""
    crop: int | None = 32
    """Side of the square crops that most of the training sees; None: whole pictures always."""
    whole_from: float = 0.75
    """Share of the steps after which whole pictures are seen."""
    whole_batch_size: int = 8
    """Images of a step on whole pictures, over all processes."""
    learning_rate: float = 3e-3
    """Peak, of AdamW."""
    warmup_steps: int = 50
    """Linear rise to the peak; a cosine to `final_share` of it follows."""
    final_share: float = 0.02
    """Last learning rate over the peak."""
    clip_gradient: float = 1.0
    """Largest norm of the gradient."""


@dataclass(kw_only=True)
class LossConfig:
    """What is asked of a reconstruction, and of the codebook."""

    l1_weight: float = 0.2
    """Absolute error, beside the squared error of weight 1."""
    foreground_weight: float = 4.0
    """Added to the weight of pixels that differ from the picture's commonest colour."""
    edge_weight: float = 0.0
    """Added to the weight of pixels where neighbours differ, times the contrast."""
    commitment_weight: float = 0.1
    """Pull of latents towards their codes."""
    continuous_steps: int = 150
    """First steps, without quantization; the codebook is then placed among the latents."""
    plain_share: float = 0.02
    """Weight, in placing the codes, of a patch that shows nothing but background; that of others is 1."""
    plain_commitment: float = 1.0
    """Weight of such a patch in the commitment loss; above 1, plain patches are drawn to few codes."""
    codebook_decay: float = 0.98
    """Of the moving averages that the codebook follows."""
    revive_every: int = 20
    """Steps between revivals of dead codes; 0: never."""
    revive_until: float = 0.5
    """Share of the steps after which no code is revived."""
    merge_distance: float = 0.0
    """Codes closer than this many median nearest distances are merged into one; 0: none."""
    merge_at: float = 0.6
    """Share of the steps after which codes are merged; the rest of the training gets used to it."""


@dataclass(kw_only=True)
class VisionTrainingConfig:
    """Everything of one training run of a vision tokenizer."""

    output: str = "runs/vision-tokenizer"
    """Folder of the result (`config.json`, `model.safetensors`), the saved state and the metrics."""
    model: VisionTokenizerConfig = field(default_factory=VisionTokenizerConfig)
    """Architecture."""
    data: DataConfig = field(default_factory=DataConfig)
    """Data."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """Steps, batches, learning rate."""
    loss: LossConfig = field(default_factory=LossConfig)
    """Losses and codebook."""
    seed: int = 0
    """Of the weights, the data order and the codebook."""
    batch_statistics: bool = False
    """Whether batch norms train on each batch's statistics (large batches), or on their running ones, which
    stay at 0 and 1: training then computes what tokenization will."""
    channels_last: bool = True
    """Memory order of the 2D network; faster on CPU and GPU, and no part of the result."""
    checkpoint_every: int = 500
    """Steps between saved states; a rerun continues from the last one. 0: only the result is saved."""
    log_every: int = 50
    """Steps between lines of the metrics."""
    tensorboard: bool = False
    """Whether to write TensorBoard events, with reconstructions, beside the metrics."""
    sample_every: int = 500
    """Steps between reconstructions in TensorBoard."""

    def check(self, processes: int) -> None:
        """Raise `ValueError` where the parts do not fit each other, or the number of processes."""
        schedule, factor = self.schedule, self.model.spatial_factor
        if schedule.crop is not None and schedule.crop % factor:
            raise ValueError(f"schedule.crop is {schedule.crop}: it must be a multiple of {factor} pixels")
        if self.data.height % factor or self.data.width % factor:
            raise ValueError(
                f"data.height is {self.data.height}, data.width {self.data.width}: both must be multiples of "
                f"{factor} pixels"
            )
        if self.data.frames % self.model.temporal_downsample_factor:
            raise ValueError(
                f"data.frames is {self.data.frames}: it must be a multiple of "
                f"{self.model.temporal_downsample_factor}, frames to a code"
            )
        for name in ("batch_size", "whole_batch_size", "clip_batch_size"):
            if getattr(schedule, name) % processes:
                raise ValueError(
                    f"schedule.{name} is {getattr(schedule, name)}: it must be a multiple of the {processes} "
                    "processes"
                )


def learning_rate(schedule: ScheduleConfig, step: int) -> float:
    """Linear rise to the peak, then a cosine to `final_share` of it at the last step."""
    rise = min(1.0, (step + 1) / max(1, schedule.warmup_steps))
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, step / max(1, schedule.steps - 1))))
    return schedule.learning_rate * rise * (schedule.final_share + (1 - schedule.final_share) * cosine)
