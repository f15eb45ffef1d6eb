"""A training that is killed and started again ends with the bytes of one that was not."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from emu3_megatron.vision.training_config import DataConfig, LossConfig
from emu3_megatron.vision.training_state import STATE_FILE
from tests.media.clips import encode, moving_picture
from tests.vision.test_adversarial import everything
from tests.vision.test_streaming import place_picture

ROOT = Path(__file__).parents[2]


def write_config(folder: Path) -> Path:
    """Every loss, pictures of mixed sizes and a video, drawn by a worker."""
    (folder / "media").mkdir()
    for number in range(4):
        place_picture(folder / "media" / f"{number}.png", 40 + 9 * number, 70)
    encode(folder / "media" / "clip.mp4", moving_picture(12, 48, 64))
    data = DataConfig(
        stream=True,
        folders=[str(folder / "media")],
        height=32,
        width=32,
        frames=4,
        workers=1,
        scale=(0.6, 1.0),
    )
    settings = everything(folder, data=data, checkpoint_every=2, tensorboard=True, sample_every=4)
    settings.schedule.steps = 14
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(json.loads(json.dumps(dataclasses.asdict(settings)))))
    return path


def start(config: Path, output: Path, processes: int) -> subprocess.Popen[bytes]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else [])]
    command += ["tools/train_vision_tokenizer.py", "--config", str(config), "--output", str(output)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, cwd=ROOT, env=environment)


def finish(process: subprocess.Popen[bytes]) -> int:
    """Exit code; nothing stays behind if the test is stopped."""
    try:
        return process.wait()
    finally:
        process.kill()


def saved_step(output: Path) -> int:
    path = output / STATE_FILE
    return int(torch.load(path, weights_only=True)["step"]) if path.is_file() else 0


def kill_after(process: subprocess.Popen[bytes], output: Path, step: int, processes: int) -> None:
    """SIGKILL to the training process, or to one of several, once a state of `step` or later is saved."""
    try:
        while process.poll() is None and saved_step(output) < step:
            time.sleep(0.05)
        victims = psutil.Process(process.pid).children() if processes > 1 else [psutil.Process(process.pid)]
        victims[0].send_signal(signal.SIGKILL)
        assert process.wait() != 0, "it was killed in the middle"
    finally:
        process.kill()


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_and_started_again_it_ends_with_the_same_bytes(tmp_path: Path, processes: int) -> None:
    config = write_config(tmp_path)
    if processes > 1:
        settings = yaml.safe_load(config.read_text())
        settings["schedule"]["clip_batch_size"] = 2
        config.write_text(yaml.safe_dump(settings))
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert finish(start(config, whole, processes)) == 0
    kill_after(start(config, killed, processes), killed, 6, processes)
    assert not (killed / "model.safetensors").exists()
    assert finish(start(config, killed, processes)) == 0
    assert (killed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()

    def untimed(folder: Path) -> list[dict[str, float]]:
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]

    assert untimed(killed) == untimed(whole), "every line once, with the figures of the undisturbed run"
    assert {"adversarial", "discriminator", "perceptual", "codes_used"} <= set(untimed(whole)[-1])
    check_pictures(whole)


def check_pictures(folder: Path) -> None:
    """TensorBoard shows originals above reconstructions, of images and of a clip."""
    events = EventAccumulator(str(folder)).Reload()
    assert set(events.Tags()["images"]) == {"images", "clip"}
    (*_, last) = events.Images("images")
    assert (last.height, last.width) == (2 * 32, 8 * 32)
    (*_, last) = events.Images("clip")
    assert (last.height, last.width) == (2 * 32, 4 * 32)
    assert "psnr" in events.Tags()["scalars"]


def test_losses_that_lack_their_weights_end_with_one_line(tmp_path: Path) -> None:
    """The program's error names the key; no traceback."""
    config = write_config(tmp_path)
    settings = yaml.safe_load(config.read_text())
    settings["loss"] = dataclasses.asdict(
        LossConfig(continuous_steps=2, perceptual_weight=1.0, perceptual_weights=str(tmp_path / "vgg16.pth"))
    )
    config.write_text(yaml.safe_dump(settings))
    process = subprocess.run(
        [sys.executable, "tools/train_vision_tokenizer.py", "--config", str(config)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 2
    assert "loss.perceptual_weights is" in process.stderr
    assert "Traceback" not in process.stderr
