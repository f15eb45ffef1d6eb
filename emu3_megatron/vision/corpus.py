"""Training data of the vision tokenizer: small corpora held in memory as bytes, and batches drawn from them.

Corpora that do not fit into memory are drawn from the disk by `emu3_megatron.vision.streaming`.

Shapes: M items of the corpus, B batch, T frames of a clip, N frames, H W height and width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import av
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from emu3_megatron.files import json_lines


class VisionDataset(Protocol):
    """What the trainer asks of its data: random access to images and clips of one size."""

    num_images: int
    """Number of still images; may be 0."""
    num_clips: int
    """Number of clips; may be 0."""

    def images(self, indices: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] of int64 indices [B]."""

    def clips(self, indices: Tensor) -> Tensor:
        """uint8 [B, T, 3, H, W] of int64 indices [B]."""


class InMemoryDataset:
    """Images uint8 [M, 3, H, W] and clips uint8 [M, T, 3, H, W], either of them possibly empty."""

    def __init__(self, images: Tensor, clips: Tensor) -> None:
        for name, stack, dims in (("images", images, 4), ("clips", clips, 5)):
            if stack.dtype != torch.uint8 or stack.dim() != dims:
                raise ValueError(
                    f"{name} are {stack.dtype} {list(stack.shape)}: give uint8 in {dims} dimensions"
                )
        self._images, self._clips = images, clips
        self.num_images, self.num_clips = len(images), len(clips)

    def images(self, indices: Tensor) -> Tensor:
        """uint8 [B, 3, H, W]."""
        return self._images[indices]

    def clips(self, indices: Tensor) -> Tensor:
        """uint8 [B, T, 3, H, W]."""
        return self._clips[indices]


def load_manifests(
    manifests: Sequence[str | Path],
    *,
    height: int,
    width: int,
    frames: int,
    splits: Sequence[str] = (),
    limit: int | None = None,
    progress: bool = True,
) -> InMemoryDataset:
    """Decode the media of manifests (JSON Lines; ``image`` or ``video`` relative to the file) into memory.

    Pictures of another size are scaled to cover height x width and cut in the middle. Of a video, the first
    `frames` frames are taken; shorter videos and documents without media are passed over.

    Args:
        manifests: the files; one object per line.
        height: in pixels.
        width: in pixels.
        frames: of a clip; 0 leaves videos out.
        splits: keep rows whose ``split`` is one of these; empty keeps all. Rows without one are "train".
        limit: at most this many images, and as many clips.
        progress: show a bar where stderr is a terminal.

    Raises:
        ValueError: for a line that is not JSON, a file that cannot be decoded, or nothing to train on.
    """
    media = [entry for path in manifests for entry in manifest_media(Path(path), splits)]
    images: list[np.ndarray] = []
    clips: list[np.ndarray] = []
    for kind, path in tqdm(media, desc="decode media", unit="file", disable=None if progress else True):
        if kind == "image" and (limit is None or len(images) < limit):
            images.append(_read_image(path, height, width))
        elif kind == "video" and frames and (limit is None or len(clips) < limit):
            clip = _read_video(path, height, width, frames)
            if clip is not None:
                clips.append(clip)
    if not images and not clips:
        names = ", ".join(str(path) for path in manifests) or "no manifest"
        raise ValueError(f"{names}: no image or video in splits {list(splits) or 'of any name'}; name others")
    return InMemoryDataset(_stacked(images, (3, height, width)), _stacked(clips, (frames, 3, height, width)))


def manifest_media(path: Path, splits: Sequence[str]) -> Iterator[tuple[str, Path]]:
    """Kind ("image" or "video") and file of every row of a manifest that has one, read line by line.

    Raises `ValueError` for a line that is not a JSON object, or whose medium is no path.
    """
    for row in json_lines(path):
        kind = next((kind for kind in ("image", "video") if row.get(kind) is not None), None)
        if kind and (not splits or row.get("split", "train") in splits):
            name = row[kind]
            if not isinstance(name, str) or not name.strip():
                raise ValueError(
                    f"{path}: an entry (id {row.get('id')!r}) has a {kind!r} that is {name!r}; it must be "
                    "the path of a file: correct it, or leave the key out"
                )
            yield kind, path.parent / name


def _stacked(arrays: list[np.ndarray], shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(np.stack(arrays)) if arrays else torch.empty((0, *shape), dtype=torch.uint8)


def _read_image(path: Path, height: int, width: int) -> np.ndarray:
    try:
        with Image.open(path) as image:
            return fitted(image.convert("RGB"), height, width)
    except MemoryError:
        raise
    except Exception as error:  # decoders raise many types; the file is to blame for each
        raise ValueError(
            f"{path}: cannot be decoded as an image ({str(error) or type(error).__name__}); "
            "remove it from the manifest"
        ) from error


def _read_video(path: Path, height: int, width: int, frames: int) -> np.ndarray | None:
    found: list[np.ndarray] = []
    try:
        with av.open(str(path)) as container:
            for frame in container.decode(video=0):
                found.append(fitted(frame.to_image(), height, width))
                if len(found) == frames:
                    return np.stack(found)
    except MemoryError:
        raise
    except Exception as error:  # as in `_read_image`
        raise ValueError(
            f"{path}: cannot be decoded as a video ({str(error) or type(error).__name__}); "
            "remove it from the manifest"
        ) from error
    return None


def fitted(image: Image.Image, height: int, width: int) -> np.ndarray:
    """RGB bytes [3, height, width]: `image` scaled to cover the size, then cut in the middle."""
    scale = max(height / image.height, width / image.width)
    if scale != 1:
        size = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
        image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    cut = image.crop((left, top, left + width, top + height))
    return np.ascontiguousarray(np.asarray(cut).transpose(2, 0, 1))


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Pixels to learn from, and the commonest colour of every frame."""

    pixels: Tensor
    """float32 in [-1, 1]; images [B, 3, H, W] or clips [B, T, 3, H, W]."""
    background: Tensor
    """float32 in [-1, 1]; [B, 3] or [B, T, 3]."""


def draw_batch(
    dataset: VisionDataset,
    *,
    clips: bool,
    size: int,
    crop: int | None,
    multiple: int,
    generator: torch.Generator,
) -> Batch:
    """Draw `size` images or clips at random, each cut to a square of `crop` pixels (None: whole).

    A crop is placed so that it meets what differs from the picture's background, at offsets that are
    multiples of `multiple` (the spatial factor: patches keep their phase).
    """
    count = dataset.num_clips if clips else dataset.num_images
    indices_B = torch.randint(count, (size,), generator=generator)
    pixels_BTCHW = dataset.clips(indices_B) if clips else dataset.images(indices_B)[:, None]
    frames = pixels_BTCHW.shape[1]
    background_NC = background_colours(pixels_BTCHW.flatten(0, 1))
    if crop is not None and crop < min(pixels_BTCHW.shape[-2:]):
        pixels_BTCHW = _crop(pixels_BTCHW, background_NC, crop, multiple, generator)
    pixels = pixels_BTCHW.float().div_(127.5).sub_(1)
    background_BTC = (background_NC / 127.5 - 1).unflatten(0, (-1, frames))
    if clips:
        return Batch(pixels=pixels, background=background_BTC)
    return Batch(pixels=pixels[:, 0], background=background_BTC[:, 0])


def background_colours(frames_NCHW: Tensor) -> Tensor:
    """Commonest colour of each uint8 RGB frame, float32 [N, 3] in 0..255: the mean of the fullest bin."""
    places = torch.tensor([256, 16, 1])[:, None]
    bins_NS = ((frames_NCHW.flatten(2).to(torch.int64) >> 4) * places).sum(1)
    counts = torch.zeros(len(bins_NS), 4096).scatter_add_(1, bins_NS, torch.ones(bins_NS.shape))
    inside_N1S = (bins_NS == counts.argmax(1, keepdim=True)).float()[:, None]
    return (frames_NCHW.flatten(2).float() * inside_N1S).sum(2) / inside_N1S.sum(2)


def _crop(
    pixels_BTCHW: Tensor, background_NC: Tensor, crop: int, multiple: int, generator: torch.Generator
) -> Tensor:
    batch, frames = pixels_BTCHW.shape[:2]
    background = background_NC.unflatten(0, (batch, frames))[..., None, None]
    different_BHW = (pixels_BTCHW.float() - background).abs().amax((1, 2)) > 20
    cut = []
    for item_TCHW, different_HW in zip(pixels_BTCHW, different_BHW, strict=True):
        top = _offset(different_HW.any(1), crop, multiple, generator)
        left = _offset(different_HW.any(0), crop, multiple, generator)
        cut.append(item_TCHW[..., top : top + crop, left : left + crop])
    return torch.stack(cut)


def _offset(occupied_L: Tensor, crop: int, multiple: int, generator: torch.Generator) -> int:
    """Where to begin a crop along one side, so that it meets an occupied place chosen at random."""
    places = occupied_L.nonzero()[:, 0]
    length = len(occupied_L)
    place = int(places[torch.randint(len(places), (), generator=generator)]) if len(places) else length // 2
    wish = place - int(torch.randint(crop // 4, crop - crop // 4, (), generator=generator))
    return min(max(wish, 0), length - crop) // multiple * multiple
