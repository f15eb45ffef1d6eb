"""Evaluating a vision tokenizer on a folder of images and videos."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

from emu3_megatron.errors import UserError, one_line
from emu3_megatron.files import atomic_write, write_json_atomic
from emu3_megatron.media import Preprocessor, frame_source, list_media, load_clip, load_stills, write_png
from emu3_megatron.vision import VisionTokenizer
from emu3_megatron.vision.evaluation import FeatureNetwork, Sample, Scores, as_json, evaluate, table
from emu3_megatron.vision.metrics import SSIM_WINDOW
from emu3_megatron.vision.perceptual import LEAST_SIDE, PerceptualDistance
from emu3_megatron.vision.sheet import draw_sheet

IMAGES_AT_ONCE = 16
"""Images decoded in one go."""

TABLE_FILE = "table.md"
SCORES_FILE = "scores.json"


@dataclass(kw_only=True)
class EvaluationConfig:
    """What to evaluate, on what, and how."""

    tokenizer: str
    """Folder of the vision tokenizer, in either public layout."""
    data: str
    """Folder of images and videos; those in folders below count too."""
    output: str
    """Folder of the results: the table, the scores as JSON, and a picture sheet for each kind and size."""
    sizes: list[int] = field(default_factory=lambda: [256])
    """Sides of squares in pixels: pictures are scaled to cover the square and cut in the middle."""
    frames: int = 8
    """Frames of a clip; 0 leaves videos out."""
    fps: float | None = 12.0
    """Frames per second of a clip; None takes the video's own."""
    limit: int | None = None
    """At most this many images, and as many videos, in the order of their names."""
    lpips: Literal["alex", "vgg", "none"] = "alex"
    """Backbone of LPIPS (published figures: alex); none leaves LPIPS out."""
    lpips_weights: str | None = None
    """File of the backbone's weights, as torchvision publishes it; downloaded where not given."""
    features: str | None = None
    """TorchScript file of rFID's feature network, uint8 [N, 3, H, W] to [N, F]; no rFID without it."""
    sheet_rows: int = 8
    """Samples on each picture sheet; 0 draws none."""
    batch_pixels: int = 1 << 20
    """Pixels times frames of a batch."""
    device: str = "cpu"
    """Where everything runs: cpu, cuda, cuda:1..."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the tokenizer's 2D networks."""

    def check(self, tokenizer: VisionTokenizer) -> None:
        """Raise `UserError` where a value does not fit the tokenizer or a metric."""
        least = max(SSIM_WINDOW, LEAST_SIDE if self.lpips != "none" else 0)
        for size in self.sizes:
            if size % tokenizer.spatial_factor or size < least:
                raise UserError(
                    f"sizes has {size}: each must be a multiple of {tokenizer.spatial_factor}, pixels to a "
                    f"code, and at least {least} for the metrics"
                )
        if not self.sizes:
            raise UserError("sizes is empty: give at least one, such as [256]")
        if self.frames % tokenizer.temporal_factor:
            raise UserError(
                f"frames is {self.frames}: it must be a multiple of {tokenizer.temporal_factor}, frames to a "
                "code; 0 leaves videos out"
            )
        if self.limit is not None and self.limit < 1:
            raise UserError(f"limit is {self.limit}: it must be at least 1; leave it out to take all")


def evaluate_folder(config: EvaluationConfig) -> list[Scores]:
    """Score a tokenizer at every size, and write table, scores and sheets to `config.output`.

    Returns:
        One row for the images and one for the clips of each size.

    Raises:
        UserError: a value, file or folder that does not fit.
        MediaError: an image or video that cannot be used; the message names it.
    """
    tokenizer = VisionTokenizer.from_pretrained(config.tokenizer)
    config.check(tokenizer)
    media = list_media(config.data)
    images = media.images[: config.limit]
    videos = media.videos[: config.limit] if config.frames else ()
    if not images and not videos:
        raise UserError(f"{config.data} holds videos only, and frames is 0: give the frames of a clip")
    device = _device(config.device)
    perceptual = None
    if config.lpips != "none":
        perceptual = PerceptualDistance(config.lpips, config.lpips_weights, key="lpips_weights").to(device)
    features = FeatureNetwork(config.features, device) if config.features else None
    tokenizer.to(device).for_inference(dtype=torch.bfloat16 if config.precision == "bf16" else torch.float32)
    output, rows = Path(config.output), []
    for size in config.sizes:
        for kind, samples in (
            ("images", _images(images, size)),
            ("clips", _clips(videos, size, config)),
        ):
            if not (images if kind == "images" else videos):
                continue
            scores, kept = evaluate(
                tokenizer,
                samples,
                perceptual=perceptual,
                features=features,
                keep=config.sheet_rows,
                batch_pixels=config.batch_pixels,
            )
            rows.append(scores)
            if kept:
                write_png(output / f"{kind}-{size}.png", draw_sheet(kept))
    with atomic_write(output / TABLE_FILE) as stream:
        stream.write(table(rows).encode())
    write_json_atomic(output / SCORES_FILE, as_json(rows))
    return rows


def _images(paths: Sequence[Path], size: int) -> Iterator[Sample]:
    preprocessor = Preprocessor(batch_size=IMAGES_AT_ONCE)
    with tqdm(total=len(paths), desc=f"images at {size}", disable=None) as bar:
        for first in range(0, len(paths), IMAGES_AT_ONCE):
            part = paths[first : first + IMAGES_AT_ONCE]
            stills = load_stills(part, (size, size), preprocessor=preprocessor)
            for path, pixels in zip(part, stills, strict=True):
                yield Sample(name=path.name, pixels=pixels)
                bar.update()


def _clips(paths: Sequence[Path], size: int, config: EvaluationConfig) -> Iterator[Sample]:
    preprocessor, source = Preprocessor(batch_size=1), frame_source()
    for path in tqdm(paths, desc=f"clips at {size}", disable=None):
        clip = load_clip(
            path, config.frames, (size, size), fps=config.fps, source=source, preprocessor=preprocessor
        )
        yield Sample(name=path.name, pixels=clip)


def _device(name: str) -> torch.device:
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = one_line(error).partition(". ")[0]
        raise UserError(f"device is {name!r}: it cannot be used ({reason}); choose cpu") from error
