"""Training against `transformers` and its Trainer: the same model, windows and masks, on one CPU.

Usage: OMP_NUM_THREADS=1 python benchmarks/training.py [--steps 3 --rounds 5 ...]

Both start from the same weights (so the first losses agree, which is printed), read the same packed windows
of captioned pictures over Emu3's whole vocabulary (184,622 ids), confine attention to documents, and train
every label with weight one by AdamW with clipping, in fp32 and without dropout. `transformers` gets the
windows as a 4-dimensional document mask and positions that start again in every document. Rounds of both
alternate, and medians are compared. Tokens of documents are counted, padding is not; time is the CPU time of
this process over whole optimizer steps, its wall time beside it. The first step of a round, which warms up,
is left out.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from emu3_megatron.parallel import platform

warnings.filterwarnings("ignore")
PLATFORM = platform.install("cpu")

import numpy as np
import torch
import transformers

from emu3_megatron.conversion import configuration
from emu3_megatron.conversion.maps import LAYOUTS, WeightMap, canonical_names
from emu3_megatron.data import ShardWriter, write_manifest
from emu3_megatron.data.window import Window
from emu3_megatron.grammar import Dialect, Image, Modality
from emu3_megatron.model import ModelConfig
from emu3_megatron.parallel.config import ParallelConfig
from emu3_megatron.parallel.groups import initialize_parallel
from emu3_megatron.text import ByteTokenizer
from emu3_megatron.training import config as settings
from emu3_megatron.training.callbacks import Callback
from emu3_megatron.training.data import TrainingData
from emu3_megatron.training.metrics import StepReport
from emu3_megatron.training.modules import unwrap
from emu3_megatron.training.trainer import Trainer
from emu3_megatron.vocabulary import Vocabulary

VOCABULARY = Vocabulary.preset("emu3")
LEARNING_RATE, WEIGHT_DECAY, CLIP = 1e-4, 0.1, 1.0


@dataclass
class Clock:
    """Marks at the ends of steps."""

    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def mark(self) -> None:
        """A step ended (or the first one begins)."""
        self.cpu.append(time.process_time())
        self.wall.append(time.perf_counter())


def write_data(folder: Path) -> None:
    """Captions of random ids and pictures of random codes, 12 to 24 codes a side."""
    dialect = Dialect.preset("emu3", VOCABULARY, ByteTokenizer())
    rng = np.random.default_rng(0)
    with ShardWriter(folder, "pictures", vocabulary=VOCABULARY) as writer:
        for number in range(256):
            height, width = rng.integers(12, 25, 2)
            span = dialect.encode_span(Image(rng.integers(0, VOCABULARY.codebook_size, (height, width))))
            caption = rng.integers(0, VOCABULARY.text_size, rng.integers(20, 80))
            writer.add_document([(caption, 0), (span, 1)], str(number))
    write_manifest(
        folder,
        "pictures",
        1,
        vocabulary=VOCABULARY,
        dialect_name=dialect.name,
        dialect_fingerprint=dialect.fingerprint,
        text_tokenizer_fingerprint=ByteTokenizer.fingerprint,
        vision_tokenizer_fingerprint="random",
        provenance={"maker": "benchmarks/training.py"},
    )


def our_configuration(folder: Path, arguments: argparse.Namespace) -> settings.TrainingConfig:
    """The run, as a YAML file would give it."""
    return settings.TrainingConfig(
        run=str(folder / "run"),
        model=ModelConfig.preset(
            "tiny",
            num_layers=arguments.num_layers,
            hidden_size=arguments.hidden_size,
            ffn_hidden_size=3 * arguments.hidden_size,
            num_attention_heads=arguments.hidden_size // 32,
            num_query_groups=arguments.hidden_size // 64,
        ),
        data=settings.DataConfig(
            sources={"pictures": settings.SourceConfig(path=str(folder / "pictures"))},
            context_length=arguments.window,
            num_workers=0,
        ),
        optimizer=settings.OptimizerConfig(
            learning_rate=LEARNING_RATE, schedule="constant", warmup_steps=0, clip_grad=CLIP, beta2=0.95
        ),
        trainer=settings.TrainerConfig(
            steps=arguments.steps * arguments.rounds,
            global_batch_size=arguments.windows_per_step,
            precision="fp32",
        ),
        loss=settings.LossConfig(vision_weight=1.0, break_weight=1.0),
        checkpoint=settings.CheckpointConfig(interval=10**9),
        logging=settings.LoggingConfig(progress=False, tensorboard=False),
    )


class Rounds(Callback):
    """Runs a round of the other side after each round of ours."""

    def __init__(self, steps: int, other: Any) -> None:
        self._steps, self._other = steps, other
        self.clocks = [Clock()]

    def on_start(self, trainer: Trainer) -> None:
        """The first round begins."""
        self.clocks[-1].mark()

    def on_step(self, trainer: Trainer, report: StepReport) -> None:
        """Mark; at the end of a round let the other side run."""
        clock = self.clocks[-1]
        clock.mark()
        clock.losses.append(report.loss)
        print(f"emu3-megatron: step {report.step}, {clock.cpu[-1] - clock.cpu[-2]:.2f} CPU s", flush=True)
        if report.step % self._steps == 0:
            self._other()
            if report.step < trainer.config.trainer.steps:
                self.clocks.append(Clock())
                self.clocks[-1].mark()


class UnsavedTrainer(Trainer):
    """This package's trainer, without the checkpoint of the last step."""

    def begin_save(self) -> None:
        """Nothing."""

    def finish_save(self) -> Path:
        """Nothing."""
        return Path(self.config.run)


def their_features(window: Window) -> dict[str, torch.Tensor]:
    """A window as `transformers` takes it: labels stand where their token stands, and are shifted inside."""
    size = len(window.tokens)
    starts = torch.from_numpy(window.cu_seqlens).long()
    place = torch.arange(size)
    document = torch.bucketize(place, starts[1:], right=True)
    mask = (document[:, None] == document) & (place[:, None] >= place)
    labels = torch.full((size,), -100)
    target = torch.from_numpy(window.modality != Modality.PADDING)[:-1]
    labels[1:][target] = torch.from_numpy(window.labels)[:-1][target]
    return {
        "input_ids": torch.from_numpy(window.tokens),
        "position_ids": place - starts[document],
        "attention_mask": mask[None],
        "labels": labels,
    }


class Windows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Windows of a plan from `start` on."""

    def __init__(self, plan: Any, start: int, count: int) -> None:
        self._plan, self._start, self._count = plan, start, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return their_features(self._plan.window(self._start + index))


class InOrder(transformers.Trainer):
    """transformers' Trainer over windows in their order."""

    def _get_train_sampler(self, *_: Any, **__: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


class Marks(transformers.TrainerCallback):
    """Marks the clock at the ends of steps."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """The first step begins."""
        self._clock.mark()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """A step ends, and the next begins."""
        self._clock.mark()
        print(f"transformers: a step, {self._clock.cpu[-1] - self._clock.cpu[-2]:.2f} CPU s", flush=True)

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        """Keep the loss."""
        if "loss" in logs:
            self._clock.losses.append(float(logs["loss"]))


def their_model(model: ModelConfig, weights: dict[str, torch.Tensor]) -> Any:
    """The same decoder in `transformers`, with our initial weights."""
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY.size,
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_hidden_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.num_query_groups,
        rms_norm_eps=model.layernorm_epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": float(model.rotary_base)},
        max_position_embeddings=model.max_position_embeddings,
        tie_word_embeddings=False,
        use_cache=False,
        attn_implementation="sdpa",
    )
    theirs = transformers.LlamaForCausalLM(config)
    weight_map = WeightMap(configuration.architecture(model, VOCABULARY), LAYOUTS["emu3"])
    theirs.load_state_dict(dict(weight_map.to_hugging_face(weights)))
    return theirs


class TheirSide:
    """A model and its Trainer, round by round."""

    def __init__(self, model: Any, plan: Any, folder: Path, arguments: argparse.Namespace) -> None:
        self._model, self._plan, self._folder, self._arguments = model, plan, folder, arguments
        self.clocks: list[Clock] = []

    def round(self) -> None:
        """Train the next steps."""
        steps, windows = self._arguments.steps, self._arguments.windows_per_step
        start = len(self.clocks) * steps * windows
        clock = Clock()
        self.clocks.append(clock)
        InOrder(
            model=self._model,
            args=transformers.TrainingArguments(
                output_dir=str(self._folder / "theirs"),
                max_steps=steps,
                per_device_train_batch_size=1,
                gradient_accumulation_steps=windows,
                learning_rate=LEARNING_RATE,
                lr_scheduler_type="constant",
                weight_decay=WEIGHT_DECAY,
                adam_beta2=0.95,
                max_grad_norm=CLIP,
                optim="adamw_torch_fused",
                use_cpu=True,
                save_strategy="no",
                logging_steps=1,
                report_to=[],
                disable_tqdm=True,
                dataloader_pin_memory=False,
            ),
            train_dataset=Windows(self._plan, start, steps * windows),
            callbacks=[Marks(clock)],
        ).train()


def tokens_after_first_step(plan: Any, arguments: argparse.Namespace) -> list[int]:
    """Tokens of documents in the counted steps of every round."""
    windows, steps = arguments.windows_per_step, arguments.steps
    counts = []
    for number in range(arguments.rounds):
        first, last = (number * steps + 1) * windows, (number + 1) * steps * windows
        counts.append(sum(int(plan.window(index).length.sum()) for index in range(first, last)))
    return counts


def show(name: str, clocks: list[Clock], tokens: list[int]) -> float:
    """Print a line; tokens per CPU second, the median of the rounds."""
    cpu = [count / (clock.cpu[-1] - clock.cpu[1]) for count, clock in zip(tokens, clocks, strict=True)]
    wall = [count / (clock.wall[-1] - clock.wall[1]) for count, clock in zip(tokens, clocks, strict=True)]
    listed = " ".join(f"{value:.0f}" for value in cpu)
    median = statistics.median(cpu)
    print(f"{name:24s} {median:8.0f} tokens/CPU s ({listed}); by wall time {statistics.median(wall):.0f}")
    return median


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for name, value in {
        "hidden-size": 128,
        "num-layers": 6,
        "window": 2048,
        "windows-per-step": 2,
        "steps": 3,
        "rounds": 5,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default {value}")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_data(folder / "pictures")
        config = our_configuration(folder, arguments)
        Path(config.run).mkdir()
        initialize_parallel(ParallelConfig(), PLATFORM, config.seed)
        data = TrainingData.open(config)
        ours = UnsavedTrainer(config, PLATFORM, data)
        weights = canonical_names(unwrap(ours.chunks[0]).state_dict())
        theirs = TheirSide(their_model(config.model, weights), data.plan, folder, arguments)
        rounds = Rounds(arguments.steps, theirs.round)
        ours._callbacks.insert(0, rounds)
        ours.fit()
        tokens = tokens_after_first_step(data.plan, arguments)
    parameters = config.model.parameter_count(VOCABULARY.size)
    print(
        f"{parameters / 1e6:.1f}M parameters, {VOCABULARY.size:,} ids, windows of {arguments.window}, "
        f"{arguments.windows_per_step} a step, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}, transformers {transformers.__version__}"
    )
    print(
        f"loss of the first step: {rounds.clocks[0].losses[0]:.6f} and {theirs.clocks[0].losses[0]:.6f}; of "
        f"the first round's last: {rounds.clocks[0].losses[-1]:.6f} and {theirs.clocks[0].losses[-1]:.6f}"
    )
    ratio = show("emu3-megatron", rounds.clocks, tokens)
    ratio /= show("transformers Trainer", theirs.clocks, tokens)
    print(f"ratio {ratio:.2f} (bar 1.3)")


if __name__ == "__main__":
    main()
