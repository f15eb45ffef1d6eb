"""Generates for held-out combinations, and lets the checker read the pixels.

Run as ``python -m emu3_megatron.samples.quickstart.evaluation RUN SETTINGS``; writes ``RUN/evaluation``:
``scores.json`` (the numbers of the summary), ``results.json`` and pictures (what the report shows).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image as PillowImage
from tqdm import tqdm

from emu3_megatron.errors import run_main
from emu3_megatron.files import atomic_write, write_json_atomic
from emu3_megatron.inference.engine import Request
from emu3_megatron.inference.sampling import Sampling
from emu3_megatron.inference.tasks import Generator
from emu3_megatron.media import load_clip, load_stills, to_uint8, write_png
from emu3_megatron.samples import Checker, parse_caption, read_manifest
from emu3_megatron.samples.checker import Reading
from emu3_megatron.samples.definitions import COLOURS, DIRECTIONS, POSITIONS, SHAPES
from emu3_megatron.samples.quickstart.config import EvaluationSection
from emu3_megatron.samples.quickstart.statistics import wilson_interval
from emu3_megatron.samples.world import WorldConfig

Pixels = npt.NDArray[np.uint8]
Row = Mapping[str, Any]

CHANCE = {
    "colour": 1 / len(COLOURS),
    "shape": 1 / len(SHAPES),
    "position": 1 / len(POSITIONS),
    "caption_colour": 1 / len(COLOURS),
    "caption_shape": 1 / len(SHAPES),
    "motion": 1 / len(DIRECTIONS),
}
"""What a model that ignores its input would score."""
PICTURE_ATTRIBUTES = ("colour", "shape", "position")
CLIP_ATTRIBUTES = ("colour", "shape", "direction")
SHOWN = 24
"""Pairs of original and reconstruction, and continuations, that the report shows."""
LONGEST_CAPTION = 48
"""Tokens."""
LONGEST_TEXT = 64
"""Tokens of the text-only document."""


class Evaluation:
    """Scores and pictures of one trained model.

    Args:
        generator: the model with its tokenizers.
        world: what the corpus showed; the checker reads by it.
        corpus: the corpus's folder, for its held-out manifests.
        folder: where pictures go.
        settings: how many, and how they are drawn.
    """

    def __init__(
        self,
        generator: Generator,
        world: WorldConfig,
        corpus: Path,
        folder: Path,
        settings: EvaluationSection,
    ) -> None:
        self.generator = generator
        self.world = world
        self.folder = folder
        self.settings = settings
        self.checker = Checker(world)
        self.vision = generator.bundle.vision_tokenizer
        self.right: dict[str, list[bool]] = {}
        self.ceiling: dict[str, list[bool]] = {}
        self.originals: list[bool] = []
        self.stills = read_manifest(corpus / "held-out-images.jsonl")
        self.clips = read_manifest(corpus / "held-out-videos.jsonl")
        size = (world.size, world.size)
        self.stills_NCHW = load_stills([corpus / str(row["image"]) for row in self.stills], size)
        paths = [corpus / str(row["video"]) for row in self.clips]
        self.clips_NTCHW = torch.stack([load_clip(path, world.frames, size) for path in paths])

    @property
    def _sampling(self) -> Sampling:
        settings = self.settings
        return Sampling(temperature=settings.temperature, top_k=settings.top_k, guidance=settings.guidance)

    def _seeds(self, count: int) -> list[int]:
        return list(range(self.settings.seed, self.settings.seed + count))

    @torch.no_grad()
    def run(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Do everything; returns the scores and what the report shows."""
        results = {
            "reconstructions": self.reconstructions(),
            "images": self.images(),
            "captions": self.captions(),
            "continuations": self.continuations(),
            "clips": self.videos(),
            "text": self.text(),
        }
        return self.scores(), results

    def scores(self) -> dict[str, Any]:
        """Shares of right readings, with interval and chance."""
        return {
            "accuracy": {name: float(np.mean(marks)) for name, marks in self.right.items()},
            "reconstruction_accuracy": {name: float(np.mean(marks)) for name, marks in self.ceiling.items()},
            "original_accuracy": float(np.mean(self.originals)),
            "chance": {name: CHANCE[name] for name in self.right},
            "interval_95": {
                name: wilson_interval(sum(marks), len(marks)) for name, marks in self.right.items()
            },
        }

    def reconstructions(self) -> list[dict[str, Any]]:
        """Encode and decode held-out pictures and clips: what no model can do better."""
        stills_NHWC = to_uint8(self.vision.decode(self.vision.encode(self.stills_NCHW)))
        clips_NTHWC = to_uint8(self.vision.decode(self.vision.encode(self.clips_NTCHW)))
        for row, original, pixels in zip(self.stills, to_uint8(self.stills_NCHW), stills_NHWC, strict=True):
            wanted = row["attributes"]
            read, plain = self.checker.read_image(pixels), self.checker.read_image(original)
            for name in PICTURE_ATTRIBUTES:
                self.ceiling.setdefault(name, []).append(getattr(read, name) == wanted[name])
                self.originals.append(getattr(plain, name) == wanted[name])
        half = self.world.frames // 2
        for row, original, pixels in zip(self.clips, to_uint8(self.clips_NTCHW), clips_NTHWC, strict=True):
            wanted = row["attributes"]["direction"]
            self.ceiling.setdefault("motion", []).append(
                self.checker.read_clip(pixels[half:]).direction == wanted
            )
            self.originals.append(self.checker.read_clip(original[half:]).direction == wanted)
        shown = zip(self.stills[:SHOWN], to_uint8(self.stills_NCHW[:SHOWN]), stills_NHWC, strict=False)
        return [
            {
                "original": self._picture(f"original-{i}", original),
                "other": self._picture(f"reconstruction-{i}", pixels),
                "note": str(row["caption"]),
            }
            for i, (row, original, pixels) in enumerate(shown)
        ]

    def images(self) -> list[dict[str, Any]]:
        """Draw pictures for the captions of held-out combinations."""
        rows = self.stills[: self.settings.prompts]
        prompts = [str(row["caption"]) for row in rows]
        size = self.world.size
        with tqdm(total=len(rows), desc="pictures", unit="picture") as bar:
            images = self.generator.text_to_image(
                prompts,
                height=size,
                width=size,
                sampling=self._sampling,
                seeds=self._seeds(len(rows)),
                progress=bar.update,
            )
        items = []
        for i, (row, image) in enumerate(zip(rows, images, strict=True)):
            item = self._judge(row, self.checker.read_image(image.pixels), PICTURE_ATTRIBUTES)
            self._count(item, {name: name for name in PICTURE_ATTRIBUTES})
            items.append({**item, "prompt": image.prompt, "file": self._picture(f"image-{i}", image.pixels)})
        return items

    def captions(self) -> list[dict[str, Any]]:
        """Describe held-out pictures."""
        count = self.settings.captions
        with tqdm(total=count, desc="captions", unit="caption") as bar:
            captions = self.generator.image_to_text(
                self.stills_NCHW[:count], max_new_tokens=LONGEST_CAPTION, progress=bar.update
            )
        items = []
        originals = to_uint8(self.stills_NCHW[:count])
        for i, (row, caption, pixels) in enumerate(
            zip(self.stills[:count], captions, originals, strict=True)
        ):
            item = self._judge(row, parse_caption(caption.text), PICTURE_ATTRIBUTES)
            self._count(item, {"colour": "caption_colour", "shape": "caption_shape"})
            items.append({**item, "caption": caption.text, "file": self._picture(f"captioned-{i}", pixels)})
        return items

    def continuations(self) -> list[dict[str, Any]]:
        """Predict the second half of held-out clips from the first, without a caption.

        The direction is read from the predicted frames alone: the given ones would tell it.
        """
        count, half = self.settings.continuations, self.world.frames // 2
        with tqdm(total=count, desc="continued clips", unit="clip") as bar:
            videos = self.generator.continue_video(
                self.clips_NTCHW[:count, :half],
                frames=self.world.frames,
                fps=self.world.fps,
                sampling=self._sampling,
                seeds=self._seeds(count),
                progress=bar.update,
            )
        items = []
        originals = to_uint8(self.clips_NTCHW[:count])
        for i, (row, video, pixels) in enumerate(zip(self.clips[:count], videos, originals, strict=True)):
            item = self._judge(row, self.checker.read_clip(video.pixels[half:]), ("direction",))
            self._count(item, {"direction": "motion"})
            if i < SHOWN:
                item["original"] = self._animation(f"clip-{i}", pixels)
                item["other"] = self._animation(f"continued-{i}", video.pixels)
            items.append(item)
        return items

    def videos(self) -> list[dict[str, Any]]:
        """Draw clips for captions of held-out combinations."""
        rows = self.clips[: self.settings.clips]
        with tqdm(total=len(rows), desc="clips", unit="clip") as bar:
            videos = self.generator.text_to_video(
                [str(row["caption"]) for row in rows],
                height=self.world.size,
                width=self.world.size,
                frames=self.world.frames,
                fps=self.world.fps,
                sampling=self._sampling,
                seeds=self._seeds(len(rows)),
                progress=bar.update,
            )
        items = []
        for i, (row, video) in enumerate(zip(rows, videos, strict=True)):
            item = self._judge(row, self.checker.read_clip(video.pixels), CLIP_ATTRIBUTES)
            items.append(
                {**item, "prompt": video.prompt, "file": self._animation(f"video-{i}", video.pixels)}
            )
        return items

    def text(self) -> str:
        """A document of text alone."""
        dialect = self.generator.bundle.dialect
        request = Request(
            prompt=np.array([dialect.vocabulary.bos]),
            sampling=Sampling(temperature=self.settings.temperature),
            seed=self.settings.seed,
            max_new_tokens=LONGEST_TEXT,
            forbidden=frozenset([dialect.vocabulary.boi]),
        )
        (completion,) = self.generator.engine.generate([request])
        ids = completion.ids[completion.ids != dialect.vocabulary.eos]
        return str(dialect.parse_text(ids).text)

    def _judge(self, row: Row, read: Reading | Mapping[str, str], names: Sequence[str]) -> dict[str, Any]:
        """What was asked for beside what was read."""
        seen = read if isinstance(read, Mapping) else vars(read)
        return {
            "expected": {name: str(row["attributes"][name]) for name in names},
            "read": {name: seen.get(name) for name in names},
        }

    def _count(self, item: Mapping[str, Any], scores: Mapping[str, str]) -> None:
        """Add an item's marks to the scores; keys are attributes, values the scores' names."""
        for attribute, score in scores.items():
            mark = item["read"][attribute] == item["expected"][attribute]
            self.right.setdefault(score, []).append(mark)

    def _picture(self, name: str, pixels: Pixels) -> str:
        """Write a PNG; returns its name."""
        write_png(self.folder / f"{name}.png", pixels)
        return f"{name}.png"

    def _animation(self, name: str, pixels_THWC: Pixels) -> str:
        """Write a GIF that loops; returns its name."""
        frames = [PillowImage.fromarray(frame) for frame in pixels_THWC]
        with atomic_write(self.folder / f"{name}.gif") as file:
            frames[0].save(
                file,
                format="GIF",
                save_all=True,
                append_images=frames[1:],
                duration=1000 // self.world.fps,
                loop=0,
            )
        return f"{name}.gif"


def evaluate(run: Path, world: str, settings: EvaluationSection, threads: int) -> None:
    """Open the run's model and tokenizers, evaluate, and write the results below ``RUN/evaluation``."""
    from emu3_megatron.parallel import platform
    from emu3_megatron.parallel.config import ParallelConfig

    device = platform.install("auto")
    # megatron-core is imported below; the platform must stand first
    from emu3_megatron.inference.bundle import open_bundle
    from emu3_megatron.parallel.groups import destroy_parallel, initialize_parallel

    torch.set_num_threads(threads)
    initialize_parallel(ParallelConfig(), device, settings.seed)
    bundle = open_bundle(
        run / "training", text_tokenizer=run / "text.model", vision_tokenizer=run / "vision-tokenizer"
    )
    folder = run / "evaluation"
    folder.mkdir(parents=True, exist_ok=True)
    generator = Generator(bundle)
    evaluation = Evaluation(generator, WorldConfig.preset(world), run / "corpus", folder, settings)
    scores, results = evaluation.run()
    write_json_atomic(folder / "results.json", results)
    write_json_atomic(folder / "scores.json", scores)
    destroy_parallel()


def main() -> None:
    """Arguments: the run's folder, and JSON with `world`, `threads` and the fields of `EvaluationSection`."""
    run, text = sys.argv[1:]
    values = json.loads(text)
    world, threads = values.pop("world"), values.pop("threads")
    evaluate(Path(run), world, EvaluationSection(**values), threads)


if __name__ == "__main__":
    run_main(main)
