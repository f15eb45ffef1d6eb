"""The photographs proof at a small scale: seconds of training, codes and block means of 9 bits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from emu3_megatron.settings import read_settings
from emu3_megatron.vision.training import VisionTrainer, open_dataset
from emu3_megatron.vision.training_config import VisionTrainingConfig
from tests.proofs.photographs import CONFIG, HELD_OUT, TRAINING, Score, block_means, photograph, score
from tests.proofs.photographs import write_manifest as list_photographs


def small_run(folder: Path) -> VisionTrainingConfig:
    """The proof's configuration, shortened."""
    manifest = list_photographs(folder / "training.jsonl", TRAINING)
    options = {
        "output": folder / "run",
        "data.manifests": json.dumps([str(manifest)]),
        "model.codebook_size": 512,
        "schedule.steps": 180,
        "schedule.batch_size": 8,
        "schedule.crop": 32,
        "schedule.whole_from": 1.0,
        "schedule.warmup_steps": 10,
        "loss.continuous_steps": 60,
        "loss.codebook_rows": 4096,
        "average_decay": 0.9,
        "checkpoint_every": 0,
    }
    arguments = [f"--{key}={value}" for key, value in options.items()]
    return read_settings(VisionTrainingConfig, None, ["--config", str(CONFIG), *arguments])


def measure(folder: Path) -> Score:
    config = small_run(folder)
    tokenizer = VisionTrainer(config, open_dataset(config)).fit()
    return score(tokenizer, HELD_OUT, levels=(8, 8, 8), side=256)


@pytest.mark.slow
def test_photographs_never_seen_come_back_better_than_block_means(tmp_path: Path) -> None:
    held_out = measure(tmp_path)
    assert sum(held_out.psnr.values()) > sum(held_out.baseline.values())
    assert held_out.usage > 0.5


def test_block_means_are_as_good_as_they_can_be() -> None:
    """More levels are never worse, and a plain picture at a level comes back as it is."""
    pixels = photograph("chelsea.png", 128)
    errors = [(block_means(pixels, (n, n, n)) - pixels).square().mean() for n in (4, 8, 32)]
    assert errors[0] > errors[1] > errors[2]
    plain = pixels * 0 + 1
    assert (block_means(plain, (32, 32, 32)) - plain).abs().max() < 1e-5
