"""Losses on the GPU against fp32 on the CPU: the same weights, windows and steps.

Usage: python benchmarks/gpu/parity.py [--steps 10] [--smoke]

Trains a small model without dropout in fp32 on the CPU (in a process of its own), then on the GPU in fp32
and in bf16, each with the torch attention and, where installed, with Transformer Engine. Prints the largest
relative difference of the loss at the first step and over all. ``--smoke`` takes the CPU for the GPU.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[2])]

import common
import torch

from emu3_megatron.model import ModelConfig

WINDOW, DOCUMENT = 512, 120


def losses(steps: int, precision: str, backend: str, device: torch.device) -> list[float]:
    """Losses of every step."""
    config = ModelConfig.preset("tiny", attention_backend=backend, hidden_size=256, num_attention_heads=8)
    step = common.TrainingStep(config, common.SMOKE_VOCABULARY, precision, learning_rate=1e-3)
    return [
        step(common.random_window(WINDOW, DOCUMENT, common.SMOKE_VOCABULARY, device, seed)).item()
        for seed in range(steps)
    ]


def on_the_cpu(steps: int) -> list[float]:
    """The reference, from a process that knows no GPU."""
    command = [sys.executable, "-W", "ignore", __file__, "--steps", str(steps), "--reference"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-4000:])
    return [float(value) for value in json.loads(done.stdout.splitlines()[-1])]


def main() -> None:
    """Compare and print a line of JSON for every precision and backend."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--reference", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--smoke", action="store_true", help="on a CPU")
    arguments = parser.parse_args()
    machine = common.start(smoke=arguments.smoke or arguments.reference)
    if arguments.reference:
        print(json.dumps(losses(arguments.steps, "fp32", "torch", machine.device)))
        return
    environment = common.environment(machine)
    common.show(**environment)
    want = on_the_cpu(arguments.steps)
    backends = ["torch"]
    if machine.is_cuda and environment["transformer-engine"] != "none":
        backends.append("transformer_engine")
    torch.backends.cuda.matmul.allow_tf32 = False
    for backend in backends:
        for precision in ("fp32", "bf16"):
            got = losses(arguments.steps, precision, backend, machine.device)
            differences = [abs(a - b) / abs(b) for a, b in zip(got, want, strict=True)]
            common.show(
                backend=backend,
                precision=precision,
                first_step=differences[0],
                largest=max(differences),
                steps=arguments.steps,
            )


if __name__ == "__main__":
    main()
