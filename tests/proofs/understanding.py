"""The understanding proof: a quickstart model learns to answer questions about pictures that it never saw.

``make prove NAME=understanding`` starts from a finished ``make quickstart`` (``ARGS="--base RUN"`` for
another run of it): questions about the sample world as a LLaVA file, tokenized, stage 2 of understanding,
held-out questions answered greedily. Finished stages are kept. Exit code 0 only if every kind of question
reaches its bar.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
TRAINING = ROOT / "examples/configs/quickstart/training.yaml"
BAR = 0.8
"""Share of right answers of every kind; answers are balanced."""
PIXELS = 64 * 64
QUESTIONS = {"train": 12_000, "held-out": 800}
ANSWERS = {
    "vision_weight": 0.0,
    "meta_weight": 0.0,
    "break_weight": 0.0,
    "control_weight": 0.0,
    "end_weight": 1.0,
}


def run(*command: str | Path) -> None:
    """A command of this checkout; its failure ends the proof."""
    subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, check=True)


def tokenized(base: Path, folder: Path, split: str, count: int, seed: int) -> Path:
    """The dataset of a split, made where it is missing."""
    from emu3_megatron.samples.questions import write_conversations
    from emu3_megatron.samples.world import World, WorldConfig

    data = folder / "data" / split
    if not (data / "manifest.json").exists():
        world = World(WorldConfig.preset("quickstart"))
        file = write_conversations(folder / "pictures" / split, world, split=split, count=count, seed=seed)
        run(
            *["tools/tokenize_conversations.py", "--manifest", json.dumps([str(file)]), "--output", data],
            *["--text_tokenizer", base / "text.model", "--vision_tokenizer", base / "vision-tokenizer"],
            *["--min_area", str(PIXELS), "--max_area", str(PIXELS), "--quarantine_budget", "0"],
        )
    return data


def trained(base: Path, folder: Path, data: Path, steps: int, seed: int) -> Path:
    """Stage 2 from the quickstart's weights; a run that exists is resumed."""
    values = yaml.safe_load(TRAINING.read_text())
    values |= {"run": str(folder / "training"), "seed": seed, "loss": ANSWERS}
    values["data"] |= {"sources": {"talks": {"path": str(data)}}, "template": {}}
    values["optimizer"] |= {"learning_rate": 2e-3, "warmup_steps": min(50, steps // 10)}
    values["trainer"]["steps"] = steps
    values["checkpoint"] |= {"load": str(base / "training")}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "training.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    run("-m", "emu3_megatron.training", "--config", folder / "training.yaml")
    return folder / "training"


def answered(base: Path, model: Path, data: Path) -> dict[str, tuple[int, int]]:
    """Right answers and questions by kind."""
    from emu3_megatron.parallel import platform
    from emu3_megatron.parallel.config import ParallelConfig
    from emu3_megatron.parallel.groups import destroy_parallel, initialize_parallel

    initialize_parallel(ParallelConfig(), platform.install("auto"), seed=0)
    from emu3_megatron.data import MultimodalDataset
    from emu3_megatron.inference.bundle import open_bundle
    from emu3_megatron.inference.engine import Engine
    from emu3_megatron.samples.questions import count_right, read_prompts

    bundle = open_bundle(
        model, text_tokenizer=base / "text.model", vision_tokenizer=base / "vision-tokenizer"
    )
    counts = count_right(Engine(bundle.model, bundle.dialect), read_prompts(MultimodalDataset.open(data)))
    destroy_parallel()
    return counts


def main() -> int:
    """Run, print the verdict, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, default=ROOT / "runs/quickstart", help="a finished quickstart")
    parser.add_argument("--run", type=Path, default=ROOT / "runs/understanding", help="folder of this proof")
    parser.add_argument("--steps", type=int, default=1500, help="of stage 2")
    parser.add_argument("--questions", type=int, default=QUESTIONS["train"], help="to train on")
    parser.add_argument("--held-out", type=int, default=QUESTIONS["held-out"], help="to be answered")
    parser.add_argument("--seed", type=int, default=0, help="of questions, order and dropout")
    asked = parser.parse_args()
    counts = {"train": asked.questions, "held-out": asked.held_out}
    data = {split: tokenized(asked.base, asked.run, split, n, asked.seed) for split, n in counts.items()}
    model = trained(asked.base, asked.run, data["train"], asked.steps, asked.seed)
    verdict = []
    for kind, (right, number) in answered(asked.base, model, data["held-out"]).items():
        share = right / number
        deviation = (share * (1 - share) / number) ** 0.5
        mark = "pass" if share >= BAR else "FAIL"
        verdict.append(f"{mark} {kind}: {right} of {number} right, {share:.1%} +- {1.96 * deviation:.1%}")
    print("\n".join(verdict))
    return int(any(line.startswith("FAIL") for line in verdict))


if __name__ == "__main__":
    sys.exit(main())
