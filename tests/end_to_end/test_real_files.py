"""The same path on photographs and clips that this project did not make, each at its own shape."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from emu3_megatron.data import MultimodalDataset
from emu3_megatron.grammar import Dialect, Image, Video
from emu3_megatron.media import decode_image, probe_video
from emu3_megatron.text import load_text_tokenizer
from emu3_megatron.vision import VisionTokenizer
from tests.end_to_end.conftest import TRAINING as SETTINGS
from tests.end_to_end.conftest import VISION
from tests.media.clips import CLIPS, PHOTOGRAPHS
from tests.programs import TRAINING, Programs, start

pytestmark = pytest.mark.slow

PICTURES = {
    "astronaut.png": "an astronaut in an orange suit",
    "chelsea.png": "一只猫",
    "coffee.png": "a cup of coffee on a saucer",
    "rocket.jpg": "a rocket on its pad at night",
    "hubble_deep_field.jpg": "many galaxies",
    "motorcycle_left.png": "a motorcycle in a garage",
    "camera.png": "a man with a camera",  # one channel
    "horse.png": "a black horse",  # with transparency
    "page.png": "a page of a book",  # wide
    "retina.jpg": "一只眼睛的视网膜",
}
VIDEOS = {
    "bikes.mp4": "people on bikes",
    "bigbuckbunny.mp4": "a rabbit in a meadow",
    "carphone_pristine.mp4": "a man in a car",
}
AREA, FRAMES = 64 * 64, 8


@dataclass(frozen=True)
class RealRun:
    """What the programs made of the files."""

    manifest: Path
    vision: Path
    text: Path
    data: Path
    training: Path


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory, program: Programs) -> RealRun:
    """Manifest, both tokenizers, dataset and a few training steps."""
    folder = tmp_path_factory.mktemp("real")
    run = RealRun(*(folder / name for name in ("all.jsonl", "vision", "text.model", "data", "run")))
    entries = []
    for source, captions, kind in ((PHOTOGRAPHS, PICTURES, "image"), (CLIPS, VIDEOS, "video")):
        for name, caption in captions.items():
            shutil.copy(source / name, folder)
            entries.append({"id": name, kind: name, "caption": caption})
    run.manifest.write_text(
        "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries), "utf-8"
    )

    (folder / "vision.yaml").write_text(json.dumps(VISION))
    given = ("--data.manifests", json.dumps([str(run.manifest)]), "--output", run.vision)
    succeed(program, "tools/train_vision_tokenizer.py", "--config", folder / "vision.yaml", *given)
    text = ("--manifest", run.manifest, "--output", run.text, "--vocab-size", 340)
    succeed(program, "tools/train_text_tokenizer.py", *text)
    tokenizers = ("--vision-tokenizer", run.vision, "--text-tokenizer", run.text)
    sizes = ("--image-area", AREA, "--video-frames", FRAMES, "--num-shards", 2, "--no-progress")
    files = ("--manifest", run.manifest, "--output", run.data)
    succeed(program, "tools/tokenize_media.py", *files, *tokenizers, *sizes)

    settings = {**SETTINGS, "run": str(run.training), "logging": {"progress": False, "tensorboard": False}}
    settings["data"] = {**SETTINGS["data"], "sources": {"real": {"path": str(run.data)}}, "num_workers": 1}
    (folder / "training.yaml").write_text(json.dumps(settings))
    ended = start(*TRAINING, "--config", folder / "training.yaml")
    assert ended.code == 0, ended.err[-4000:]
    return run


def succeed(program: Programs, *arguments: object) -> None:
    ended = program(*arguments)
    assert ended.code == 0, ended.err[-4000:]
    assert "Traceback" not in ended.err


def test_stock_megatron_reads_the_same_tokens_and_modes(real: RealRun) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    ours = MultimodalDataset.open(real.data)
    expected = [segment for i in range(len(ours)) for segment in ours.document(i)]
    found = []
    for shard in sorted(real.data.glob("*.bin")):
        stock = IndexedDataset(str(shard.with_suffix("")), multimodal=True)
        # its arrays are views of a map that its deletion closes
        found += [(ids.copy(), mode) for ids, mode in (stock[i] for i in range(len(stock)))]
    assert len(found) == len(expected) == 2 * len(PICTURES | VIDEOS)
    for (ids, mode), (own_ids, own_mode) in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ids, own_ids)
        assert mode == own_mode


def test_every_file_keeps_its_shape_and_can_be_decoded(real: RealRun) -> None:
    dataset, vision = MultimodalDataset.open(real.data), VisionTokenizer.from_pretrained(real.vision)
    assert not (real.data / "quarantine.jsonl").read_text()
    text = load_text_tokenizer(real.text)
    dialect = Dialect.preset("emu3", dataset.vocabulary, text)
    entries = [json.loads(line) for line in real.manifest.read_text("utf-8").splitlines()]
    shapes = set()
    for number, entry in enumerate(entries):
        (caption, _), (ids, mode) = dataset.document(number)
        assert mode == 1
        assert text.decode(caption.tolist()) == entry["caption"]
        span = dialect.parse_span(ids)
        if "image" in entry:
            assert isinstance(span, Image)
            size = decode_image(real.manifest.parent / entry["image"]).shape[:2]
            lead: tuple[int, ...] = (1,)
        else:
            assert isinstance(span, Video)
            size = probe_video(real.manifest.parent / entry["video"]).upright_size
            lead = (1, FRAMES)
        height, width = (8 * side for side in span.codes.shape[-2:])
        assert abs(math.log(height / width) - math.log(size[0] / size[1])) < 0.2
        assert AREA / 1.6 < height * width < AREA * 1.6
        with torch.no_grad():
            pixels = vision.decode(torch.from_numpy(np.asarray(span.codes, np.int64))[None])
        assert pixels.shape == (*lead, 3, height, width)
        assert torch.isfinite(pixels).all()
        shapes.add((height, width))
    assert len(shapes) >= 4


def test_training_ran_on_all_shapes(real: RealRun) -> None:
    lines = [json.loads(line) for line in (real.training / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == SETTINGS["trainer"]["steps"]
    for line in lines:
        assert all(math.isfinite(line[name]) for name in ("loss", "loss_text", "loss_vision", "grad_norm"))
    assert (real.training / "checkpoints" / "latest").is_file()
