"""A tiny model of ours as the captioner of a manifest."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from emu3_megatron.curation.captions import CaptionJob
from emu3_megatron.curation.config import CaptionConfig
from emu3_megatron.inference import Generator, ModelBundle
from emu3_megatron.inference.captioner import EngineCaptioner
from emu3_megatron.media import Preprocessor, ResizeRule, decode_image, write_mp4, write_png
from emu3_megatron.vision import VisionTokenizer
from tests.inference import worlds
from tests.inference.test_tasks import VISION


@pytest.fixture(scope="module")
def generator() -> Iterator[Generator]:
    with worlds.one_process():
        torch.manual_seed(0)
        vision = VisionTokenizer(VISION).eval()
        config = worlds.model_config()
        yield Generator(ModelBundle(worlds.tiny_model(config), config, worlds.dialect(), vision))


def test_captions_are_those_of_the_generator(generator: Generator, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 32, 40, 3), dtype=np.uint8)
    for i in range(3):
        write_png(tmp_path / f"{i}.png", pixels[i])
    write_mp4(tmp_path / "clip.mp4", pixels, 4)
    write_mp4(tmp_path / "three.mp4", pixels[:3], 4)
    records = [{"id": str(i), "image": f"{i}.png"} for i in range(3)]
    records += [{"id": name, "video": f"{name}.mp4"} for name in ("clip", "three")]
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text("".join(json.dumps(record) + "\n" for record in records))
    config = CaptionConfig(
        manifest=(manifest,), output=tmp_path / "out", checkpoint=tmp_path, area=256, frames=4,
        max_tokens=6, batch_size=2, progress=False,
    )  # fmt: skip
    captioner = EngineCaptioner(generator, config, "tiny")
    counted = CaptionJob(config, captioner).run()
    rows = {}
    for name in ("manifest", "failures"):
        lines = (tmp_path / "out" / f"{name}.jsonl").read_text().splitlines()
        rows[name] = {row["id"]: row for row in map(json.loads, lines)}
    assert counted == (len(rows["manifest"]), len(rows["failures"]))
    assert set(rows["manifest"]) | set(rows["failures"]) == {"0", "1", "2", "clip", "three"}
    assert "multiple of" in rows["failures"]["three"]["reason"]
    rule = ResizeRule(area=256, spatial_factor=generator.bundle.vision_tokenizer.spatial_factor)
    for i in range(3):
        picture = decode_image(tmp_path / f"{i}.png")
        (pixels_TCHW,) = Preprocessor()([picture[None]], [rule.plan(*picture.shape[:2])])
        (expected,) = generator.image_to_text(pixels_TCHW, max_new_tokens=6)
        found = rows["manifest"].get(str(i), SimpleNamespace(get=lambda _: "")).get("caption")
        assert found == expected.text.strip()
