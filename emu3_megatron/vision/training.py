"""Training of the vision tokenizer, in one process or by torchrun: gradients are averaged over the processes.

Shapes: B batch, T frames, t latent frames, N frames of a batch, C channels, D length of a codebook vector,
R rows of latents, K codes.
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from emu3_megatron import processes
from emu3_megatron.vision.averages import WeightAverages
from emu3_megatron.vision.block_means import start_from_block_means
from emu3_megatron.vision.codebook import EmaCodebook
from emu3_megatron.vision.corpus import Batch, VisionDataset, load_manifests
from emu3_megatron.vision.draws import Draws
from emu3_megatron.vision.initialization import initialise
from emu3_megatron.vision.losses import commitment_loss, foreground_mask, straight_through
from emu3_megatron.vision.metrics import codebook_use_of_counts
from emu3_megatron.vision.model import VisionTokenizer
from emu3_megatron.vision.objective import Objective
from emu3_megatron.vision.optimization import clip_gradients, make_optimizer, set_learning_rate
from emu3_megatron.vision.processes import (
    average_gradients,
    averaged,
    rank,
    set_up_processes,
    summed,
    world_size,
)
from emu3_megatron.vision.reporting import METRICS_FILE, Reporter
from emu3_megatron.vision.streaming import open_stream
from emu3_megatron.vision.training_config import VisionTrainingConfig, learning_rate
from emu3_megatron.vision.training_state import STATE_FILE, read_state, write_state
from emu3_megatron.vision.warm_start import warm_start

__all__ = ["METRICS_FILE", "STATE_FILE", "VisionTrainer", "train"]


class VisionTrainer:
    """Trains one `VisionTokenizer`.

    Every random choice of step k comes from (seed, k, process): a resumed run repeats the undisturbed one.

    Args:
        config: the run.
        dataset: images and clips; the same on every process.
        device: where to train.
    """

    def __init__(
        self, config: VisionTrainingConfig, dataset: VisionDataset, device: torch.device | None = None
    ) -> None:
        self.config, self.dataset = config, dataset
        self.device = device or torch.device("cpu")
        self.rank = rank()
        config.check(world_size())
        if dataset.num_images + dataset.num_clips == 0:
            raise ValueError("the dataset has neither images nor clips: nothing to train on")
        torch.manual_seed(config.seed)
        self.tokenizer = VisionTokenizer(config.model)
        initialise(self.tokenizer)
        if config.start_from_block_means:
            start_from_block_means(self.tokenizer)
        start = warm_start(self.tokenizer, Path(config.warm_start)) if config.warm_start else None
        self.tokenizer.to(self.device)
        if config.channels_last:
            _channels_last(self.tokenizer)
        self.codebook = EmaCodebook(
            self.tokenizer.codebook.data, decay=config.loss.codebook_decay, seed=config.seed
        )
        if start is not None:
            self.codebook.adopt(start.codes)
        self.tokenizer.codebook.requires_grad_(False)
        self.parameters = [p for p in self.tokenizer.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(
            self.tokenizer,
            betas=(0.9, 0.99),
            units=start.units if start is not None else None,
            muon_rate=config.schedule.muon_rate,
        )
        self.objective = Objective(config, self.device)
        self.averages: WeightAverages | None = None
        if config.average_decay:
            self.averages = WeightAverages(self.tokenizer, config.average_decay)
        self.draws = Draws(config, dataset, self.rank, world_size())
        self.step = 0
        self.code_counts_K = torch.zeros(config.model.codebook_size, dtype=torch.int64, device=self.device)

    @property
    def folder(self) -> Path:
        """Where results go."""
        return Path(self.config.output)

    def fit(self) -> VisionTokenizer:
        """Train to the last step, from the saved state if there is one; save and return the tokenizer."""
        steps = self.config.schedule.steps
        self.load_state()
        reporter = Reporter(self.folder, self.config.tensorboard, self.step) if self.rank == 0 else None
        began = time.perf_counter()
        with tqdm(
            total=steps, initial=self.step, desc="vision tokenizer", disable=None if self.rank == 0 else True
        ) as bar:
            while self.step < steps:
                metrics = self.train_step()
                self.step += 1
                bar.update()
                self._report(metrics, time.perf_counter() - began, reporter, bar)
                every = self.config.checkpoint_every
                if self._due(every) or (every and self.step == steps):
                    self.save_state()
        if self.averages is not None:
            self.averages.copy_to(self.tokenizer)
        self.tokenizer.eval().requires_grad_(True)
        if self.codebook.initialised:
            if self.config.loss.place_again:
                self.codebook.initialise(*self._latents_of_draws())
            self.codebook.compact()
        if reporter is not None:
            self.tokenizer.save_pretrained(self.folder)
            reporter.close()
        return self.tokenizer

    def train_step(self) -> dict[str, Tensor]:
        """One optimizer step; gives the loss and its parts, of this process, as scalars on the device."""
        schedule = self.config.schedule
        _training_mode(self.tokenizer, self.config.batch_statistics)
        draw = self.draws.take(self.step)
        batch = self._on_device(draw.batch)
        foreground_BTHW = _foreground(batch)
        with self._arithmetic():
            latents_BDthw = self.tokenizer.encode_latents(batch.pixels).float()
        quantized_BDthw, commitment = self._quantize(latents_BDthw, foreground_BTHW)
        target_NCHW, foreground_N1HW = _targets(batch, foreground_BTHW, draw.frames)
        rate = learning_rate(schedule, self.step)
        with self._arithmetic():
            reconstruction_NCHW = self.tokenizer.decode_latents(quantized_BDthw, frames=draw.frames).flatten(
                0, 1
            )
            error, parts = self.objective(
                reconstruction_NCHW,
                target_NCHW,
                foreground_N1HW,
                step=self.step,
                last_layer=self.tokenizer.decoder.conv_out.weight,
            )
        loss = error + self.config.loss.commitment_weight * commitment
        self.optimizer.zero_grad()
        loss.backward()
        average_gradients(self.parameters)
        norm = clip_gradients(self.optimizer, schedule.clip_gradient)
        set_learning_rate(self.optimizer, rate)
        self.optimizer.step()
        if self.objective.adversary is not None and self.step >= self.config.discriminator.start:
            with self._arithmetic():
                parts["discriminator"] = self.objective.adversary.learn(
                    target_NCHW, reconstruction_NCHW, rate, schedule.clip_gradient
                )
        if self.averages is not None:
            self.averages.update(self.tokenizer, self.codebook.take_moved())
        parts = {"loss": loss, **parts, "commitment": commitment, "gradient_norm": norm}
        return {name: value.detach() for name, value in parts.items()}

    def _quantize(self, latents_BDthw: Tensor, foreground_BTHW: Tensor) -> tuple[Tensor, Tensor]:
        loss_config = self.config.loss
        if self.step < loss_config.continuous_steps:
            return latents_BDthw, latents_BDthw.new_zeros(())
        rows_RD, plain_R, weights_R = self._rows(latents_BDthw, foreground_BTHW)
        if not self.codebook.initialised:
            self._place_codes(rows_RD, weights_R)
        codes_Bthw = self.tokenizer.codes_of(latents_BDthw.detach())
        codes_R = codes_Bthw.flatten()
        quantized_BDthw = self.tokenizer.vectors_of(codes_Bthw)
        quantized_RD = quantized_BDthw.movedim(1, -1).flatten(0, -2)
        self.codebook.update(rows_RD, codes_R, weights_R)
        every = loss_config.revive_every
        if (
            every
            and self.step % every == 0
            and self.step < loss_config.revive_until * self.config.schedule.steps
        ):
            self.codebook.revive(rows_RD, codes_R, weights_R, self.step)
        if loss_config.merge_distance and self.step == int(loss_config.merge_at * self.config.schedule.steps):
            self.codebook.merge(loss_config.merge_distance)
        self.code_counts_K += torch.bincount(codes_R, minlength=len(self.code_counts_K))
        commitment = commitment_loss(rows_RD, quantized_RD, 1 + (loss_config.plain_commitment - 1) * plain_R)
        return straight_through(latents_BDthw, quantized_BDthw), commitment

    def _rows(self, latents_BDthw: Tensor, foreground_BTHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Latents as rows, whether their patches are plain, and their weights."""
        rows_RD = latents_BDthw.movedim(1, -1).flatten(0, -2)
        plain_R = 1 - self._of_patches(foreground_BTHW).flatten()
        return rows_RD, plain_R, 1 - (1 - self.config.loss.plain_share) * plain_R

    def _of_patches(self, mask_BTHW: Tensor) -> Tensor:
        """Whether any pixel of the patch behind each code is set; float [B, t, h, w]."""
        side = self.tokenizer.spatial_factor
        frames = self.tokenizer.temporal_factor if mask_BTHW.shape[1] > 1 else 1
        kernel = (frames, side, side)
        return nn.functional.max_pool3d(mask_BTHW[:, None], kernel, kernel)[:, 0]

    def _place_codes(self, rows_RD: Tensor, weights_R: Tensor) -> None:
        """Place the codebook among this step's latents, and those of as many more draws as are asked for."""
        all_RD, all_R = self._latents_of_draws((rows_RD, weights_R))
        self.codebook.initialise(all_RD, all_R, step_share=len(rows_RD) / len(all_RD))

    @torch.no_grad()
    def _latents_of_draws(self, *known: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Latents and their weights: those given, and further draws up to this process's `codebook_rows`."""
        rows, weights = [rows_RD.detach() for rows_RD, _ in known], [weights_R for _, weights_R in known]
        wanted = self.config.loss.codebook_rows // world_size()
        while sum(map(len, rows)) < wanted:
            # Of later steps, so that images and clips are mixed as in the training.
            batch = self._on_device(self.draws.draw(self.step + len(rows), again=1).batch)
            with self._arithmetic():
                latents_BDthw = self.tokenizer.encode_latents(batch.pixels).float()
            more_RD, _, more_R = self._rows(latents_BDthw, _foreground(batch))
            rows.append(more_RD)
            weights.append(more_R)
        return torch.cat(rows), torch.cat(weights)

    def _on_device(self, batch: Batch) -> Batch:
        return Batch(pixels=batch.pixels.to(self.device), background=batch.background.to(self.device))

    def _arithmetic(self) -> AbstractContextManager[Any]:
        if self.config.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def _report(
        self, metrics: dict[str, Tensor], seconds: float, reporter: Reporter | None, bar: tqdm[Any]
    ) -> None:
        last = self.step == self.config.schedule.steps
        if not (last or self._due(self.config.log_every)):
            return
        values = averaged(torch.stack([value.float() for value in metrics.values()]))
        counts_K = summed(self.code_counts_K.clone())
        self.code_counts_K.zero_()
        if reporter is None:
            return
        line = {"seconds": round(seconds, 2), **dict(zip(metrics, values.tolist(), strict=True))}
        line["learning_rate"] = learning_rate(self.config.schedule, self.step - 1)
        if counts_K.any():
            use = codebook_use_of_counts(counts_K)
            line |= {"codes_used": use.used, "codebook_perplexity": use.perplexity}
        bar.set_postfix(loss=f"{line['loss']:.4f}", perplexity=f"{line.get('codebook_perplexity', 0):.0f}")
        reporter.line(self.step, line)
        if last or self._due(self.config.sample_every):
            with self.averages.applied(self.tokenizer) if self.averages is not None else nullcontext():
                reporter.pictures(self.step, self.tokenizer, self.dataset)

    def _due(self, every: int) -> bool:
        """Whether what is done each `every` steps is due after this one; 0: never."""
        return every > 0 and self.step % every == 0

    def _parts(self) -> dict[str, Any]:
        """Everything of the saved state that has a `state_dict`, by its name there."""
        parts = {
            "tokenizer": self.tokenizer,
            "optimizer": self.optimizer,
            "codebook": self.codebook,
            "averages": self.averages,
            "adversary": self.objective.adversary,
        }
        return {name: part for name, part in parts.items() if part is not None}

    def save_state(self) -> None:
        """Write everything a rerun needs, atomically, by the first process."""
        counts_K = summed(self.code_counts_K)
        if self.rank == 0:
            state = {name: part.state_dict() for name, part in self._parts().items()}
            write_state(self.folder, self.config, {**state, "step": self.step, "code_counts": counts_K})

    def load_state(self) -> None:
        """Continue from the saved state, where there is one.

        Raises `ValueError` where it belongs to a run of another configuration.
        """
        state = read_state(self.folder, self.config, self.device)
        if state is None:
            return
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        self.step = state["step"]
        if self.rank == 0:
            self.code_counts_K.copy_(state["code_counts"])


def _foreground(batch: Batch) -> Tensor:
    """Foreground of images ([B, 1, H, W]) or clips ([B, T, H, W])."""
    if batch.pixels.dim() == 4:
        return foreground_mask(batch.pixels, batch.background)
    mask_N1HW = foreground_mask(batch.pixels.flatten(0, 1), batch.background.flatten(0, 1))
    return mask_N1HW[:, 0].unflatten(0, batch.pixels.shape[:2])


def _targets(batch: Batch, foreground_BTHW: Tensor, frames: list[int]) -> tuple[Tensor, Tensor]:
    """Pixels [N, C, H, W] and foreground [N, 1, H, W] of the frames that are decoded."""
    if batch.pixels.dim() == 4:
        return batch.pixels, foreground_BTHW
    return batch.pixels[:, frames].flatten(0, 1), foreground_BTHW[:, frames].flatten(0, 1)[:, None]


def _training_mode(tokenizer: VisionTokenizer, batch_statistics: bool) -> None:
    tokenizer.train()
    if not batch_statistics:
        for module in tokenizer.modules():
            if isinstance(module, nn.BatchNorm3d):
                module.eval()


def _channels_last(tokenizer: VisionTokenizer) -> None:
    for parameter in tokenizer.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.to(memory_format=torch.channels_last)


def open_dataset(config: VisionTrainingConfig) -> VisionDataset:
    """The corpus that the configuration names: streamed from the disk, or decoded into memory."""
    data = config.data
    if data.stream:
        return open_stream(data)
    return load_manifests(
        data.manifests,
        height=data.height,
        width=data.width,
        frames=data.frames,
        splits=data.splits,
        limit=data.limit,
        progress=rank() == 0,
    )


def train(config: VisionTrainingConfig) -> VisionTokenizer:
    """Train a tokenizer in this process, or as one of torchrun's, into `config.output`.

    Rerunning a finished run loads its result; rerunning a stopped one continues it.
    """
    device = set_up_processes()
    try:
        return VisionTrainer(config, open_dataset(config), device).fit()
    finally:
        processes.leave()
