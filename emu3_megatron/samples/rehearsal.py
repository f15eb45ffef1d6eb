"""A rehearsal of the whole chain on a cluster: its raw media and configurations, and what to expect of it.

``examples/slurm/rehearsal.sh`` calls both parts, with the jobs between them. As a program::

    python -m emu3_megatron.samples.rehearsal prepare FOLDER [--scale small] [--ranks N]
    python -m emu3_megatron.samples.rehearsal judge FOLDER
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml

from emu3_megatron.errors import UserError, run_main
from emu3_megatron.files import json_lines
from emu3_megatron.samples.captions import parse_caption
from emu3_megatron.samples.corpus import CorpusConfig, read_manifest, write_corpus
from emu3_megatron.samples.definitions import BACKGROUNDS
from emu3_megatron.samples.questions import write_conversations
from emu3_megatron.samples.world import World, WorldConfig
from emu3_megatron.text import train_sentencepiece

WINDOWS = {"stage1": 256, "stage2": 1024}
"""Context lengths in tokens; everything after stage 2 has its length."""
SAME_LOGITS = 1e-4
"""Largest difference of logits between the last run and its export, fp32."""
COMPARED = 4
"""Documents whose logits are compared."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much of everything."""

    images: int
    """PNG files."""
    videos: int
    """MP4 files."""
    texts: int
    """Plain texts."""
    questions: int
    """Conversations of one turn."""
    prompts: int
    """To draw pictures for, twice: candidates of pairs, and in the end."""
    vision_steps: int
    """Of the vision tokenizer."""
    steps: Mapping[str, int]
    """Of each training."""
    layers: int
    """Of the model."""
    hidden_size: int
    """Of the model."""


STAGES = ("stage1", "stage2", "quality", "understanding1", "understanding2", "dpo")
"""Trainings, in the chain's order."""
SCALES = {
    "tiny": Scale(
        images=32, videos=12, texts=24, questions=24, prompts=4, vision_steps=6,
        steps=dict.fromkeys(STAGES, 12), layers=2, hidden_size=64,
    ),
    "small": Scale(
        images=1200, videos=240, texts=200, questions=320, prompts=16, vision_steps=300,
        steps={**dict.fromkeys(STAGES, 60), "stage1": 300, "stage2": 150}, layers=4, hidden_size=128,
    ),
}  # fmt: skip
"""``tiny`` shows that the jobs fit together, in minutes; ``small`` learns something."""

_VISION_ONLY = {"text_weight": 0.0, "meta_weight": 0.0, "break_weight": 0.0, "control_weight": 0.0}
_DRAWING = {**_VISION_ONLY, "vision_weight": 1.0}
_TALKING = {**_VISION_ONLY, "text_weight": 1.0, "vision_weight": 0.0, "end_weight": 1.0}


def prepare(folder: Path, scale: Scale, ranks: int = 1) -> None:
    """Write the raw media, ``raw.jsonl``, the text tokenizer, prompts, and ``configs/``, all below `folder`.

    Args:
        folder: On a file system that every node sees; made if missing.
        scale: How much.
        ranks: Processes of every training, which share its batches evenly.

    Raises:
        UserError: `ranks` is not positive.
    """
    world = WorldConfig.preset("quickstart")
    corpus = CorpusConfig(
        world=world, train_images=scale.images, train_videos=scale.videos, train_texts=scale.texts,
        held_out_images=scale.prompts, held_out_videos=0, chinese=0.1, wordings=1,
    )  # fmt: skip
    manifests = write_corpus(folder / "raw", corpus)
    entries = [entry for kind in ("images", "videos", "texts") for entry in _raw(manifests, kind)]
    (folder / "raw.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    write_conversations(folder / "conversations", World(world), split="train", count=scale.questions, seed=0)
    texts = [str(entry.get("caption", entry.get("text"))) for entry in entries]
    train_sentencepiece(texts, folder / "text.model", 512)
    captions = [str(row["caption"]) for row in read_manifest(manifests["held-out-images"])]
    (folder / "prompts.txt").write_text("".join(f"{caption}\n" for caption in captions))
    write_configurations(folder / "configs", scale, ranks)


def write_configurations(folder: Path, scale: Scale, ranks: int) -> None:
    """Write a YAML file for every job that has one, with batches that `ranks` processes share evenly.

    Raises:
        UserError: `ranks` is not positive.
    """
    if ranks < 1:
        raise UserError(f"ranks={ranks} must be at least 1: the processes of a training")
    folder.mkdir(parents=True, exist_ok=True)
    for name, values in _configurations(scale, ranks).items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(values, sort_keys=False))


def _raw(manifests: Mapping[str, Path], kind: str) -> list[dict[str, Any]]:
    """Entries of the corpus as raw media: paths from the folder, and the kind as their split."""
    entries = []
    for row in read_manifest(manifests[f"train-{kind}"]):
        entry: dict[str, Any] = {**row, "split": kind}
        for medium in ("image", "video"):
            if medium in entry:
                entry[medium] = f"raw/{entry[medium]}"
        entries.append(entry)
    return entries


def _configurations(scale: Scale, ranks: int) -> dict[str, dict[str, Any]]:
    """Every configuration of the chain by name, with batches for so many processes."""
    probe = {"min_width": 64, "min_height": 64}
    everything = {name: {"path": f"data/{name}"} for name in ("text", "images", "videos")}
    described = {"path": "data/images", "weight": 0.8, "template": {"caption_after_probability": 1.0}}
    still = {name: everything[name] for name in ("text", "images")}
    moving = {"images": everything["images"], "videos": {"path": "data/quality-videos"}}
    return {
        "curation": {
            "manifest": ["raw.jsonl"],
            "output": "curated",
            "image": {"stages": ["probe"], "probe": probe},
            "video": {"stages": ["probe", "motion"], "probe": {**probe, "min_fps": 1.0, "min_seconds": 0.5}},
            "text": {"stages": ["length"], "min_characters": 5},
        },
        "vision": _vision(scale, ranks),
        "stage1": _training(scale, ranks, "stage1", None, still),
        "stage2": _training(scale, ranks, "stage2", "stage1", everything),
        "quality": _training(scale, ranks, "quality", "stage2", moving, loss=_DRAWING),
        "understanding1": _training(
            scale, ranks, "understanding1", "stage2", loss=_TALKING,
            sources={"images": described, "text": {"path": "data/text", "weight": 0.2}},
        ),
        "understanding2": _training(
            scale, ranks, "understanding2", "understanding1", loss=_TALKING,
            sources={"conversations": {"path": "data/conversations"}},
        ),
        "dpo": _training(
            scale, ranks, "dpo", "quality", {"pairs": {"path": "data/pairs"}}, loss=_DRAWING, rate=2e-4,
            dpo={"beta": 0.1, "cross_entropy_weight": 0.5},
        ),
    }  # fmt: skip


def _shared(size: int, ranks: int) -> int:
    """The least batch of `size` or more that processes share evenly."""
    return -(-size // ranks) * ranks


def _vision(scale: Scale, ranks: int) -> dict[str, Any]:
    """The quickstart's vision tokenizer, with fewer steps."""
    steps = scale.vision_steps
    return {
        "output": "vision-tokenizer",
        "model": {
            "channels": 32, "channel_multiplier": [1, 1, 1, 1], "num_res_blocks": 0,
            "attention_resolutions": [], "z_channels": 8, "embed_dim": 8, "codebook_size": 512,
        },
        "data": {"manifests": ["curated/manifest.jsonl"], "splits": ["images", "videos"], "height": 64,
                 "width": 64, "frames": 8},
        "schedule": {"steps": steps, "batch_size": _shared(8, ranks), "whole_batch_size": _shared(4, ranks),
                     "clip_batch_size": _shared(2, ranks), "clip_every": 3, "decoded_frames": 1, "crop": 32,
                     "warmup_steps": max(1, steps // 20)},
        "loss": {"continuous_steps": max(1, steps // 10)},
        "checkpoint_every": max(2, steps // 2),
    }  # fmt: skip


def _training(
    scale: Scale,
    ranks: int,
    name: str,
    start: str | None,
    sources: Mapping[str, Any],
    *,
    loss: Mapping[str, float] | None = None,
    rate: float = 2e-3,
    **more: Any,
) -> dict[str, Any]:
    """One training of the chain, from the weights of `start`."""
    steps = scale.steps[name]
    return {
        "run": f"runs/{name}",
        "model": {
            "num_layers": scale.layers, "hidden_size": scale.hidden_size,
            "ffn_hidden_size": 3 * scale.hidden_size,
            "num_attention_heads": 4, "num_query_groups": 2, "max_position_embeddings": WINDOWS["stage2"],
            "rotary_base": 10000, "init_method_std": 0.08, "embedding_dropout": 0.0, "attention_dropout": 0.0,
            "hidden_dropout": 0.0,
        },
        "data": {
            "sources": dict(sources), "context_length": WINDOWS["stage1" if name == "stage1" else "stage2"],
            "num_workers": 0,
        },
        "optimizer": {"learning_rate": rate, "warmup_steps": max(1, steps // 10), "clip_grad": 1.0},
        "trainer": {"steps": steps, "global_batch_size": _shared(4, ranks), "precision": "fp32"},
        "checkpoint": {"interval": max(1, steps // 2), **({"load": f"runs/{start}"} if start else {})},
        **({"loss": dict(loss)} if loss else {}),
        **more,
    }  # fmt: skip


def score_background(prompt: str, pixels: npt.NDArray[np.uint8]) -> Mapping[str, float]:
    """How near a picture is to the background that its prompt names: a scorer that any skill can please.

    Args:
        prompt: A caption of the sample world.
        pixels: uint8 ``[H, W, 3]``.

    Returns:
        ``background``, 0 to 1.

    Raises:
        UserError: the prompt names none.
    """
    background = parse_caption(prompt).get("background")
    if background is None:
        raise UserError(f"prompt {prompt!r} names no background of the sample world")
    difference = pixels.astype(np.float64) - np.asarray(BACKGROUNDS[background])
    return {"background": float(1 - np.abs(difference).mean() / 255)}


def judge(folder: Path) -> list[str]:
    """What the chain left in `folder`, against what it should have.

    Returns:
        Lines that begin with ``pass`` or ``FAIL``.
    """
    findings: list[tuple[bool, str]] = []
    for stage in STAGES:
        findings += _judge_training(folder, stage)
    videos = sum("loss_videos_vision" in line for line in _metrics(folder, "stage2"))
    findings.append((videos > 0, f"stage2: video in {videos} steps, windows of {WINDOWS['stage2']} tokens"))
    prompts = len((folder / "prompts.txt").read_text().splitlines())
    pictures = len(list((folder / "generated").rglob("*.png")))
    findings.append((pictures == prompts, f"generation: {pictures} pictures for {prompts} prompts"))
    largest = _export_difference(folder)
    findings.append((largest <= SAME_LOGITS, f"export: logits within {largest:.1e} in transformers"))
    failed = sorted(path.parent.name for path in folder.glob("logs/*/attempt-*/failed"))
    findings.append((not failed, f"jobs: {len(failed)} attempts failed"))
    return [f"{'pass' if good else 'FAIL'} {text}" for good, text in findings]


def _metrics(folder: Path, stage: str) -> list[dict[str, Any]]:
    path = folder / "runs" / stage / "metrics.jsonl"
    return list(json_lines(path)) if path.exists() else []


def _judge_training(folder: Path, stage: str) -> list[tuple[bool, str]]:
    """All steps there, finite, a checkpoint at the end, and less loss at the end than at the beginning."""
    wanted = yaml.safe_load((folder / "configs" / f"{stage}.yaml").read_text())["trainer"]["steps"]
    lines = _metrics(folder, stage)
    losses = [line["loss"] for line in lines]
    whole = [line["step"] for line in lines] == list(range(1, wanted + 1))
    committed = (folder / "runs" / stage / "checkpoints" / f"step-{wanted:08d}" / "COMMIT").exists()
    finite = all(math.isfinite(loss) for loss in losses)
    findings = [
        (whole and committed and finite, f"{stage}: {len(lines)} of {wanted} steps, saved: {committed}")
    ]
    if whole and stage != "dpo":  # twelve steps of preferences go up and down
        part = max(1, wanted // 4)
        first, last = (sum(some) / part for some in (losses[:part], losses[-part:]))
        findings.append(
            (last < first, f"{stage}: loss {first:.3f} in the first quarter, {last:.3f} in the last")
        )
    return findings


def _export_difference(folder: Path) -> float:
    """Largest difference of logits on documents of the training data."""
    from emu3_megatron.parallel import platform
    from emu3_megatron.parallel.config import ParallelConfig
    from emu3_megatron.parallel.groups import destroy_parallel, initialize_parallel

    initialize_parallel(ParallelConfig(), platform.install("cpu"), seed=0)
    from emu3_megatron.conversion.checkpoints import logit_difference
    from emu3_megatron.data import MultimodalDataset
    from emu3_megatron.inference.bundle import open_bundle

    dataset = MultimodalDataset.open(folder / "data" / "images")
    sequences = [
        np.concatenate([ids for ids, _ in dataset.document(number)]).tolist()
        for number in range(min(COMPARED, len(dataset)))
    ]
    bundle = open_bundle(
        folder / "runs/dpo",
        text_tokenizer=folder / "text.model",
        vision_tokenizer=folder / "vision-tokenizer",
    )
    largest = logit_difference(bundle.model, folder / "hugging-face", sequences)
    destroy_parallel()
    return largest


def main() -> None:
    """Prepare a folder, or judge it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=("prepare", "judge"))
    parser.add_argument("folder", type=Path, help="work folder of the rehearsal, which every node sees")
    parser.add_argument("--scale", choices=sorted(SCALES), default="tiny", help="default: tiny")
    parser.add_argument("--ranks", type=int, default=1, help="processes of every training (default: 1)")
    asked = parser.parse_args()
    if asked.action == "prepare":
        prepare(asked.folder, SCALES[asked.scale], asked.ranks)
        return
    lines = judge(asked.folder)
    print("\n".join(lines))
    if failed := sum(line.startswith("FAIL") for line in lines):
        raise UserError(
            f"{failed} of {len(lines)} expectations do not hold; the logs are in {asked.folder / 'logs'}"
        )


if __name__ == "__main__":
    run_main(main)
