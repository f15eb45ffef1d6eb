"""What one training run is made of: every knob, its unit, and where its default comes from.

The sections of a configuration file are the fields of `TrainingConfig`. Sources of defaults: *paper* is the
Emu3 paper; *Emu3.5* is its successor's report, which states what the first left unsaid; *ours* is a choice of
this project. This module imports neither torch nor megatron-core, so that a mistake in a file is reported at
once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta
from typing import Literal

from emu3_megatron.data import Template
from emu3_megatron.errors import UserError
from emu3_megatron.grammar.document import Modality
from emu3_megatron.model import LoRAConfig, ModelConfig
from emu3_megatron.model.config import FP8Format, FP8Recipe
from emu3_megatron.parallel.config import ParallelConfig

Precision = Literal["fp32", "bf16"]


def require(condition: bool, message: str) -> None:
    """Raise `UserError` with `message` unless `condition` holds."""
    if not condition:
        raise UserError(message)


@dataclass(kw_only=True)
class LossConfig:
    """Cross entropy by class of token. A class of weight zero is neither trained on nor counted in `loss`."""

    text_weight: float = 1.0
    """Captions, prose, turns (paper)."""
    vision_weight: float = 0.5
    """Vision codes (paper: 0.5)."""
    meta_weight: float = 1.0
    """The text that states a span's size, rate and duration (ours: it is text)."""
    break_weight: float = 0.5
    """End of row and end of frame (ours: as the vision tokens they stand among)."""
    control_weight: float = 1.0
    """BOS, EOS, BOI, IMG, EOI (ours)."""
    end_weight: float | None = None
    """EOS, where it should count otherwise than `control_weight`; it is then measured apart, as `end`."""
    prompt_weight: float = 0.0
    """Instructions and questions of conversations (paper: answers only)."""
    chunk_size: int | None = None
    """Tokens whose logits exist at a time; where not set, 1,024 to 2,048 on a GPU; on a CPU as many as keep
    them near 16 MiB, at least 128."""
    z_loss: float = 0.0
    """Coefficient of the squared logarithm of the softmax's denominator, weighted as the cross entropy and
    trained on, but not counted in `loss`; 1e-4 is common, 0 is off (ours)."""

    def __post_init__(self) -> None:
        """Check that something is trained."""
        weights = self.by_class()
        require(min(weights) >= 0, f"loss weights {weights} must not be negative")
        require(max(weights) > 0, "every loss weight is zero; nothing would be trained")
        require(self.z_loss >= 0, f"loss.z_loss={self.z_loss} must not be negative; 0 is off")
        require(
            self.chunk_size is None or self.chunk_size > 0,
            f"loss.chunk_size={self.chunk_size} must be positive",
        )

    def by_class(self) -> list[float]:
        """Weights in the order of `Modality`; padding is never a target."""
        weights = {
            Modality.TEXT: self.text_weight,
            Modality.VISION: self.vision_weight,
            Modality.META: self.meta_weight,
            Modality.BREAK: self.break_weight,
            Modality.CONTROL: self.control_weight,
            Modality.PADDING: 0.0,
            Modality.PROMPT: self.prompt_weight,
            Modality.END: self.control_weight if self.end_weight is None else self.end_weight,
        }
        return [weights[modality] for modality in Modality]


@dataclass(kw_only=True)
class SourceConfig:
    """One dataset of the mixture."""

    path: str
    """Folder with `manifest.json`, relative to the working directory."""
    weight: float = 1.0
    """Share of the mixture in tokens, relative to the other sources' weights (ours: equal)."""
    template: Template | None = None
    """How its documents are laid out, where it differs from `data.template`."""
    loss: LossConfig | None = None
    """Weights by class of token, where they differ from the run's `loss`: a mixture may ask for pictures of
    one source and answers of another."""

    def __post_init__(self) -> None:
        """Check the weight."""
        require(
            self.weight > 0,
            f"source {self.path}: weight={self.weight} must be positive; leave it out instead",
        )
        require(
            self.loss is None or (self.loss.chunk_size is None and not self.loss.z_loss),
            f"source {self.path}: loss.chunk_size and loss.z_loss are the run's; set them there",
        )


@dataclass(kw_only=True)
class DataConfig:
    """The mixture, its windows, and the workers that read them."""

    sources: dict[str, SourceConfig]
    """Datasets by name; the name is what metrics and logs call them."""
    validation: dict[str, SourceConfig] = field(default_factory=dict)
    """Held-out datasets by name; never trained on."""
    context_length: int = 5120
    """Tokens of a window (paper: 5,120 in stage 1, 131,072 in stage 2)."""
    template: Template = field(default_factory=Template)
    """Order and dropout of captions, BOS and EOS, for every source that does not set its own."""
    attention: Literal["document", "window"] = "document"
    """What a token may look back at: its document, or the whole window whatever it holds (ours)."""
    policy: Literal["online", "offline"] = "online"
    """Packing: documents in shuffled order, or best-fit decreasing for the fill to compare with (ours)."""
    fill: bool = True
    """Pour splittable text into the holes that spans leave (ours)."""
    alignment: int | None = None
    """Tokens that every document is padded to a multiple of; 2 x context_parallel_size where not set. It is
    part of the plan: set it to the largest you will need, to change context parallelism in the middle of a
    run."""
    seed: int | None = None
    """Seed of the plan's order; the run's `seed` where not set."""
    takedown: str | None = None
    """File of sample ids, one a line, whose documents are never read; part of the plan."""
    num_workers: int = 1
    """Reader threads or processes of a rank; 0 reads in the training process (ours)."""
    prepare: str | None = None
    """`module:function`, called with a source's folder on rank 0 when its manifest is missing."""

    def __post_init__(self) -> None:
        """Check sizes."""
        require(bool(self.sources), "data.sources is empty; name at least one dataset folder")
        require(
            self.context_length >= 2, f"data.context_length={self.context_length} must be at least 2 tokens"
        )
        require(self.num_workers >= 0, f"data.num_workers={self.num_workers} must not be negative")
        twice = set(self.sources) & set(self.validation)
        require(
            not twice, f"source names {sorted(twice)} stand in data.sources and data.validation; rename one"
        )


@dataclass(kw_only=True)
class OptimizerConfig:
    """AdamW or Muon, the learning-rate schedule, clipping."""

    kind: Literal["adam", "muon"] = "adam"
    """`adam` for every weight (paper); `muon` for the matrices of the decoder's layers, with Adam for the
    embedding, the output layer and the norms (see `emu3_megatron.muon`)."""
    muon_rate: float = 1.0
    """Muon's learning rate in units of `learning_rate`; at 1 its updates are as large as Adam's."""
    muon_momentum: float = 0.95
    """Decay of Muon's Nesterov momentum (Jordan 2024)."""
    learning_rate: float = 5e-5
    """Peak learning rate (paper: 5e-5 in both stages)."""
    min_learning_rate: float = 0.0
    """Learning rate at the end of the schedule (paper: cosine to zero)."""
    schedule: Literal["cosine", "wsd", "linear", "constant"] = "cosine"
    """Shape after warm-up: half a cosine (paper); constant, then linear decay over the last `decay_steps`;
    linear from the first step after warm-up; constant."""
    warmup_steps: int = 700
    """Steps of linear warm-up from zero (Emu3.5: 700)."""
    decay_steps: int | None = None
    """`wsd`: steps of the final linear decay; a tenth of the run where not set (ours)."""
    beta1: float = 0.9
    """Adam's first-moment decay (Emu3.5)."""
    beta2: float = 0.95
    """Adam's second-moment decay (Emu3.5)."""
    epsilon: float = 1e-8
    """Adam's epsilon (Emu3.5)."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices; norms and biases have none (Emu3.5: 0.1)."""
    clip_grad: float = 5.0
    """Largest global gradient norm; 0 switches clipping off (Emu3.5: 5.0)."""
    use_distributed_optimizer: bool = True
    """Shard optimizer states over data-parallel ranks (ours)."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass runs; worth it on several nodes (ours)."""
    overlap_param_gather: bool = False
    """Gather parameters while the forward pass runs; needs the distributed optimizer (ours)."""

    def __post_init__(self) -> None:
        """Check ranges and combinations."""
        require(self.learning_rate > 0, f"optimizer.learning_rate={self.learning_rate} must be positive")
        require(
            0 <= self.min_learning_rate <= self.learning_rate,
            f"optimizer.min_learning_rate={self.min_learning_rate} must lie in [0, "
            f"learning_rate={self.learning_rate}]",
        )
        require(self.warmup_steps >= 0, f"optimizer.warmup_steps={self.warmup_steps} must not be negative")
        require(
            self.decay_steps is None or self.decay_steps > 0,
            f"optimizer.decay_steps={self.decay_steps} must be positive",
        )
        require(self.clip_grad >= 0, f"optimizer.clip_grad={self.clip_grad} must not be negative; 0 is off")
        require(self.muon_rate > 0, f"optimizer.muon_rate={self.muon_rate} must be positive")
        require(
            0 <= self.muon_momentum < 1, f"optimizer.muon_momentum={self.muon_momentum} must lie in [0, 1)"
        )
        require(
            self.kind == "adam" or not self.use_distributed_optimizer,
            "optimizer.kind=muon needs whole matrices, which the distributed optimizer cuts: set "
            "optimizer.use_distributed_optimizer=false (states then take 4 bytes a weight on every rank)",
        )
        require(
            not self.overlap_param_gather or (self.use_distributed_optimizer and self.overlap_grad_reduce),
            "optimizer.overlap_param_gather needs optimizer.use_distributed_optimizer and "
            "optimizer.overlap_grad_reduce; set both, or switch it off",
        )


@dataclass(kw_only=True)
class TrainerConfig:
    """Length of the run, batch, precision."""

    steps: int
    """Optimizer steps of the whole run, those before a resume included."""
    global_batch_size: int
    """Windows of one optimizer step over all ranks."""
    initial_batch_size: int | None = None
    """Windows of the first step; the batch then grows to `global_batch_size`. None: no ramp (ours)."""
    batch_increment: int | None = None
    """Windows by which the batch grows at a time; `initial_batch_size` where not set."""
    batch_ramp_steps: int = 0
    """Steps until the batch has its full size, in equal parts."""
    micro_batch_size: int = 1
    """Windows that one rank takes through the model at a time."""
    precision: Precision = "bf16"
    """Numbers of the forward and backward pass; gradients are summed and weights kept in fp32 (ours)."""
    fp8: FP8Format = "off"
    """Matrix products of the layers in 8 bits, by Transformer Engine on a GPU: `hybrid` has e4m3 forward and
    e5m2 backward; weights and all else stay in bf16 (ours: off)."""
    fp8_recipe: FP8Recipe = "delayed"
    """How 8-bit tensors are scaled: by earlier steps (`delayed`), by the tensor at hand (`tensorwise`), by
    blocks of it (`blockwise`), or as Blackwell does (`mxfp8`)."""
    max_minutes: float | None = None
    """Save and stop after this many minutes of training, for schedulers with a time limit."""

    def __post_init__(self) -> None:
        """Check sizes."""
        for name in ("steps", "global_batch_size", "micro_batch_size"):
            value = getattr(self, name)
            require(value > 0, f"trainer.{name}={value} must be positive")
        require(
            self.fp8 == "off" or self.precision == "bf16",
            f"trainer.fp8={self.fp8} needs trainer.precision=bf16, not {self.precision}",
        )
        if self.initial_batch_size is None:
            return
        first, by = self.initial_batch_size, self.batch_growth
        require(
            0 < first < self.global_batch_size and by > 0 and (self.global_batch_size - first) % by == 0,
            f"trainer.initial_batch_size={first} does not reach "
            f"global_batch_size={self.global_batch_size} in whole increments of {by}; change one of them",
        )
        require(
            self.batch_ramp_steps > 0,
            f"trainer.batch_ramp_steps={self.batch_ramp_steps} must be positive with an initial_batch_size",
        )

    @property
    def batch_growth(self) -> int:
        """Windows by which the batch grows at a time; 0 without a ramp."""
        return self.batch_increment or self.initial_batch_size or 0

    def batch_size(self, step: int) -> int:
        """Windows of optimizer step `step`, counted from 0."""
        if self.initial_batch_size is None or step >= self.batch_ramp_steps:
            return self.global_batch_size
        increments = (self.global_batch_size - self.initial_batch_size) // self.batch_growth
        return self.initial_batch_size + step * increments // self.batch_ramp_steps * self.batch_growth


@dataclass(kw_only=True)
class CheckpointConfig:
    """When to save, what to keep, where to start from."""

    interval: int = 1000
    """Steps between checkpoints; the last step is always saved."""
    keep: int = 2
    """Committed checkpoints to keep; at least 2, so that one damaged folder never ends a run."""
    asynchronous: bool = True
    """Write files behind the steps that follow, from a copy in host memory (ours)."""
    load: str | None = None
    """Checkpoint folder whose weights start this run (the hand-over from stage 1 to stage 2): step, windows
    and optimizer start afresh. A run that has checkpoints of its own goes on from those."""
    verify: bool = True
    """Check the checksum of every file before it is loaded."""
    accept_changed_data: bool = False
    """Resume although the plan changed: the windows counter is kept, the order of the data is another one."""

    def __post_init__(self) -> None:
        """Check counts."""
        require(self.interval > 0, f"checkpoint.interval={self.interval} must be positive")
        require(
            self.keep >= 2, f"checkpoint.keep={self.keep} must be at least 2: a crash may damage the newest"
        )


@dataclass(kw_only=True)
class ValidationConfig:
    """Loss on `data.validation`."""

    interval: int = 1000
    """Steps between evaluations; the last step is always evaluated."""
    windows: int = 64
    """Windows of every evaluation, the same ones each time; rounded up to whole global batches."""

    def __post_init__(self) -> None:
        """Check counts."""
        require(self.interval > 0, f"validation.interval={self.interval} must be positive")
        require(self.windows > 0, f"validation.windows={self.windows} must be positive")


_LEAST_COLLECTIVE_MINUTES = 120.0
"""Before the first step no watchdog runs, and rank 0 may prepare data for long."""


@dataclass(kw_only=True)
class GuardConfig:
    """What to do about steps that would harm the model."""

    spike_factor: float = 0.0
    """Skip a step whose loss or gradient norm exceeds this many times its running mean; 0 is off (ours). A
    step with a NaN or an infinity is always skipped."""
    warmup_steps: int = 100
    """Steps before spikes are judged."""
    max_consecutive: int = 10
    """End the run with an error after this many skipped steps in a row."""
    hang_minutes: float = 60.0
    """Write the stacks of all threads to RUN/stacks and end the process when no step ended for so long, time
    for validation and saving included; 0 is off (ours)."""

    def __post_init__(self) -> None:
        """Check ranges."""
        factor = self.spike_factor
        require(factor == 0 or factor > 1, f"guard.spike_factor={factor} must be 0 (off) or larger than 1")
        require(self.hang_minutes >= 0, f"guard.hang_minutes={self.hang_minutes} must not be negative")
        require(self.max_consecutive > 0, f"guard.max_consecutive={self.max_consecutive} must be positive")

    @property
    def collective_timeout(self) -> timedelta:
        """How long a collective may wait: longer than `hang_minutes`, whose watchdog writes stacks first."""
        if not self.hang_minutes:
            return timedelta(days=7)
        return timedelta(minutes=max(_LEAST_COLLECTIVE_MINUTES, 2 * self.hang_minutes))


@dataclass(kw_only=True)
class EMAConfig:
    """Exponential moving average of the weights, kept in fp32 beside them and saved with every checkpoint."""

    decay: float = 0.0
    """Share of the old average kept at each step, such as 0.999; 0 is off (ours)."""

    def __post_init__(self) -> None:
        """Check the range."""
        require(0 <= self.decay < 1, f"ema.decay={self.decay} must lie in [0, 1); 0 is off")


@dataclass(kw_only=True)
class ProfilerConfig:
    """torch's profiler over a few steps; the trace is written to RUN/profile for the trace viewers."""

    start: int | None = None
    """Step after which it starts; None: never. The step after it warms the profiler up."""
    steps: int = 3
    """Steps recorded."""
    rank: int = 0
    """The process that is looked at."""

    def __post_init__(self) -> None:
        """Check counts."""
        require(self.start is None or self.start >= 0, f"profiler.start={self.start} must not be negative")
        require(self.steps > 0, f"profiler.steps={self.steps} must be positive")


@dataclass(kw_only=True)
class SamplesConfig:
    """Pictures drawn from fixed prompts with fixed random numbers, for TensorBoard."""

    interval: int = 0
    """Steps between them; 0 is off. The last step is always drawn."""
    prompts: list[str] = field(default_factory=list)
    """What is drawn; picture k of every step uses seed k."""
    height: int = 512
    """Pixels; a multiple of the vision tokenizer's spatial factor."""
    width: int = 512
    """Pixels, likewise."""
    guidance: float = 3.0
    """Scale of classifier-free guidance; 1 is off."""
    text_tokenizer: str = ""
    """Its file."""
    vision_tokenizer: str = ""
    """Its folder."""
    dialect: str = "emu3"
    """How the datasets' documents are written."""
    painter: str = "emu3_megatron.inference.painter:Painter"
    """`module:class` that draws; it is named and not imported, since generation is built on training."""

    def __post_init__(self) -> None:
        """Check that there is something to draw with."""
        require(self.interval >= 0, f"samples.interval={self.interval} must not be negative; 0 is off")
        if self.interval:
            for name in ("prompts", "text_tokenizer", "vision_tokenizer"):
                require(bool(getattr(self, name)), f"samples.{name} is empty; samples.interval needs it")


@dataclass(kw_only=True)
class LoggingConfig:
    """What is shown and recorded."""

    progress: bool = True
    """Progress bar on rank 0."""
    tensorboard: bool = True
    """Scalars in RUN/tensorboard."""
    histogram_interval: int = 0
    """Steps between histograms of the weights that rank 0 holds, in TensorBoard; 0: never."""
    peak_tflops: float | None = None
    """Peak of one device in TFLOP/s, against which MFU is stated; known for common GPUs, none for a CPU."""
    straggler_interval: int = 100
    """Steps after which the slowest rank is named, where one is clearly slower than the median; 0: never."""

    def __post_init__(self) -> None:
        """Check ranges."""
        for name in ("straggler_interval", "histogram_interval"):
            value = getattr(self, name)
            require(value >= 0, f"logging.{name}={value} must not be negative")


@dataclass(kw_only=True)
class TrainingConfig:
    """One run, from raw windows to a checkpoint."""

    run: str
    """Folder of the run: metrics, TensorBoard, checkpoints. A run that exists is resumed. On a command line
    under torchrun, which has options that begin with `--run`, write `--run_folder`."""
    platform: Literal["auto", "cuda", "cpu"] = "auto"
    """`auto` takes the CPU only where there is no NVIDIA driver."""
    seed: int = 1234
    """Seed of the initial weights, of dropout, and of the plan."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The decoder."""
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    """Adapters, where only those are trained."""
    data: DataConfig
    """The mixture and its windows."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Tensor, pipeline and context parallelism; data parallelism is what is left of the ranks."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """AdamW and its schedule."""
    trainer: TrainerConfig
    """Length, batch, precision."""
    loss: LossConfig = field(default_factory=LossConfig)
    """Weights by class of token."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Saving and starting."""
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    """Held-out loss."""
    guard: GuardConfig = field(default_factory=GuardConfig)
    """Steps to skip."""
    ema: EMAConfig = field(default_factory=EMAConfig)
    """Averaged weights."""
    samples: SamplesConfig = field(default_factory=SamplesConfig)
    """Pictures in TensorBoard."""
    profiler: ProfilerConfig = field(default_factory=ProfilerConfig)
    """Traces of some steps."""
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    """Progress, TensorBoard, MFU."""

    def __post_init__(self) -> None:
        """Check what two sections must agree on."""
        steps, warmup = self.trainer.steps, self.optimizer.warmup_steps
        require(
            warmup < steps,
            f"optimizer.warmup_steps={warmup} must be smaller than trainer.steps={steps}; lower it",
        )
        length, chunks = self.data.context_length, 2 * self.parallel.context_parallel_size
        require(
            self.data.attention == "document" or chunks == 2 or length % chunks == 0,
            f"data.attention=window needs a data.context_length that {chunks} (2 x context_parallel_size) "
            f"divides; it is {length}",
        )

    @property
    def frozen_copies(self) -> int:
        """Models of the same size that a run holds besides its own."""
        return 0
