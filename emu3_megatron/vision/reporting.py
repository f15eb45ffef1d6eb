"""What a vision training tells of itself: a line of metrics now and then, TensorBoard with pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emu3_megatron.files import atomic_write
from emu3_megatron.vision.corpus import VisionDataset
from emu3_megatron.vision.metrics import psnr
from emu3_megatron.vision.model import VisionTokenizer

METRICS_FILE = "metrics.jsonl"

PICTURES = 8
"""Images shown in TensorBoard."""


class Reporter:
    """Writes the metrics of the first process.

    Args:
        folder: of the run.
        tensorboard: whether to write TensorBoard events, too.
        step: where the run goes on; what a killed process wrote of later steps is dropped: they come again.
    """

    def __init__(self, folder: Path, tensorboard: bool, step: int) -> None:
        self.path = folder / METRICS_FILE
        self._writer: Any = None
        folder.mkdir(parents=True, exist_ok=True)
        if self.path.is_file():
            kept = [line for line in self.path.read_text().splitlines() if _step_of(line) <= step]
            with atomic_write(self.path) as stream:
                stream.write("".join(line + "\n" for line in kept).encode())
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder), purge_step=step + 1)

    def line(self, step: int, values: dict[str, float]) -> None:
        """Write one line of metrics."""
        with open(self.path, "a", encoding="utf-8") as stream:
            stream.write(json.dumps({"step": step, **values}) + "\n")
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    @torch.no_grad()
    def pictures(self, step: int, tokenizer: VisionTokenizer, dataset: VisionDataset) -> None:
        """Originals above reconstructions: the first images, and the first frames of the first clip."""
        if self._writer is None:
            return
        tokenizer.eval()
        first = torch.arange(PICTURES)
        if dataset.num_images:
            pixels = dataset.images(first % dataset.num_images).to(tokenizer.device) / 127.5 - 1
            decoded = tokenizer.decode(tokenizer.encode(pixels))
            self._writer.add_scalar("psnr", psnr(decoded, pixels), step)
            self._writer.add_image("images", _sheet(pixels, decoded), step)
        if dataset.num_clips:
            pixels = dataset.clips(first[:1]).to(tokenizer.device) / 127.5 - 1
            decoded = tokenizer.decode(tokenizer.encode(pixels))
            self._writer.add_image("clip", _sheet(pixels[0], decoded[0]), step)

    def close(self) -> None:
        """Flush the events."""
        if self._writer is not None:
            self._writer.close()


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # cut off by the kill
        return float("inf")


def _sheet(originals_NCHW: Tensor, decoded_NCHW: Tensor) -> Tensor:
    rows = [torch.cat(list(part), 2) for part in (originals_NCHW, decoded_NCHW.clamp(-1, 1))]
    return (torch.cat(rows, 1) + 1) / 2
