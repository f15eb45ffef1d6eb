"""One scaled-down quickstart, whose tokenizers, datasets and checkpoints the other tests use as well."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests import programs
from tests.programs import Ended, Programs, start

VISION: dict[str, Any] = {
    "output": "set by the quickstart",
    "model": {
        "channels": 32,
        "channel_multiplier": [1, 1, 1, 1],
        "num_res_blocks": 0,
        "attention_resolutions": [],
        "z_channels": 8,
        "embed_dim": 8,
        "codebook_size": 512,
    },
    "schedule": {
        "steps": 8,
        "batch_size": 4,
        "whole_batch_size": 2,
        "clip_batch_size": 2,
        "clip_every": 3,
        "decoded_frames": 1,
        "warmup_steps": 2,
    },
    "loss": {"continuous_steps": 3},
    "checkpoint_every": 4,
    "log_every": 4,
}
MODEL = {
    "num_layers": 2,
    "hidden_size": 64,
    "ffn_hidden_size": 128,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "max_position_embeddings": 512,
    "rotary_base": 10000,
    "embedding_dropout": 0.0,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
}
TRAINING: dict[str, Any] = {
    "run": "set by the quickstart",
    "platform": "cpu",
    "model": MODEL,
    "data": {
        "sources": {
            "images": {"path": "set", "weight": 0.7},
            "videos": {"path": "set", "weight": 0.28},
            "texts": {"path": "set", "weight": 0.02},
        },
        "context_length": 512,
        "num_workers": 0,
    },
    "optimizer": {"learning_rate": 3e-3, "warmup_steps": 2},
    "trainer": {"steps": 4, "global_batch_size": 2, "precision": "fp32"},
    "checkpoint": {"interval": 2},
}
CORPUS = {"train_images": 16, "train_videos": 8, "train_texts": 4, "held_out_images": 8, "held_out_videos": 4}


@dataclass(frozen=True)
class Quickstart:
    """A finished run."""

    config: Path
    """Its YAML file (JSON is YAML)."""
    training: Path
    """Its training's."""
    run: Path
    """What it made."""
    ended: Ended
    """How it ended."""

    @property
    def tokenizers(self) -> tuple[object, ...]:
        """Arguments of the programs that take both."""
        return (
            "--vision-tokenizer",
            self.run / "vision-tokenizer",
            "--text-tokenizer",
            self.run / "text.model",
        )


@pytest.fixture(scope="session")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Quickstart:
    """The whole path on a few dozen pictures and clips."""
    folder = tmp_path_factory.mktemp("quickstart")
    (folder / "vision.yaml").write_text(json.dumps(VISION))
    (folder / "training.yaml").write_text(json.dumps(TRAINING))
    settings = {
        "run": str(folder / "run"),
        "title": "Scaled <down>",
        "corpus": CORPUS,
        "vision": str(folder / "vision.yaml"),
        "training": str(folder / "training.yaml"),
        "text_pieces": 400,
        "shards": 2,
        "evaluation": {"prompts": 4, "captions": 4, "continuations": 2, "clips": 2},
    }
    (folder / "quickstart.yaml").write_text(json.dumps(settings))
    ended = start("tools/quickstart.py", "--config", folder / "quickstart.yaml")
    if ended.code:
        raise RuntimeError(f"the quickstart ended with {ended.code}: {ended.err[-8000:]}")
    return Quickstart(folder / "quickstart.yaml", folder / "training.yaml", folder / "run", ended)


@pytest.fixture(scope="session")
def program() -> Programs:
    """Starts command-line programs without importing everything anew."""
    return programs.shared()
