"""The trainer learns, repeats itself exactly, resumes exactly, and keeps all processes together."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from PIL import Image

from emu3_megatron.vision import VisionTokenizer, VisionTokenizerConfig
from emu3_megatron.vision.corpus import InMemoryDataset, background_colours, draw_batch, load_manifests
from emu3_megatron.vision.metrics import psnr
from emu3_megatron.vision.training import STATE_FILE, VisionTrainer
from emu3_megatron.vision.training_config import (
    DataConfig,
    LossConfig,
    ScheduleConfig,
    VisionTrainingConfig,
    learning_rate,
)
from tests import programs
from tests.media.clips import sound_alone

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "examples" / "configs"
EXAMPLES = sorted([*CONFIGS.glob("*/vision.yaml"), *CONFIGS.glob("vision-tokenizer/*.yaml")])

MODEL = VisionTokenizerConfig(
    channels=32, channel_multiplier=(1, 1, 1), num_res_blocks=0, attention_resolutions=(), codebook_size=64
)


def squares(images: int = 40, clips: int = 10, size: int = 16) -> InMemoryDataset:
    """A square of a random colour somewhere on grey, at rest or moving right."""
    rng = np.random.default_rng(0)

    def draw(frames: int) -> np.ndarray:
        clip = np.full((frames, 3, size, size), 128, np.uint8)
        colour, top, left = rng.integers(0, 2, 3) * 255, rng.integers(1, 9), rng.integers(1, 5)
        for index in range(frames):
            clip[index, :, top : top + 6, left + index : left + index + 6] = colour[:, None, None]
        return clip

    still = np.stack([draw(1)[0] for _ in range(images)])
    moving = np.stack([draw(4) for _ in range(clips)])
    return InMemoryDataset(torch.from_numpy(still), torch.from_numpy(moving))


def config(folder: Path, **changes: object) -> VisionTrainingConfig:
    values: dict[str, object] = {
        "output": str(folder),
        "model": MODEL,
        "data": DataConfig(height=16, width=16, frames=4),
        "schedule": ScheduleConfig(
            steps=12, batch_size=4, whole_batch_size=4, clip_batch_size=2, crop=8, warmup_steps=2
        ),
        "loss": LossConfig(continuous_steps=4, revive_every=2),
        "checkpoint_every": 0,
        "log_every": 4,
    }
    return VisionTrainingConfig(**(values | changes))


def test_a_run_repeats_and_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    whole = VisionTrainer(config(tmp_path / "a"), squares()).fit()
    assert VisionTrainer(config(tmp_path / "b"), squares()).fit().fingerprint == whole.fingerprint

    stopped = VisionTrainer(config(tmp_path / "c"), squares())
    for _ in range(7):
        stopped.train_step()
        stopped.step += 1
    stopped.save_state()
    assert VisionTrainer(config(tmp_path / "c"), squares()).fit().fingerprint == whole.fingerprint
    assert VisionTokenizer.from_pretrained(tmp_path / "c").fingerprint == whole.fingerprint
    with pytest.raises(ValueError, match="saved with another seed"):
        VisionTrainer(config(tmp_path / "c", seed=1), squares()).fit()


def test_a_run_that_reports_nothing_on_the_way_reports_its_last_step(tmp_path: Path) -> None:
    trained = VisionTrainer(config(tmp_path, log_every=0, sample_every=0), squares()).fit()
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["step"] == 12
    usual = VisionTrainer(config(tmp_path / "usual", sample_every=0), squares()).fit()
    assert trained.fingerprint == usual.fingerprint


def test_codes_placed_again_stand_nearer_to_the_latents(tmp_path: Path) -> None:
    dataset = squares()
    pixels = dataset.images(torch.arange(40)) / 127.5 - 1
    errors = {}
    for again in (False, True):
        loss = LossConfig(continuous_steps=4, codebook_rows=512, place_again=again)
        run = config(tmp_path / str(again), loss=loss)
        tokenizer = VisionTrainer(run, dataset).fit()
        latents = tokenizer.encode_latents(pixels)
        errors[again] = float(
            (latents - tokenizer.vectors_of(tokenizer.codes_of(latents))).square().mean().detach()
        )
        assert VisionTrainer(run, dataset).fit().fingerprint == tokenizer.fingerprint
    assert errors[True] < errors[False]


@pytest.mark.slow
def test_it_learns_images_and_clips(tmp_path: Path) -> None:
    dataset = squares()
    schedule = ScheduleConfig(steps=250, batch_size=8, clip_batch_size=2, crop=None, whole_batch_size=8)
    tokenizer = VisionTrainer(config(tmp_path, schedule=schedule), dataset).fit()
    still = dataset.images(torch.arange(8)) / 127.5 - 1
    moving = dataset.clips(torch.arange(4)) / 127.5 - 1
    for pixels in (still, moving):
        plain = torch.full_like(pixels, float(pixels.median()))
        assert psnr(tokenizer.decode(tokenizer.encode(pixels)), pixels) > psnr(plain, pixels) + 6
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 250
    assert lines[-1]["reconstruction"] < lines[0]["reconstruction"] / 2
    assert lines[-1]["codes_used"] > 5


@pytest.mark.slow
def test_two_processes_stay_together_and_write_one_result(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path)
    options = {
        "output": tmp_path / "run",
        "data.manifests": f"[{manifest}]",
        "data.height": 16,
        "data.width": 16,
        "data.frames": 0,
        "model.channels": 32,
        "model.channel_multiplier": "[1,1,1]",
        "model.num_res_blocks": 0,
        "model.attention_resolutions": "[]",
        "model.codebook_size": 32,
        "schedule.steps": 8,
        "schedule.crop": 8,
        "schedule.batch_size": 4,
        "schedule.whole_batch_size": 4,
        "loss.continuous_steps": 2,
        "checkpoint_every": 4,
    }
    arguments = [f"--{key}={value}" for key, value in options.items()]
    results = []
    for _ in range(2):
        ended = programs.shared()("tools/train_vision_tokenizer.py", *arguments, processes=2)
        assert ended.code == 0, ended.err
        results.append((tmp_path / "run" / "model.safetensors").read_bytes())
    assert torch.load(tmp_path / "run" / STATE_FILE, weights_only=True)["step"] == 8
    assert results[0] == results[1], "rerunning a finished run gives its result"


def write_manifest(folder: Path) -> Path:
    rows = []
    for index, pixels in enumerate(squares().images(torch.arange(12))):
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(folder / f"{index}.png")
        split = {"split": "held-out"} if index == 11 else {}
        rows.append({"id": str(index), "image": f"{index}.png", "caption": "a square", **split})
    rows.append({"id": "text", "text": "words alone"})
    path = folder / "manifest.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_manifest_is_decoded_scaled_and_cut(tmp_path: Path) -> None:
    path = write_manifest(tmp_path)
    dataset = load_manifests([path], height=16, width=16, frames=0, splits=["train"])
    assert torch.equal(dataset.images(torch.arange(11)), squares().images(torch.arange(11)))
    assert dataset.num_images == 11
    assert dataset.num_clips == 0
    smaller = load_manifests([path], height=8, width=12, frames=0, limit=2)
    assert smaller.images(torch.arange(2)).shape == (2, 3, 8, 12)


def test_a_bad_manifest_is_named(tmp_path: Path) -> None:
    path = tmp_path / "manifest.jsonl"
    path.write_text('{"id": "a", "text": "b"}\n')
    with pytest.raises(ValueError, match="no image or video"):
        load_manifests([path], height=8, width=8, frames=4)
    path.write_text("not json\n")
    with pytest.raises(ValueError, match="line 1: not JSON"):
        load_manifests([path], height=8, width=8, frames=4)
    for key, name in (("image", "a.png"), ("video", "a.mp4")):
        (tmp_path / name).write_text("no media")
        path.write_text(json.dumps({"id": "a", key: name}) + "\n")
        with pytest.raises(ValueError, match=f"{name}: cannot be decoded"):
            load_manifests([path], height=8, width=8, frames=4)
    header = b"IHDR" + struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk)
    sound_alone(tmp_path / "sound.mp4")
    for key, name in (("image", "bomb.png"), ("video", "sound.mp4")):
        path.write_text(json.dumps({"id": "a", key: name}) + "\n")
        with pytest.raises(ValueError, match=f"{name}: cannot be decoded"):
            load_manifests([path], height=8, width=8, frames=4)


def test_background_and_crops() -> None:
    dataset = squares()
    frames = dataset.images(torch.arange(8))
    assert torch.equal(background_colours(frames), torch.full((8, 3), 128.0))
    batch = draw_batch(
        dataset, clips=True, size=6, crop=8, multiple=4, generator=torch.Generator().manual_seed(0)
    )
    assert batch.pixels.shape == (6, 4, 3, 8, 8)
    assert batch.background.shape == (6, 4, 3)
    different = (batch.pixels - batch.background[..., None, None]).abs().amax((1, 2, 3, 4))
    assert (different > 0.5).all(), "every crop meets the square"


def test_the_learning_rate_rises_and_falls() -> None:
    schedule = ScheduleConfig(steps=100, warmup_steps=10, learning_rate=1.0, final_share=0.1)
    rates = [learning_rate(schedule, step) for step in range(100)]
    assert max(rates) == max(rates[8:12])
    assert rates[0] == pytest.approx(0.1, rel=0.01)
    assert rates[-1] == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule": ScheduleConfig(crop=6)}, r"schedule\.crop is 6"),
        ({"data": DataConfig(height=18, width=16)}, r"data\.height is 18"),
        ({"data": DataConfig(height=16, width=16, frames=6)}, r"data\.frames is 6"),
        ({"schedule": ScheduleConfig(batch_size=0)}, r"schedule\.batch_size is 0: it must be at least 1"),
        ({"schedule": ScheduleConfig(crop=0)}, r"schedule\.crop is 0"),
        ({"schedule": ScheduleConfig(steps=0)}, r"schedule\.steps is 0"),
        ({"schedule": ScheduleConfig(decoded_frames=0)}, r"schedule\.decoded_frames is 0"),
        ({"data": DataConfig(height=0, width=16)}, r"data\.height is 0"),
        ({"loss": LossConfig(place_again=True)}, r"loss\.codebook_rows is 0"),
        ({"log_every": -1}, r"log_every is -1: it must be at least 0"),
    ],
)
def test_configurations_that_do_not_fit_are_refused(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        VisionTrainer(config(tmp_path, **changes), squares())


def test_an_empty_dataset_is_refused(tmp_path: Path) -> None:
    empty = InMemoryDataset(torch.empty((0, 3, 16, 16), dtype=torch.uint8), squares().clips(torch.arange(0)))
    with pytest.raises(ValueError, match="neither images nor clips"):
        VisionTrainer(config(tmp_path), empty)
    with pytest.raises(ValueError, match="float32"):
        InMemoryDataset(torch.zeros(1, 3, 16, 16), squares().clips(torch.arange(0)))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_the_example_configurations_are_valid(path: Path) -> None:
    parser = ArgumentParser()
    parser.add_class_arguments(VisionTrainingConfig)
    values = parser.instantiate(parser.parse_object(yaml.safe_load(path.read_text())))
    VisionTrainingConfig(**values.as_dict()).check(processes=2)
