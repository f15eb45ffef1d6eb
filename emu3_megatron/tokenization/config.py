"""What a tokenization job is told."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from emu3_megatron.errors import UserError
from emu3_megatron.media import BoundedResizeRule, ClipRule, ResizeRule

PRECISIONS = ("fp32", "bf16")
"""Arithmetic of the encoder; the nearest code is looked up in fp32 either way."""

CPU_BATCH_PIXELS = 1 << 15
"""Default batch on a CPU, 8 images of 64 x 64: larger ones leave the cache and run slower (measured)."""

GPU_BATCH_PIXELS = 1 << 21
"""Default batch elsewhere, 8 images of 512 x 512."""

NOT_IN_BYTES = (
    "output",
    "worker",
    "num_workers",
    "quarantine_budget",
    "decode_threads",
    "finalize",
    "progress",
)
"""Settings that may change between runs of one job: the shards do not depend on them."""


@dataclass(frozen=True, kw_only=True)
class TokenizationConfig:
    """Settings of a job. Raises `UserError` on construction where a value is out of range."""

    manifest: tuple[Path, ...]
    """JSON Lines manifests and WebDataset ``.tar`` shards, in order."""
    output: Path
    """Folder of the dataset."""
    text_tokenizer: Path
    """File of the text tokenizer: ``*.tiktoken``, ``*.model`` or ``tokenizer.json``."""
    vision_tokenizer: Path | None = None
    """Folder of the vision tokenizer; not needed where all entries are plain text."""
    dialect: str = "emu3"
    """How spans are written: ``emu3``, ``emu3-frames`` or ``emu3.5``."""
    vocabulary: str = "auto"
    """A preset (``emu3``, ``emu3.5``, ``tiny``), or ``auto``: the preset that both tokenizers fill exactly,
    or else a vocabulary of their sizes called ``custom``."""
    name: str = ""
    """First part of the shards' file names; the output folder's name where empty."""
    split: str | None = None
    """Take only entries whose key ``split`` has this value; all entries where None."""
    num_shards: int = 1
    """Shards of the dataset: the unit of work and of resumption."""
    worker: int = 0
    """This worker's number, from 0; it makes the shards of that remainder."""
    num_workers: int = 1
    """Workers that share the job."""
    image_area: int = 512 * 512
    """Pixels of an image after resizing, about (Emu3: 512 x 512, later 720 x 720)."""
    video_area: int | None = None
    """The same for a video's frames; `image_area` where None."""
    max_aspect_ratio: float = 5.0
    """More elongated pictures are quarantined (Emu3's image processor: 5)."""
    video_frames: int = 8
    """Frames of a clip; a multiple of the vision tokenizer's temporal factor."""
    video_fps: float | None = None
    """Frames per second of a clip; the video's own frames where None."""
    video_position: str = "start"
    """Where a clip is taken from: ``start`` or ``centre``."""
    frame_source: str = "auto"
    """What decodes video: ``auto``, ``dali`` or ``pyav``."""
    media_device: str = "cpu"
    """Where video is decoded and pictures are resized: ``cpu`` or ``gpu``."""
    device: str = "cpu"
    """Where the vision tokenizer runs, as torch names it."""
    precision: str = "fp32"
    """Arithmetic of the encoder: ``fp32`` or ``bf16``."""
    encode_pixels: int | None = None
    """Pixels (times frames) in one batch of the encoder; where None, `CPU_BATCH_PIXELS` or `GPU_BATCH_PIXELS`
    by `device`."""
    quarantine_budget: float = 0.05
    """Share of entries that may be quarantined before the job fails."""
    decode_threads: int = 1
    """Threads that decode ahead while the encoder runs."""
    finalize: bool = False
    """Only write the manifest; all shards must be there."""
    progress: bool = True
    """Show a progress bar on stderr."""

    def __post_init__(self) -> None:
        """Check the values."""
        if not self.manifest:
            raise UserError("manifest: give at least one .jsonl or .tar file")
        for field in ("num_shards", "num_workers", "decode_threads", "batch_pixels"):
            if getattr(self, field) < 1:
                raise UserError(f"{field}={getattr(self, field)} must be at least 1")
        if not 0 <= self.worker < self.num_workers:
            raise UserError(f"worker={self.worker} must lie in 0..{self.num_workers - 1} (num_workers - 1)")
        if not 0 <= self.quarantine_budget <= 1:
            raise UserError(f"quarantine_budget={self.quarantine_budget} must be a share, from 0 to 1")
        if self.precision not in PRECISIONS:
            raise UserError(f"precision={self.precision!r} is not one of {', '.join(PRECISIONS)}")
        self.clip_rule()
        for kind in ("image", "video"):
            self.resize_rule(kind, 1)

    @property
    def dataset_name(self) -> str:
        """First part of the shards' file names."""
        return self.name or self.output.resolve().name

    @property
    def batch_pixels(self) -> int:
        """Pixels (times frames) in one batch of the encoder."""
        if self.encode_pixels is not None:
            return self.encode_pixels
        return CPU_BATCH_PIXELS if self.device == "cpu" else GPU_BATCH_PIXELS

    @property
    def device_index(self) -> int | None:
        """Which GPU decodes and resizes where `media_device` is ``gpu``: that of `device`, the first for a
        `device` without a number; None for ``cpu``. Threads do not inherit a current device."""
        if self.media_device != "gpu":
            return None
        kind, _, number = self.device.partition(":")
        return int(number) if kind == "cuda" and number.isdecimal() else 0

    def clip_rule(self) -> ClipRule:
        """Which frames make a clip."""
        return ClipRule(frames=self.video_frames, fps=self.video_fps, position=self.video_position)

    def resize_rule(self, kind: str, spatial_factor: int) -> ResizeRule | BoundedResizeRule:
        """Size of an ``image`` or of a ``video``'s frames."""
        area = self.video_area if kind == "video" and self.video_area is not None else self.image_area
        return ResizeRule(area=area, spatial_factor=spatial_factor, max_aspect_ratio=self.max_aspect_ratio)

    def identity(self) -> dict[str, Any]:
        """The settings that decide the bytes of the shards, but for the files, which the job adds."""
        files = ("manifest", "text_tokenizer", "vision_tokenizer", "name")
        fields = {key: value for key, value in asdict(self).items() if key not in NOT_IN_BYTES + files}
        # Workers of one job encode on several devices of one kind.
        device = self.device.partition(":")[0]
        return {**fields, "device": device, "name": self.dataset_name, "encode_pixels": self.batch_pixels}
