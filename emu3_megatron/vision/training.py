"""Training of the vision tokenizer, in one process or by torchrun: gradients are averaged over the processes.

Shapes: B batch, T frames, t latent frames, N frames of a batch, C channels, D length of a codebook vector,
R rows of latents.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from emu3_megatron.files import atomic_write
from emu3_megatron.vision.codebook import EmaCodebook, world_size
from emu3_megatron.vision.corpus import Batch, VisionDataset, draw_batch, load_manifests
from emu3_megatron.vision.initialization import initialise
from emu3_megatron.vision.losses import (
    commitment_loss,
    foreground_mask,
    pixel_weights,
    reconstruction_loss,
    straight_through,
)
from emu3_megatron.vision.metrics import codebook_use, psnr
from emu3_megatron.vision.model import VisionTokenizer
from emu3_megatron.vision.training_config import VisionTrainingConfig, learning_rate

STATE_FILE = "training_state.pt"
METRICS_FILE = "metrics.jsonl"


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
        self.rank = dist.get_rank() if world_size() > 1 else 0
        config.check(world_size())
        if dataset.num_images + dataset.num_clips == 0:
            raise ValueError("the dataset has neither images nor clips: nothing to train on")
        torch.manual_seed(config.seed)
        self.tokenizer = VisionTokenizer(config.model)
        initialise(self.tokenizer)
        self.tokenizer.to(self.device)
        if config.channels_last:
            _channels_last(self.tokenizer)
        self.codebook = EmaCodebook(
            self.tokenizer.codebook.data, decay=config.loss.codebook_decay, seed=config.seed
        )
        self.tokenizer.codebook.requires_grad_(False)
        self.parameters = [p for p in self.tokenizer.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=config.schedule.learning_rate,
            betas=(0.9, 0.99),
            weight_decay=0.0,
            foreach=True,
        )
        self.step = 0
        self.recent_codes: list[Tensor] = []
        self.writer: Any = None

    @property
    def folder(self) -> Path:
        """Where results go."""
        return Path(self.config.output)

    def fit(self) -> VisionTokenizer:
        """Train to the last step, from the saved state if there is one; save and return the tokenizer."""
        steps = self.config.schedule.steps
        self.load_state()
        self._open_tensorboard()
        began = time.perf_counter()
        with tqdm(
            total=steps, initial=self.step, desc="vision tokenizer", disable=None if self.rank == 0 else True
        ) as bar:
            while self.step < steps:
                metrics = self.train_step()
                self.step += 1
                bar.update()
                self._report(metrics, time.perf_counter() - began, bar)
                every = self.config.checkpoint_every
                if every and (self.step % every == 0 or self.step == steps):
                    self.save_state()
        if self.codebook.initialised:
            self.codebook.compact()
        self.tokenizer.eval().requires_grad_(True)
        if self.rank == 0:
            self.tokenizer.save_pretrained(self.folder)
        if self.writer is not None:
            self.writer.close()
        return self.tokenizer

    def train_step(self) -> dict[str, Tensor]:
        """One optimizer step; gives the loss and its parts, of this process, as scalars on the device."""
        schedule, loss_config = self.config.schedule, self.config.loss
        _training_mode(self.tokenizer, self.config.batch_statistics)
        generator = torch.Generator().manual_seed(_step_seed(self.config.seed, self.step, self.rank))
        clips = self._is_clip_step()
        batch = self._draw(clips, generator)
        foreground_BTHW = _foreground(batch)
        latents_BDthw = self.tokenizer.encode_latents(batch.pixels).float()
        quantized_BDthw, commitment = self._quantize(latents_BDthw, foreground_BTHW)
        frames = self._decoded_frames(batch, generator)
        target_NCHW, foreground_N1HW = _targets(batch, foreground_BTHW, frames)
        reconstruction_NCHW = self.tokenizer.decode_latents(quantized_BDthw, frames=frames).flatten(0, 1)
        weights = pixel_weights(
            target_NCHW,
            foreground_N1HW,
            foreground_weight=loss_config.foreground_weight,
            edge_weight=loss_config.edge_weight,
        )
        error = reconstruction_loss(
            reconstruction_NCHW, target_NCHW, weights, l1_weight=loss_config.l1_weight
        )
        loss = error + loss_config.commitment_weight * commitment
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self._average_gradients()
        norm = nn.utils.clip_grad_norm_(self.parameters, schedule.clip_gradient)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(schedule, self.step)
        self.optimizer.step()
        parts = {"loss": loss, "reconstruction": error, "commitment": commitment, "gradient_norm": norm}
        return {name: value.detach() for name, value in parts.items()}

    def _quantize(self, latents_BDthw: Tensor, foreground_BTHW: Tensor) -> tuple[Tensor, Tensor]:
        loss_config = self.config.loss
        if self.step < loss_config.continuous_steps:
            return latents_BDthw, latents_BDthw.new_zeros(())
        rows_RD = latents_BDthw.movedim(1, -1).flatten(0, -2)
        plain_R = 1 - self._of_patches(foreground_BTHW).flatten()
        weights_R = 1 - (1 - loss_config.plain_share) * plain_R
        if not self.codebook.initialised:
            self.codebook.initialise(rows_RD, weights_R)
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
        self.recent_codes.append(codes_R)
        commitment = commitment_loss(rows_RD, quantized_RD, 1 + (loss_config.plain_commitment - 1) * plain_R)
        return straight_through(latents_BDthw, quantized_BDthw), commitment

    def _of_patches(self, mask_BTHW: Tensor) -> Tensor:
        """Whether any pixel of the patch behind each code is set; float [B, t, h, w]."""
        side = self.tokenizer.spatial_factor
        frames = self.tokenizer.temporal_factor if mask_BTHW.shape[1] > 1 else 1
        kernel = (frames, side, side)
        return nn.functional.max_pool3d(mask_BTHW[:, None], kernel, kernel)[:, 0]

    def _is_clip_step(self) -> bool:
        every = self.config.schedule.clip_every
        if self.dataset.num_images == 0:
            return True
        return bool(every and self.dataset.num_clips and self.step % every == every - 1)

    def _draw(self, clips: bool, generator: torch.Generator) -> Batch:
        schedule = self.config.schedule
        whole = schedule.crop is None or self.step >= schedule.whole_from * schedule.steps
        size = (
            schedule.clip_batch_size if clips else schedule.whole_batch_size if whole else schedule.batch_size
        )
        batch = draw_batch(
            self.dataset,
            clips=clips,
            size=max(1, size // world_size()),
            crop=None if whole else schedule.crop,
            multiple=self.tokenizer.spatial_factor,
            generator=generator,
        )
        return Batch(pixels=batch.pixels.to(self.device), background=batch.background.to(self.device))

    def _decoded_frames(self, batch: Batch, generator: torch.Generator) -> list[int]:
        if batch.pixels.dim() == 4:
            return [0]
        frames = batch.pixels.shape[1]
        count = min(frames, self.config.schedule.decoded_frames)
        return sorted(torch.randperm(frames, generator=generator)[:count].tolist())

    def _average_gradients(self) -> None:
        if world_size() == 1:
            return
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.parameters]
        flat = torch.cat([g.reshape(-1) for g in gradients])
        dist.all_reduce(flat)
        flat /= world_size()
        for parameter, part in zip(self.parameters, flat.split([g.numel() for g in gradients]), strict=True):
            parameter.grad = part.view(parameter.shape)

    def _report(self, metrics: dict[str, Tensor], seconds: float, bar: tqdm[Any]) -> None:
        last = self.step == self.config.schedule.steps
        if self.rank != 0 or not (self.step % self.config.log_every == 0 or last):
            return
        line: dict[str, float] = {"step": self.step, "seconds": round(seconds, 2)}
        line.update({name: float(value) for name, value in metrics.items()})
        line["learning_rate"] = learning_rate(self.config.schedule, self.step - 1)
        if self.recent_codes:
            use = codebook_use(torch.cat(self.recent_codes), self.config.model.codebook_size)
            line.update({"codes_used": use.used, "codebook_perplexity": use.perplexity})
            self.recent_codes.clear()
        bar.set_postfix(loss=f"{line['loss']:.4f}", perplexity=f"{line.get('codebook_perplexity', 0):.0f}")
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / METRICS_FILE, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")
        if self.writer is not None:
            for name, value in line.items():
                self.writer.add_scalar(name, value, self.step)
            if self.step % self.config.sample_every == 0 or last:
                self._write_samples()

    def _open_tensorboard(self) -> None:
        if self.rank == 0 and self.config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(self.folder))

    @torch.no_grad()
    def _write_samples(self, count: int = 8) -> None:
        """Originals above reconstructions: the first images, and the first frames of the first clips."""
        self.tokenizer.eval()
        first = torch.arange(count)
        if self.dataset.num_images:
            pixels = self.dataset.images(first % self.dataset.num_images).to(self.device) / 127.5 - 1
            decoded = self.tokenizer.decode(self.tokenizer.encode(pixels))
            self.writer.add_scalar("psnr", psnr(decoded, pixels), self.step)
            self.writer.add_image("images", _sheet(pixels, decoded), self.step)
        if self.dataset.num_clips:
            pixels = self.dataset.clips(first[:1]).to(self.device) / 127.5 - 1
            decoded = self.tokenizer.decode(self.tokenizer.encode(pixels))
            self.writer.add_image("clip", _sheet(pixels[0], decoded[0]), self.step)

    def save_state(self) -> None:
        """Write everything a rerun needs, atomically, by the first process."""
        if self.rank != 0:
            return
        state = {
            "config": asdict(self.config),
            "step": self.step,
            "tokenizer": self.tokenizer.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "codebook": self.codebook.state_dict(),
        }
        with atomic_write(self.folder / STATE_FILE) as stream:
            torch.save(state, stream)

    def load_state(self) -> None:
        """Continue from the saved state, where there is one.

        Raises `ValueError` where it belongs to a run of another configuration.
        """
        path = self.folder / STATE_FILE
        if not path.is_file():
            return
        state = torch.load(path, map_location=self.device, weights_only=True)
        ours = asdict(self.config)
        changed = [
            key for key in ours if key not in _FREE_TO_CHANGE and state["config"].get(key) != ours[key]
        ]
        if changed:
            raise ValueError(
                f"{path} was saved with another {', '.join(changed)}: use the same configuration, another "
                "output, or delete the file"
            )
        self.tokenizer.load_state_dict(state["tokenizer"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.codebook.load_state_dict(state["codebook"])
        self.step = state["step"]


_FREE_TO_CHANGE = ("output", "checkpoint_every", "log_every", "tensorboard", "sample_every")


def _step_seed(seed: int, step: int, rank: int) -> int:
    return (seed * 1_000_003 + step) * 1_009 + rank


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


def _sheet(originals_NCHW: Tensor, decoded_NCHW: Tensor) -> Tensor:
    rows = [torch.cat(list(part), 2) for part in (originals_NCHW, decoded_NCHW.clamp(-1, 1))]
    return (torch.cat(rows, 1) + 1) / 2


def set_up_processes() -> torch.device:
    """Join torchrun's process group where there is one; give the device of this process."""
    cuda = torch.cuda.is_available()
    if "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("nccl" if cuda else "gloo")
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def train(config: VisionTrainingConfig) -> VisionTokenizer:
    """Train a tokenizer on manifests, in this process or as one of torchrun's, into `config.output`.

    Rerunning a finished run loads its result; rerunning a stopped one continues it.
    """
    device = set_up_processes()
    try:
        data = config.data
        dataset = load_manifests(
            data.manifests,
            height=data.height,
            width=data.width,
            frames=data.frames,
            splits=data.splits,
            limit=data.limit,
            progress=not dist.is_initialized() or dist.get_rank() == 0,
        )
        return VisionTrainer(config, dataset, device).fit()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
