"""Writes the sample corpus: real PNG and MP4 files, and a JSON Lines manifest for each split and medium."""

from __future__ import annotations

import io
import json
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image
from tqdm import tqdm

from emu3_megatron.files import atomic_write, json_lines
from emu3_megatron.samples.captions import LANGUAGES, WORDINGS, caption, text_document
from emu3_megatron.samples.world import MEDIA, SPLITS, Pixels, World, WorldConfig

H264_CRF = "4"
"""x264's constant rate factor: low, since chroma subsampling already costs small objects their edges."""


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """What to write. Raises `ValueError` on counts and shares that mean nothing."""

    world: WorldConfig = field(default_factory=WorldConfig)
    """What scenes may show."""
    train_images: int = 8000
    """PNG files of the train split."""
    train_videos: int = 2000
    """MP4 files of the train split."""
    train_texts: int = 1000
    """Pure text documents of the train split."""
    held_out_images: int = 256
    """PNG files of held-out combinations."""
    held_out_videos: int = 64
    """MP4 files of held-out combinations."""
    chinese: float = 0.25
    """Share of captions and texts that are Chinese, 0..1."""
    wordings: int = 3
    """How many of a language's wordings are used, from the first."""
    seed: int = 0
    """Scenes, captions and texts follow from it."""

    def __post_init__(self) -> None:
        """Check the counts and shares."""
        counts = {name: value for name, value in asdict(self).items() if name.startswith(("train", "held"))}
        if any(value < 0 for value in counts.values()):
            raise ValueError(f"counts of files must not be negative, got {counts}")
        if not 0 <= self.chinese <= 1:
            raise ValueError(f"chinese={self.chinese}: must be a share, 0 to 1")
        most = min(len(texts) for texts in WORDINGS.values())
        if not 1 <= self.wordings <= most:
            raise ValueError(f"wordings={self.wordings}: must be 1 to {most}")

    def count(self, medium: str, split: str) -> int:
        """Files of a medium and split."""
        return int(getattr(self, f"{split.replace('-', '_')}_{medium}s"))


def encode_png(pixels: Pixels) -> bytes:
    """PNG file of a picture, uint8 ``[H, W, 3]`` (sRGB)."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def encode_mp4(pixels: Pixels, fps: int) -> bytes:
    """MP4 file (H.264, yuv420p, BT.601 limited range, tagged) of a clip, uint8 ``[T, H, W, 3]`` (sRGB)."""
    buffer = io.BytesIO()
    with av.open(buffer, mode="w", format="mp4") as container:
        options = {"crf": H264_CRF, "preset": "medium", "x264-params": "threads=1:log-level=0"}
        stream = container.add_stream("libx264", rate=Fraction(fps), options=options)
        stream.height, stream.width = pixels.shape[1:3]
        stream.pix_fmt = "yuv420p"
        context = stream.codec_context
        # 6: SMPTE 170M (BT.601), which is also what the conversion below uses; 1: limited range.
        context.color_primaries = context.color_trc = context.colorspace = 6
        context.color_range = 1
        for array in pixels:
            frame = av.VideoFrame.from_ndarray(array, format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace="ITU601", dst_color_range="MPEG")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def write_corpus(folder: str | Path, config: CorpusConfig, *, processes: int = 1) -> dict[str, Path]:
    """Write the files and manifests of a corpus.

    Everything follows from the config: the bytes do not depend on `processes`. Files appear under
    ``images/SPLIT`` and ``videos/SPLIT``. The manifests ``train-images.jsonl``, ``train-videos.jsonl``,
    ``train-texts.jsonl``, ``held-out-images.jsonl`` and ``held-out-videos.jsonl`` come last, so that none
    is there before its files. Each line has ``id``, ``split``, and ``image`` or ``video`` (a path relative
    to the manifest) with ``caption``, ``language`` and ``attributes``, or ``text``. Running again rewrites
    all of it.

    Args:
        folder: made if missing.
        config: what to write.
        processes: how many processes draw and encode.

    Returns:
        The manifests by name, the file name without its suffix.
    """
    folder = Path(folder)
    tasks = [
        (medium, split, index)
        for split in SPLITS
        for medium in MEDIA
        for index in range(config.count(medium, split))
    ]
    for medium, split in {task[:2] for task in tasks}:
        (folder / f"{medium}s" / split).mkdir(parents=True, exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    records = list(
        tqdm(_run(tasks, folder, config, processes), total=len(tasks), desc="samples", unit="file")
    )
    texts = [_text_record(config, index) for index in range(config.train_texts)]
    groups = {
        f"{split}-{medium}s": [r for r in records if r["split"] == split and medium in r]
        for split in SPLITS
        for medium in MEDIA
    }
    groups["train-texts"] = texts
    manifests = {}
    for name, lines in groups.items():
        manifests[name] = folder / f"{name}.jsonl"
        data = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        with atomic_write(manifests[name]) as stream:
            stream.write(data.encode())
    return manifests


def _run(
    tasks: list[tuple[str, str, int]], folder: Path, config: CorpusConfig, processes: int
) -> Iterator[dict[str, object]]:
    """Records in the order of the tasks, made by this process or by several."""
    if processes < 1:
        raise ValueError(f"processes={processes}: must be at least 1")
    if processes == 1:
        maker = _Maker(folder, config)
        yield from map(maker, tasks)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        # The maker is small, so it travels with every chunk of tasks.
        yield from pool.map(_Maker(folder, config), tasks, chunksize=64)


class _Maker:
    """Draws, encodes and writes one file at a time."""

    def __init__(self, folder: Path, config: CorpusConfig) -> None:
        self.folder, self.config, self.world = folder, config, World(config.world)

    def __call__(self, task: tuple[str, str, int]) -> dict[str, object]:
        """Write the file of a task; returns its manifest record."""
        medium, split, index = task
        key = [self.config.seed, MEDIA.index(medium), SPLITS.index(split), index]
        rng = np.random.default_rng(key)
        scene = self.world.sample(rng, medium, split)
        language = LANGUAGES[int(rng.random() < self.config.chinese)]
        text = caption(scene, language=language, wording=int(rng.integers(self.config.wordings)))
        name = f"{medium}s/{split}/{index:06d}.{'png' if medium == 'image' else 'mp4'}"
        if medium == "image":
            data = encode_png(self.world.render(scene))
        else:
            data = encode_mp4(self.world.render_clip(scene), self.config.world.fps)
        (self.folder / name).write_bytes(data)
        return {
            "id": f"{split}-{medium}-{index:06d}",
            medium: name,
            "caption": text,
            "split": split,
            "language": language,
            "attributes": scene.to_dict(),
        }


def _text_record(config: CorpusConfig, index: int) -> dict[str, object]:
    """Manifest record of one pure text document."""
    rng = np.random.default_rng([config.seed, len(MEDIA), 0, index])
    language = LANGUAGES[int(rng.random() < config.chinese)]
    return {
        "id": f"train-text-{index:06d}",
        "text": text_document(rng, language=language),
        "split": "train",
        "language": language,
    }


def read_manifest(path: str | Path) -> list[dict[str, Any]]:
    """The records of a manifest, in order.

    Raises:
        ValueError: a line is not a JSON object; the message has its number.
    """
    return list(json_lines(path))
