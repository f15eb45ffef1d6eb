"""The stages of the quickstart, each the command that a user would type."""

from __future__ import annotations

import json
import platform
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from emu3_megatron.files import write_json_atomic
from emu3_megatron.samples.quickstart.config import QuickstartConfig
from emu3_megatron.samples.quickstart.report import write_report
from emu3_megatron.samples.quickstart.runner import StageRunner

SOURCES = ("images", "videos", "texts")
"""Datasets of the mixture, each made from one manifest of the corpus."""
PACKAGES = ("torch", "megatron-core", "transformers", "nvidia-dali-cuda130", "av", "sentencepiece", "numpy")
"""Packages whose versions stand in the summary."""


class Paths:
    """Where each stage leaves its result, below the run's folder."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.corpus = run / "corpus"
        self.vision = run / "vision-tokenizer"
        self.text = run / "text.model"
        self.data = run / "data"
        self.training = run / "training"
        self.evaluation = run / "evaluation"
        self.export = run / "hugging-face"

    def manifest(self, name: str) -> Path:
        """A manifest of the corpus, such as ``train-images``."""
        return self.corpus / f"{name}.jsonl"


def draw_corpus(config: QuickstartConfig, paths: Paths) -> list[list[str]]:
    """Draw the pictures and clips."""
    settings = asdict(config.corpus)
    options = [text for key, value in settings.items() for text in ("--" + key.replace("_", "-"), str(value))]
    return [
        [
            "python",
            "tools/make_samples.py",
            "--output",
            str(paths.corpus),
            "--processes",
            str(config.processes),
            *options,
        ]
    ]


def train_vision(config: QuickstartConfig, paths: Paths) -> list[list[str]]:
    """Train the vision tokenizer."""
    manifests = json.dumps([str(paths.manifest("train-images")), str(paths.manifest("train-videos"))])
    arguments = ["--config", config.vision, "--output", str(paths.vision), "--data.manifests", manifests]
    return [
        ["torchrun", "--nproc-per-node", str(config.processes), "tools/train_vision_tokenizer.py", *arguments]
    ]


def train_text(config: QuickstartConfig, paths: Paths) -> list[list[str]]:
    """Train the SentencePiece model on the captions and texts."""
    manifests = [str(paths.manifest(f"train-{name}")) for name in SOURCES]
    arguments = [
        "--manifest",
        *manifests,
        "--output",
        str(paths.text),
        "--vocab-size",
        str(config.text_pieces),
    ]
    return [["python", "tools/train_text_tokenizer.py", *arguments]]


def tokenize(config: QuickstartConfig, paths: Paths, name: str) -> list[list[str]]:
    """Turn one manifest into the shards of one dataset, by several workers."""
    common = ["--manifest", str(paths.manifest(f"train-{name}")), "--output", str(paths.data / name)]
    common += ["--vision-tokenizer", str(paths.vision), "--text-tokenizer", str(paths.text)]
    common += ["--image-area", str(64 * 64), "--video-frames", "8", "--num-shards", str(config.shards)]
    common += ["--num-workers", str(config.processes)]
    # Bars of workers that share a terminal would overwrite each other; the first one's stands for all.
    return [
        [
            "python",
            "tools/tokenize_media.py",
            *common,
            "--worker",
            str(worker),
            *(["--no-progress"] if worker else []),
        ]
        for worker in range(config.processes)
    ]


def train(config: QuickstartConfig, paths: Paths) -> list[list[str]]:
    """Train the model on all sources."""
    arguments = ["--config", config.training, "--run_folder", str(paths.training)]
    for name in SOURCES:
        arguments += [f"--data.sources.{name}.path", str(paths.data / name)]
    return [
        ["torchrun", "--nproc-per-node", str(config.processes), "-m", "emu3_megatron.training", *arguments]
    ]


def export(paths: Paths) -> list[list[str]]:
    """Write the Hugging Face folder."""
    arguments = ["--source", str(paths.training), "--output", str(paths.export), "--overwrite"]
    arguments += ["--text-tokenizer", str(paths.text), "--vision-tokenizer", str(paths.vision)]
    return [["python", "tools/convert_checkpoint.py", "export", *arguments]]


def write_summary(config: QuickstartConfig, paths: Paths, seconds: dict[str, float], total: float) -> Path:
    """Write ``summary.json`` from the scores and the stages' times."""
    scores = json.loads((paths.evaluation / "scores.json").read_text())
    logits = json.loads((paths.evaluation / "export.json").read_text())
    summary = {
        **scores,
        "prompts": config.evaluation.prompts,
        **logits,
        "seconds": {"total": round(total, 1), **seconds},
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
    }
    path = paths.run / "summary.json"
    write_json_atomic(path, summary)
    return path


def run_quickstart(config: QuickstartConfig) -> Path:
    """Run every stage that is not done yet, then write the summary and the report.

    Returns:
        Path of ``summary.json``.

    Raises:
        UserError: a stage failed; its own message stands above.
    """
    begin = time.monotonic()
    paths = Paths(Path(config.run))
    threads = {"OMP_NUM_THREADS": "1"}
    runner = StageRunner(paths.run, threads)
    runner.run_commands("corpus", draw_corpus(config, paths), outputs=[paths.corpus])
    runner.run_commands(
        "vision_tokenizer", train_vision(config, paths), [Path(config.vision)], [paths.vision]
    )
    runner.run_commands("text_tokenizer", train_text(config, paths), outputs=[paths.text])
    for name in SOURCES:
        runner.run_commands(f"tokenize_{name}", tokenize(config, paths, name), outputs=[paths.data / name])
    runner.run_commands("training", train(config, paths), [Path(config.training)], [paths.training])
    settings = {**asdict(config.evaluation), "world": config.corpus.world, "threads": config.processes}
    evaluation = [
        "python",
        "-m",
        "emu3_megatron.samples.quickstart.evaluation",
        str(paths.run),
        json.dumps(settings),
    ]
    runner.run_commands("evaluation", [evaluation], outputs=[paths.evaluation])
    runner.run_commands("export", export(paths), outputs=[paths.export])
    runner.run_commands(
        "compare_export", [["python", "-m", "emu3_megatron.samples.quickstart.compare", str(paths.run)]]
    )
    skipped = sum(runner.seconds.values()) - sum(runner.fresh.values())
    summary = write_summary(config, paths, runner.seconds, time.monotonic() - begin + skipped)
    report = write_report(paths.run, paths.training / "metrics.jsonl", config.title)
    print(f"{summary}\n{report}", flush=True)
    return summary
