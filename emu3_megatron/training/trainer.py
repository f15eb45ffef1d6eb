"""The trainer: builds the parts of a run, and turns windows into optimizer steps."""

from __future__ import annotations

import logging
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from emu3_megatron.data.loader import Batch
from emu3_megatron.files import atomic_write
from emu3_megatron.parallel.platform import Platform
from emu3_megatron.training import command_line
from emu3_megatron.training.callbacks import Callback, WeightAverage, build_callbacks, spread
from emu3_megatron.training.checkpoint import Checkpointer, Progress, Record
from emu3_megatron.training.checkpoint_choice import newest_valid, sound_checkpoint
from emu3_megatron.training.config import SourceConfig, TrainingConfig
from emu3_megatron.training.data import TrainingData
from emu3_megatron.training.metrics import MetricsLayout, StepReport, Totals
from emu3_megatron.training.modules import is_rank_zero
from emu3_megatron.training.objective import NextToken, Objective, ObjectiveFactory
from emu3_megatron.training.optimizer import Optimizer, wrap_for_data_parallelism
from emu3_megatron.training.randomness import seed_step, step_key
from emu3_megatron.training.resume import check_resumable, check_start
from emu3_megatron.training.schedules import learning_rate
from emu3_megatron.training.step import ForwardBackward
from emu3_megatron.training.stopwatch import Stopwatch
from emu3_megatron.training.throughput import device_peak_tflops, training_flops

logger = logging.getLogger(__name__)

MAXRSS_UNIT = 1024 if sys.platform.startswith("linux") else 1
"""Bytes in a unit of `ru_maxrss`."""


@dataclass(frozen=True)
class Measuring:
    """What turns the windows of one list of sources into sums."""

    objective: Objective
    layout: MetricsLayout
    run: ForwardBackward


class Trainer:
    """One run on this rank. Process groups must exist; `fit` does the rest.

    Args:
        config: The resolved configuration.
        platform: Device and backend.
        data: Vocabulary, plan and loaders.
        objective: What the windows are trained for.
        callbacks: More of them, after those that the configuration asks for; the same on all ranks.
    """

    def __init__(
        self,
        config: TrainingConfig,
        platform: Platform,
        data: TrainingData,
        objective: ObjectiveFactory = NextToken.make,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        # megatron-core, so after the platform
        from emu3_megatron.model import build_model
        from emu3_megatron.model.layers import describe_attention

        self.config = config
        self.data = data
        self.progress = Progress()
        self._platform = platform
        self._stopping = False
        self._wishes: dict[str, float] = {}
        self._make_objective = objective
        shape = config.model
        self._attention = describe_attention(
            shape, config.parallel, context_length=config.data.context_length, cuda=platform.is_cuda
        )
        self._has_dropout = any(
            (shape.embedding_dropout, shape.attention_dropout, shape.hidden_dropout, config.lora.dropout)
        )
        self._stopwatch = Stopwatch(on_gpu=platform.is_cuda)
        checkpoints = Path(config.run) / "checkpoints"
        self._resumed = newest_valid(checkpoints, checksums=config.checkpoint.verify)
        model = build_model(
            config.model,
            vocabulary_padded_size=data.vocabulary.padded_size,
            vocabulary_size=data.vocabulary.size,
            parallel=config.parallel,
            seed=config.seed,
            precision=config.trainer.precision,
            fp8=config.trainer.fp8,
            fp8_recipe=config.trainer.fp8_recipe,
            initialize=self._resumed is None and config.checkpoint.load is None,
        )
        if config.lora.rank:
            from emu3_megatron.model.lora import add_adapters

            for chunk in model:
                add_adapters(chunk, config.lora, seed=config.seed)
        self.chunks = wrap_for_data_parallelism(model, config.optimizer, self._stopwatch.stop)
        self.optimizer = Optimizer(self.chunks, config.optimizer, config.trainer.precision)
        self._training = self.measuring(config.data.sources)
        self._average = WeightAverage(self.chunks, config.ema.decay) if config.ema.decay else None
        self._checkpointer = Checkpointer(
            checkpoints,
            config.checkpoint.keep,
            self.chunks,
            self.optimizer,
            precision=config.trainer.precision,
            averages=self._average.averages if self._average else None,
        )
        self._callbacks: list[Callback] = [*build_callbacks(self, self._average), *callbacks]
        self._peak_flops = self._peak_flops_of_all_devices()

    # ---- the loop

    def fit(self) -> None:
        """Train from where the run stands to its last step, or until something asks it to stop."""
        try:
            self._start()
            for callback in self._callbacks:
                callback.on_start(self)
            batches = self.data.batches(self.config, step=self.progress.step, windows=self.progress.windows)
            while self.progress.step < self.config.trainer.steps and not self._stopping:
                started = time.perf_counter()
                batch = next(batches)
                report = self._step(batch, waited=time.perf_counter() - started)
                report.seconds = time.perf_counter() - started
                report.values = self._named(report)
                for callback in self._callbacks:
                    callback.on_step(self, report)
            for callback in self._callbacks:
                callback.on_end(self)
        finally:
            for callback in self._callbacks:
                callback.close()

    def _step(self, batches: Sequence[Batch], *, waited: float) -> StepReport:
        """One optimizer step: gradients, sums, and the update unless a callback forbids it."""
        step = self.progress.step
        dropout_key = None
        if self._has_dropout:
            seed_step(self.config.seed, step)
            dropout_key = step_key(self.config.seed, step)
        self.optimizer.zero_gradients()
        self._stopwatch.start()
        sums, extras = self._training.run(batches, dropout_key=dropout_key)
        extras |= {"wait_seconds": waited, "saving": float(self._checkpointer.is_writing), **self._wishes}
        totals = self._reduce(self._training.layout, sums, extras, waited + self._stopwatch.seconds)
        report = StepReport(
            step=step + 1,
            windows=self.progress.windows + self.config.trainer.batch_size(step),
            totals=totals,
            loss=self._training.objective.value(totals),
            grad_norm=self.optimizer.gradient_norm(),
            learning_rate=learning_rate(self.config.optimizer, step, self.config.trainer.steps),
        )
        # Every callback is asked, whatever another one answers.
        answers = [callback.allow_update(self, report) for callback in self._callbacks]
        report.skipped = not all(answers)
        if report.skipped:
            self.progress.skipped += 1
        else:
            self.optimizer.update(report.grad_norm, report.learning_rate)
            self.progress.updates += 1
        self.progress.step, self.progress.windows = report.step, report.windows
        return report

    # ---- what callbacks may ask for

    def wish(self, name: str) -> None:
        """Send one of `metrics.EXTRAS` to all ranks with the next step's sums. Safe in a signal handler."""
        self._wishes[name] = 1.0

    def stop(self) -> None:
        """End the run after this step. Every rank must call it in the same step."""
        self._stopping = True

    def begin_save(self) -> None:
        """Start to write a checkpoint of this moment behind the next steps; all ranks call it together."""
        if self.config.optimizer.overlap_param_gather:
            for chunk in self.chunks:  # what the next forward pass would gather belongs to this moment
                chunk.start_param_sync(force_sync=True)
        self._checkpointer.begin(self._record())

    def finish_save(self) -> Path:
        """Wait for what `begin_save` started, and commit it; all ranks call it together."""
        return self._checkpointer.finish()

    def measuring(self, sources: Mapping[str, SourceConfig]) -> Measuring:
        """What measures windows of these sources with the run's model and objective; see `evaluate`."""
        device = self._platform.device
        objective = self._make_objective(self.config, sources, self.data.vocabulary, device)
        ranks = torch.distributed.get_world_size()
        layout = MetricsLayout(tuple(sources), objective.quantities, ranks if ranks > 1 else 0)
        data = self.config.data
        run = ForwardBackward(
            self.chunks,
            objective,
            layout,
            device=device,
            window_tokens=data.context_length if data.attention == "window" else None,
        )
        return Measuring(objective, layout, run)

    def evaluate(self, measuring: Measuring, batches: Sequence[Batch]) -> Totals:
        """Sums of one global batch over all ranks, without gradients and without dropout."""
        for chunk in self.chunks:
            chunk.eval()
        with torch.no_grad():
            sums, extras = measuring.run(batches, forward_only=True)
        for chunk in self.chunks:
            chunk.train()
        return self._reduce(measuring.layout, sums, extras)

    # ---- starting

    def _start(self) -> None:
        """Resume the run's newest valid checkpoint, or start from another one's weights, or from scratch."""
        self._announce(self._attention)
        options = self.config.checkpoint
        now = self._record()
        folder = self._resumed
        if folder is not None:
            record = Record.read(folder)
            check_resumable(folder, record, now, accept_changed_data=options.accept_changed_data)
            self._checkpointer.restore(folder, record)
            self.progress = record.progress
            self._announce(f"resumed {folder}: step {self.progress.step}, window {self.progress.windows}")
        elif options.load is not None:
            folder = sound_checkpoint(Path(options.load), checksums=options.verify)
            check_start(folder, Record.read(folder), now)
            self._checkpointer.load_weights(folder)
            self._announce(f"started from the weights of {folder}")
        if self._average is not None and not (folder and self.progress.updates and Record.read(folder).ema):
            self._average.restart()
        # Not before: what describes a run outlives a start that is refused.
        if is_rank_zero():
            with atomic_write(Path(self.config.run) / "config.yaml") as stream:
                stream.write(command_line.to_yaml(self.config).encode())
        if self.progress.step >= self.config.trainer.steps:
            self._announce(f"the run has all its {self.progress.step} steps; raise trainer.steps to go on")

    def _record(self) -> Record:
        return Record(
            progress=self.progress,
            vocabulary=self.data.vocabulary.to_dict(),
            plan_fingerprint=self.data.plan.fingerprint,
            plan=self.data.plan.identity,
            config=asdict(self.config),
            ema=self._average is not None,
        )

    def _announce(self, message: str) -> None:
        if is_rank_zero():
            logger.info(message)

    # ---- measuring

    def _reduce(
        self, layout: MetricsLayout, sums: torch.Tensor, extras: dict[str, float], seconds: float = 0.0
    ) -> Totals:
        """Add up over all ranks; the one collective that a step spends on metrics."""
        vector = layout.vector(sums, extras, rank=torch.distributed.get_rank(), seconds=seconds)
        if torch.distributed.get_world_size() > 1:
            torch.distributed.all_reduce(vector)
        return layout.totals(vector)

    def _named(self, report: StepReport) -> dict[str, float | int]:
        """The report under the names of metrics.jsonl."""
        extras, world = report.totals.extras, torch.distributed.get_world_size()
        tokens = extras["window_tokens"] - extras["padding_tokens"]
        values: dict[str, float | int] = {
            "step": report.step,
            "loss": report.loss,
            "loss_text": float("nan"),
            "loss_vision": float("nan"),
            **self._training.objective.named(report.totals),
            "grad_norm": report.grad_norm,
            "learning_rate": report.learning_rate,
            "tokens_per_second": tokens / report.seconds,
            "windows": report.windows,
            "padding_fraction": extras["padding_tokens"] / extras["window_tokens"],
            "data_wait_fraction": extras["wait_seconds"] / world / report.seconds,
            "seconds": report.seconds,
            "skipped_steps": self.progress.skipped,
            "memory_gib": self._peak_memory() / 2**30,
            **spread(report.totals.rank_seconds),
        }
        if self._peak_flops:
            vocabulary = self.data.vocabulary.size
            flops = training_flops(self.config.model, vocabulary, tokens, extras["attention_pairs"])
            values["mfu"] = flops / report.seconds / self._peak_flops
        return values

    def _peak_memory(self) -> int:
        """Bytes at most in use on this rank so far: of the GPU, or of the process."""
        if self._platform.is_cuda:
            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * MAXRSS_UNIT

    def _peak_flops_of_all_devices(self) -> float | None:
        peak = self.config.logging.peak_tflops
        if peak is None and self._platform.is_cuda:
            peak = device_peak_tflops(torch.cuda.get_device_name())
        return peak * 1e12 * torch.distributed.get_world_size() if peak else None
