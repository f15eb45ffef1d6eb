"""The tokenization survival proof: kill -9 of whole process groups, again and again, leaves no trace.

``make prove NAME=tokenization-survival``: 216 images, clips and texts (real files, 21 of them bad) are
tokenized undisturbed by one worker; then by two workers in one process group that is killed at 20 random
moments of the job and started again after each; then by two and by three workers. All files of the dataset,
quarantine list and reports too, are the same to the last byte. Exit code 0 only if they are.

A job that comes to its end between kills is compared, and the next one begins from nothing.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np
import torch

from emu3_megatron.media import write_mp4, write_png
from emu3_megatron.text import train_sentencepiece
from emu3_megatron.tokenization import TokenizationConfig, tokenize
from emu3_megatron.vision import VisionTokenizer, VisionTokenizerConfig

FORK = multiprocessing.get_context("fork")
"""Spares the imports; nothing above starts a thread."""

SAMPLES, SHARDS = 216, 12


def write_tokenizers(folder: Path) -> dict[str, Path]:
    """A vision tokenizer of random weights and a text tokenizer."""
    torch.manual_seed(0)
    config = VisionTokenizerConfig(
        channels=32, channel_multiplier=(1, 1, 1, 2), num_res_blocks=1, codebook_size=512
    )
    vision = VisionTokenizer(config)
    with torch.no_grad():
        vision.codebook.normal_()
    vision.save_pretrained(folder / "vision")
    train_sentencepiece([f"picture number {i}, 图片" for i in range(40)], folder / "text.model", 400)
    return {"vision_tokenizer": folder / "vision", "text_tokenizer": folder / "text.model"}


def write_corpus(folder: Path) -> Path:
    """A manifest of images of several sizes, clips, texts, and every tenth entry a bad one."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    records: list[dict[str, Any]] = []
    for i in range(SAMPLES):
        record: dict[str, Any] = {"id": f"sample {i}", "caption": f"picture number {i}, 图片"}
        size = (64, 64) if i % 3 else (48, 96)
        if i % 10 == 9:
            (folder / f"{i}.png").write_bytes(b"\x89PNG no picture")
            record["image"] = f"{i}.png"
        elif i % 5 == 2:
            write_mp4(folder / f"{i}.mp4", generator.integers(0, 256, (8, *size, 3), dtype=np.uint8), 8)
            record["video"] = f"{i}.mp4"
        elif i % 7 == 3:
            record = {"id": f"sample {i}", "text": f"picture number {i} " * (1 + i % 40)}
        else:
            write_png(folder / f"{i}.png", generator.integers(0, 256, (*size, 3), dtype=np.uint8))
            record["image"] = f"{i}.png"
        records.append(record)
    manifest = folder / "manifest.jsonl"
    manifest.write_text("".join(json.dumps(record) + "\n" for record in records))
    return manifest


def run_group(configs: Sequence[TokenizationConfig]) -> None:
    """Lead a process group of its own in which every worker is a process."""
    os.setsid()
    torch.set_num_threads(1)
    workers = [FORK.Process(target=tokenize, args=(config,)) for config in configs]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    sys.exit(any(worker.exitcode for worker in workers))


def start(configs: Sequence[TokenizationConfig]) -> Any:
    """Start a process group."""
    process = FORK.Process(target=run_group, args=(configs,))
    process.start()
    while process.is_alive() and os.getpgid(process.pid or 0) != process.pid:
        time.sleep(0.001)
    return process


def contents(folder: Path) -> dict[str, bytes]:
    """The finished files of a dataset by name; a kill may leave temporary ones of the job's own lists."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".tmp"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def differences(found: dict[str, bytes], expected: dict[str, bytes]) -> list[str]:
    """Names of files that are missing, left over or different."""
    return sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))


def kill_until(
    kills: int, configs: Sequence[TokenizationConfig], expected: dict[str, bytes], longest: float, seed: int
) -> list[str]:
    """Kill a job `kills` times, each at most `longest` seconds after its start; lines about what differs."""
    output, generator = configs[0].output, random.Random(seed)
    wrong: list[str] = []
    done = jobs = 0
    while True:
        process = start(configs)
        process.join(generator.uniform(0, longest) if done < kills else None)
        if process.is_alive():
            os.killpg(process.pid, signal.SIGKILL)
            process.join()
            done += 1
            shards = len(list(output.glob("*.bin")))
            print(f"kill {done}: {shards} of {SHARDS} shards published", flush=True)
            if (output / "manifest.json").exists() and shards < SHARDS:
                wrong.append(f"kill {done}: a manifest with {shards} shards")
            continue
        jobs += 1
        if process.exitcode:
            return [*wrong, f"job {jobs} ended with exit code {process.exitcode}"]
        wrong += [f"job {jobs}: {name} differs" for name in differences(contents(output), expected)]
        if done >= kills:
            print(f"{done} kills of {len(configs)} workers in one group, {jobs} jobs brought to their end")
            return wrong
        shutil.rmtree(output)


def drill(folder: Path, kills: int, seed: int) -> list[str]:
    """Run everything in `folder`; lines about what does not hold."""
    tokenizers = write_tokenizers(folder)
    manifest = write_corpus(folder / "corpus")

    def config(output: str, worker: int = 0, num_workers: int = 1) -> TokenizationConfig:
        return TokenizationConfig(
            manifest=(manifest,),
            output=folder / output,
            name="data",
            image_area=64 * 64,
            num_shards=SHARDS,
            worker=worker,
            num_workers=num_workers,
            quarantine_budget=0.2,
            progress=False,
            **tokenizers,
        )

    begin = time.monotonic()
    alone = start([config("alone")])
    alone.join()
    seconds = time.monotonic() - begin
    expected = contents(folder / "alone")
    bad = len(expected["quarantine.jsonl"].splitlines())
    print(
        f"undisturbed: {SAMPLES} entries, {bad} of them bad, {len(expected)} files, {seconds:.0f} s",
        flush=True,
    )
    if alone.exitcode or "manifest.json" not in expected:
        return ["the undisturbed job did not come to its end"]
    wrong = kill_until(kills, [config("killed", i, 2) for i in range(2)], expected, seconds, seed)
    for workers in (2, 3):
        output = f"workers-{workers}"
        start([config(output, i, workers) for i in range(workers)]).join()
        found = contents(folder / output)
        wrong += [f"{workers} workers: {name} differs" for name in differences(found, expected)]
        print(f"{workers} workers: {len(found)} files compared", flush=True)
    return wrong


def main() -> int:
    """Run the drill and return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        wrong = drill(Path(temporary), arguments.kills, arguments.seed)
    print("\n".join(f"FAIL {line}" for line in wrong) or "pass: every file the same to the last byte")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
