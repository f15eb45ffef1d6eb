"""The sample-world proof: the whole path on the full world against its bars.

``make prove NAME=sample-world`` runs seed 0; ``ARGS="--seed 1"`` another one. Finished stages are kept. Exit
code 0 only if every bar holds, the time among them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "examples/configs/sample-world.yaml"
BARS = {
    "colour": 0.95,
    "position": 0.95,
    "shape": 0.80,
    "caption_colour": 0.90,
    "caption_shape": 0.90,
    "motion": 0.80,
}
MINUTES = 75.0


def seeded_training(seed: int, folder: Path) -> Path:
    """The training configuration with another seed, for the weights, the order and the dropout."""
    values = yaml.safe_load((ROOT / yaml.safe_load(CONFIG.read_text())["training"]).read_text())
    values["seed"] += seed
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "training.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def judge(summary: dict[str, object]) -> list[str]:
    """Lines of the verdict; those that fail begin with FAIL."""
    accuracy: dict[str, float] = summary["accuracy"]  # type: ignore[assignment]
    lines = []
    for name, bar in BARS.items():
        mark = "pass" if accuracy[name] >= bar else "FAIL"
        lines.append(f"{mark} {name}: {accuracy[name]:.1%}, at least {bar:.0%}")
    original: float = summary["original_accuracy"]  # type: ignore[assignment]
    mark = "pass" if original >= 0.99 else "FAIL"
    lines.append(f"{mark} checker on original renderings: {original:.1%}, at least 99%")
    minutes = summary["seconds"]["total"] / 60  # type: ignore[index]
    lines.append(
        f"{'pass' if minutes <= MINUTES else 'FAIL'} time: {minutes:.1f} minutes, at most {MINUTES:.0f}"
    )
    return lines


def main() -> int:
    """Run, print the verdict, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of corpus, weights, order and samples")
    arguments = parser.parse_args()
    run = ROOT / f"runs/sample-world-{arguments.seed}"
    training = seeded_training(arguments.seed, run / "configs")
    command = [sys.executable, "tools/quickstart.py", "--config", str(CONFIG), "--run", str(run)]
    command += ["--training", str(training), "--corpus.seed", str(arguments.seed)]
    command += ["--evaluation.seed", str(arguments.seed)]
    if subprocess.run(command, cwd=ROOT).returncode:
        return 1
    verdict = judge(json.loads((run / "summary.json").read_text()))
    print("\n".join(verdict))
    return int(any(line.startswith("FAIL") for line in verdict))


if __name__ == "__main__":
    sys.exit(main())
