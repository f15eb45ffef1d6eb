"""Configuration of the vision tokenizer's training."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from emu3_megatron.vision.block_means import check_block_means
from emu3_megatron.vision.config import VisionTokenizerConfig
from emu3_megatron.vision.perceptual import LEAST_SIDE, Network


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
    stream: bool = False
    """Whether to decode media when they are drawn, each time cut elsewhere: for corpora of any size and
    pictures of mixed sizes. Otherwise all are decoded at the start, to one size, and held."""
    folders: list[str] = field(default_factory=list)
    """With `stream`: folders whose images and videos are trained on, beside those of the manifests."""
    scale: tuple[float, float] = (0.5, 1.0)
    """With `stream`: least and largest factor by which a picture is scaled before it is cut."""
    flip: bool = True
    """With `stream`: whether half of the draws are mirrored."""
    frame_rate: float | None = None
    """With `stream`: frames of a clip per second, as near as whole steps of the video's frames allow; None:
    the video's own."""
    cache_mib: int = 0
    """With `stream`: MiB of decoded images that each drawing process keeps; no part of the result."""
    workers: int = 0
    """Worker processes that draw batches ahead, for each training process; no part of the result."""


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
    muon_rate: float = 0.0
    """Above 0, weights of at least 32 rows and columns are trained by Muon instead of Adam, at this many
    times the learning rate; at 1 their updates have the size of Adam's (see `emu3_megatron.muon`)."""
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
    frames_alike: bool = False
    """Whether the two weights above are divided by the share of the frame that its foreground covers, so that
    small objects count as much as large ones."""
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
    codebook_rows: int = 0
    """Latents, over all processes, among which the codes are placed; 0: those of one step. Several for each
    code are needed."""
    place_again: bool = False
    """Whether to place the codes once more after the last step, by k-means among `codebook_rows` latents: the
    mean of many, where moving averages over the few latents of a step give the mean of the last ones."""
    perceptual_weight: float = 0.0
    """LPIPS (Zhang et al. 2018), beside the squared error of weight 1; 0: none."""
    perceptual_network: Network = "vgg"
    """Backbone of LPIPS."""
    perceptual_weights: str | None = None
    """File of the backbone's weights, as torchvision publishes it; None: torch's cache, or a download."""


@dataclass(kw_only=True)
class DiscriminatorConfig:
    """The adversary, a PatchGAN trained with the hinge loss."""

    weight: float = 0.0
    """Of the adversarial loss; 0: there is no discriminator."""
    adaptive: bool = True
    """Whether `weight` multiplies the ratio of gradients at the decoder's last layer (Esser et al. 2021)."""
    start: int = 0
    """First step of the discriminator and of its loss."""
    channels: int = 64
    """Of its first layer; they double in every further one, up to eightfold."""
    layers: int = 3
    """Halvings of height and width."""
    learning_rate_share: float = 1.0
    """Its learning rate over the tokenizer's."""

    def least_side(self) -> int:
        """Pixels of a picture's side that leave one logit."""
        return 3 * int(2**self.layers)


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
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    """The adversary."""
    start_from_block_means: bool = False
    """Begin with weights that give the mean colours of blocks, smoothly enlarged; takes 96 channels."""
    warm_start: str | None = None
    """Weights to begin with: a file of an image MoVQ, or the folder of a vision tokenizer."""
    average_decay: float = 0.0
    """Of the moving averages of the weights, which then are the result; 0: the last weights are."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of convolutions and matrix products; weights, optimizer and losses are fp32 always."""
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
    """Steps between lines of the metrics; 0: the last step alone has one."""
    tensorboard: bool = False
    """Whether to write TensorBoard events, with reconstructions, beside the metrics."""
    sample_every: int = 500
    """Steps between reconstructions in TensorBoard, at lines of the metrics; 0: only after the last step."""

    def check(self, processes: int) -> None:
        """Raise `ValueError` where the parts do not fit each other, or the number of processes."""
        self._check_least()
        self._check_sizes()
        self._check_losses()
        for name in ("batch_size", "whole_batch_size", "clip_batch_size"):
            if getattr(self.schedule, name) % processes:
                raise ValueError(
                    f"schedule.{name} is {getattr(self.schedule, name)}: it must be a multiple of the "
                    f"{processes} processes"
                )
        if not 0 <= self.average_decay < 1:
            raise ValueError(f"average_decay is {self.average_decay}: it must be at least 0 and less than 1")
        if self.start_from_block_means:
            check_block_means(self.model)
            if self.warm_start is not None:
                raise ValueError("start_from_block_means is true beside warm_start: leave one of them out")
        if self.warm_start is not None and self.loss.continuous_steps:
            raise ValueError(
                f"loss.continuous_steps is {self.loss.continuous_steps} with warm_start: the codebook is "
                "loaded and not placed anew, so it must be 0"
            )

    def _check_least(self) -> None:
        """Refuse numbers below the least that means something; where 0 is one, it switches a part off."""
        data, schedule, loss = self.data, self.schedule, self.loss
        least = {
            "data.height": (data.height, 1),
            "data.width": (data.width, 1),
            "data.frames": (data.frames, 0),
            "data.workers": (data.workers, 0),
            "data.cache_mib": (data.cache_mib, 0),
            "schedule.steps": (schedule.steps, 1),
            "schedule.batch_size": (schedule.batch_size, 1),
            "schedule.clip_batch_size": (schedule.clip_batch_size, 1),
            "schedule.whole_batch_size": (schedule.whole_batch_size, 1),
            "schedule.clip_every": (schedule.clip_every, 0),
            "schedule.decoded_frames": (schedule.decoded_frames, 1),
            "schedule.crop": (1 if schedule.crop is None else schedule.crop, 1),
            "schedule.warmup_steps": (schedule.warmup_steps, 0),
            "loss.revive_every": (loss.revive_every, 0),
            "checkpoint_every": (self.checkpoint_every, 0),
            "log_every": (self.log_every, 0),
            "sample_every": (self.sample_every, 0),
        }
        for name, (value, lowest) in least.items():
            if value < lowest:
                raise ValueError(f"{name} is {value}: it must be at least {lowest}")

    def _check_sizes(self) -> None:
        factor, data, crop = self.model.spatial_factor, self.data, self.schedule.crop
        if crop is not None and crop % factor:
            raise ValueError(f"schedule.crop is {crop}: it must be a multiple of {factor} pixels")
        if data.height % factor or data.width % factor:
            raise ValueError(
                f"data.height is {data.height}, data.width {data.width}: both must be multiples of "
                f"{factor} pixels"
            )
        if data.frames % self.model.temporal_downsample_factor:
            raise ValueError(
                f"data.frames is {data.frames}: it must be a multiple of "
                f"{self.model.temporal_downsample_factor}, frames to a code"
            )
        if data.folders and not data.stream:
            raise ValueError("data.folders is given without data.stream: set data.stream to true")
        low, high = data.scale
        if not 0 < low <= high:
            raise ValueError(f"data.scale is {[low, high]}: give a least and a largest factor above 0")

    def _check_losses(self) -> None:
        if self.loss.place_again and self.loss.codebook_rows < self.model.codebook_size:
            raise ValueError(
                f"loss.place_again takes latents to place {self.model.codebook_size} codes among, and "
                f"loss.codebook_rows is {self.loss.codebook_rows}: set it to several for each code"
            )
        side = min(self.data.height, self.data.width, self.schedule.crop or self.data.height)
        if self.loss.perceptual_weight and side < LEAST_SIDE:
            raise ValueError(
                f"pictures or crops are {side} pixels with loss.perceptual_weight: LPIPS needs {LEAST_SIDE}"
            )
        least = self.discriminator.least_side()
        if self.discriminator.weight and side < least:
            raise ValueError(
                f"pictures or crops are {side} pixels with discriminator.layers {self.discriminator.layers}: "
                f"it needs {least}; use fewer layers"
            )


def learning_rate(schedule: ScheduleConfig, step: int) -> float:
    """Linear rise to the peak, then a cosine to `final_share` of it at the last step."""
    rise = min(1.0, (step + 1) / max(1, schedule.warmup_steps))
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, step / max(1, schedule.steps - 1))))
    return schedule.learning_rate * rise * (schedule.final_share + (1 - schedule.final_share) * cosine)
