"""Training data of any size: pictures and clips are decoded when they are drawn, and cut at random.

Shapes: B batch, T frames of a clip, H W height and width.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from emu3_megatron.vision.corpus import Batch, background_colours, fitted, manifest_media
from emu3_megatron.vision.training_config import DataConfig

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm")
"""Files of a folder that are taken as images."""

VIDEO_SUFFIXES = (".mp4", ".mkv", ".mov", ".webm", ".avi", ".m4v")
"""Files of a folder that are taken as videos."""

BAD_IN_A_ROW = 50
"""Draws in a row that may fail before the corpus is taken to be broken."""


class PackedPaths(Sequence[str]):
    """Many paths in two arrays: a hundredth of the objects, and shared with worker processes as they are."""

    def __init__(self, paths: Iterable[str]) -> None:
        encoded = [os.fsencode(path) for path in paths]
        lengths = np.fromiter((len(path) for path in encoded), np.int64, len(encoded))
        self._ends = np.cumsum(lengths)
        self._bytes = np.frombuffer(b"".join([*encoded, b"\0"]), np.uint8)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:  # type: ignore[override]
        if not 0 <= index < len(self):
            raise IndexError(f"path {index} of {len(self)}")
        begin = int(self._ends[index - 1]) if index else 0
        return os.fsdecode(self._bytes[begin : int(self._ends[index])].tobytes())


@dataclass(frozen=True)
class _Window:
    """Where a picture is cut, in its own pixels, and whether it is mirrored."""

    box: tuple[float, float, float, float]
    size: tuple[int, int]
    flip: bool

    def cut(self, image: Image.Image) -> np.ndarray:
        """RGB bytes [3, height, width]."""
        width, height = self.size
        left, top, right, bottom = self.box
        if (right - left, bottom - top) == (width, height):
            image = image.crop((int(left), int(top), int(right), int(bottom)))
        else:
            image = image.resize(self.size, Image.Resampling.BICUBIC, box=self.box)
        if self.flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


class StreamedDataset:
    """Images and videos of mixed sizes, known by their paths.

    A file that cannot be decoded is passed over with a warning, and another is drawn in its place; so is a
    video that is too short, or changes its size within a clip.

    Args:
        images: paths of images.
        videos: paths of videos.
        config: size of pictures, clips and cuts.
    """

    def __init__(self, images: Sequence[str], videos: Sequence[str], config: DataConfig) -> None:
        self._images, self._videos, self._config = PackedPaths(images), PackedPaths(videos), config
        self.num_images, self.num_clips = len(self._images), len(self._videos)
        self._complained: set[str] = set()
        self._kept: dict[str, Image.Image] = {}
        self._room = config.cache_mib << 20

    def images(self, indices: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] of int64 indices [B], the middle of each picture: for looking at."""
        return self._look(self._images, indices, _open_image)

    def clips(self, indices: Tensor) -> Tensor:
        """uint8 [B, T, 3, H, W] of int64 indices [B], the middle of the first frames: for looking at."""
        return self._look(self._videos, indices, lambda path: _read_frames(path, self._config, None))

    def draw(self, *, clips: bool, size: int, crop: int | None, generator: torch.Generator) -> Batch:
        """Draw `size` images or clips, each cut at random to a square of `crop` pixels (None: H x W).

        Raises:
            ValueError: a file is missing, or too many in a row cannot be decoded.
        """
        shape = (self._config.height, self._config.width) if crop is None else (crop, crop)
        drawn = np.stack([self._draw_one(clips, shape, generator) for _ in range(size)])
        pixels_BTCHW = torch.from_numpy(drawn)
        frames = pixels_BTCHW.shape[1]
        background_BTC = (background_colours(pixels_BTCHW.flatten(0, 1)) / 127.5 - 1).unflatten(
            0, (-1, frames)
        )
        pixels = pixels_BTCHW.float().div_(127.5).sub_(1)
        if clips:
            return Batch(pixels=pixels, background=background_BTC)
        return Batch(pixels=pixels[:, 0], background=background_BTC[:, 0])

    def _draw_one(self, clip: bool, shape: tuple[int, int], generator: torch.Generator) -> np.ndarray:
        """Bytes [T, 3, height, width]."""
        paths = self._videos if clip else self._images
        for _ in range(BAD_IN_A_ROW):
            path = paths[int(torch.randint(len(paths), (), generator=generator))]
            try:
                frames = _read_frames(path, self._config, generator) if clip else [self._image(path)]
                window = _window(frames[0].size, shape, self._config, generator)
                return np.stack([window.cut(frame) for frame in frames])
            except FileNotFoundError as error:
                raise ValueError(f"{path}: no such file; correct the manifest") from error
            except MemoryError:
                raise
            except Exception as error:  # decoders raise many types; the file is to blame for each
                self._complain(path, error)
        raise ValueError(
            f"{BAD_IN_A_ROW} files drawn in a row cannot be used, the last is {path}; see the warnings above"
        )

    def _look(
        self, paths: PackedPaths, indices: Tensor, read: Callable[[str], Image.Image | list[Image.Image]]
    ) -> Tensor:
        """The middle of what `read` gives for every index; of the next one where a file is damaged."""
        height, width = self._config.height, self._config.width
        found: list[np.ndarray] = []
        for index in indices.tolist():
            for path in (paths[(index + more) % len(paths)] for more in range(BAD_IN_A_ROW)):
                try:
                    seen = read(path)
                    frames = seen if isinstance(seen, list) else [seen]
                    fit = np.stack([fitted(frame, height, width) for frame in frames])
                except MemoryError:
                    raise
                except Exception as error:  # as in `_draw_one`
                    self._complain(path, error)
                    continue
                found.append(fit if isinstance(seen, list) else fit[0])
                break
            else:
                raise ValueError(f"{BAD_IN_A_ROW} files in a row cannot be used, the last is {path}")
        return torch.from_numpy(np.stack(found))

    def _image(self, path: str) -> Image.Image:
        """Decode, or take from the cache: which is never emptied, since every image is as likely to come."""
        image = self._kept.get(path)
        if image is None:
            image = _open_image(path)
            size = 4 * image.width * image.height  # PIL pads RGB to four bytes
            if size <= self._room:
                self._room -= size
                self._kept[path] = image
        return image

    def _complain(self, path: str, error: Exception) -> None:
        if path not in self._complained:
            self._complained.add(path)
            warnings.warn(f"{path} is passed over: {str(error) or type(error).__name__}", stacklevel=2)


def open_stream(config: DataConfig) -> StreamedDataset:
    """List the media of manifests and folders.

    Raises:
        ValueError: a line that is not JSON, a folder that does not exist, or nothing to train on.
    """
    images: list[str] = []
    videos: list[str] = []
    for kind, path in _media(config):
        if kind == "image":
            images.append(path)
        elif config.frames:
            videos.append(path)
    images, videos = images[: config.limit], videos[: config.limit]
    if not images and not videos:
        names = ", ".join([*config.manifests, *config.folders]) or "neither manifest nor folder"
        raise ValueError(
            f"{names}: no image or video in splits {config.splits or 'of any name'}; name others"
        )
    return StreamedDataset(images, videos, config)


def _media(config: DataConfig) -> Iterator[tuple[str, str]]:
    """Kind and path of every file."""
    for manifest in config.manifests:
        for kind, path in manifest_media(Path(manifest), config.splits):
            yield kind, str(path)
    for folder in config.folders:
        if not os.path.isdir(folder):
            raise ValueError(f"data.folders names {folder}: no such folder; correct the path")
        for place, inner, names in os.walk(folder, followlinks=True):
            inner.sort()
            for name in sorted(names):
                suffix = os.path.splitext(name)[1].lower()
                if suffix in IMAGE_SUFFIXES or suffix in VIDEO_SUFFIXES:
                    yield "image" if suffix in IMAGE_SUFFIXES else "video", os.path.join(place, name)


def _open_image(path: str) -> Image.Image:
    with Image.open(path) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


def _read_frames(path: str, config: DataConfig, generator: torch.Generator | None) -> list[Image.Image]:
    """Frames of one clip: from a random place of the video, or its first ones.

    Raises `ValueError` where the video is too short, or the file holds sound alone.
    """
    with av.open(path) as container:
        if not container.streams.video:
            raise ValueError("it holds no video")
        stream = container.streams.video[0]
        rate = float(stream.average_rate or stream.guessed_rate or 1)
        stride = max(1, round(rate / config.frame_rate)) if config.frame_rate else 1
        span = (config.frames - 1) * stride + 1
        length = stream.frames or int(float(stream.duration or 0) * float(stream.time_base or 0) * rate)
        first = 0
        if generator is not None and length > span:
            first = int(torch.randint(length - span + 1, (), generator=generator))
        begin = stream.start_time or 0
        tick = float(stream.time_base or 1)
        if first:
            container.seek(begin + int(first / rate / tick), stream=stream)
        found: list[Image.Image] = []
        seen = 0
        for frame in container.decode(stream):
            if first and frame.pts is not None and round((frame.pts - begin) * tick * rate) < first:
                continue
            if seen % stride == 0:
                found.append(frame.to_image())
                if len(found) == config.frames:
                    return found
            seen += 1
    raise ValueError(f"it has {len(found)} of the {config.frames} frames of a clip")


def _window(
    size: tuple[int, int], shape: tuple[int, int], config: DataConfig, generator: torch.Generator
) -> _Window:
    """Draw a scale, evenly on a logarithmic axis, and a place."""
    (width, height), (rows, columns) = size, shape
    least, largest = config.scale
    low = max(least, rows / height, columns / width)
    high = max(largest, low)
    chance = [float(value) for value in torch.rand(4, generator=generator, dtype=torch.float64)]
    scale = math.exp(math.log(low) + chance[0] * (math.log(high) - math.log(low)))
    flip = config.flip and chance[3] < 0.5
    if scale == 1.0:  # whole pixels, which need no resampling
        x, y = int(chance[1] * (width - columns + 1)), int(chance[2] * (height - rows + 1))
        return _Window((x, y, x + columns, y + rows), (columns, rows), flip)
    across, down = min(columns / scale, width), min(rows / scale, height)
    left, top = chance[1] * (width - across), chance[2] * (height - down)
    box = (left, top, min(left + across, width), min(top + down, height))
    return _Window(box, (columns, rows), flip)
