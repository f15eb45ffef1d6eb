"""The conversion proof: an Emu3-sized checkpoint goes both ways in little memory, near the speed of a copy.

``make prove NAME=conversion_8b``: random bf16 weights of the released shape (8.49 billion parameters, 17 GB)
are written in shards, imported, exported in the released layout, and compared with what they were made from,
each in a process of its own. Peak anonymous memory stays under 6 GB and under three times the largest tensor
plus 500 MB; each way takes at most 1 / 0.6 of the time that a copy of the files it reads takes, by the
medians of ``--rounds`` alternating measurements. A copy makes its files durable as a conversion does, and
both begin with nothing of what they read in the page cache. Needs three times the size of the checkpoint on
the disk.

``--folder F --only generate`` (then ``import``, then ``export``) does it in pieces. ``--hidden 1280
--layers 32`` is a seventh of it. Exit code 0 only if all holds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np
import torch

from emu3_megatron.conversion import configuration
from emu3_megatron.conversion.lazy import LazyTensors
from emu3_megatron.conversion.maps import LAYOUTS, WeightMap
from emu3_megatron.conversion.tensor_files import write_tensors
from emu3_megatron.model import ModelConfig
from emu3_megatron.vocabulary import Vocabulary

LARGEST_ANONYMOUS = 6e9
SLOWEST = 0.6
POOL, WINDOW = 1 << 25, 1 << 19
"""Random numbers that there are, and numbers that follow one another as they do there."""
TOOL = ROOT / "tools" / "convert_checkpoint.py"


class RandomTensors(LazyTensors):
    """bf16 tensors that depend on their names alone: random signs and fractions, sizes of 2^-6 to 2^-5.

    Their numbers are windows at random places of one pool of random numbers, which takes the time of a write.
    """

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self._shapes = shapes
        bits = np.random.default_rng(0).integers(0, 1 << 16, POOL, np.uint16) & 0x807F | 0x3C80
        self._pool = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)

    def __getitem__(self, name: str) -> torch.Tensor:
        """Draw one tensor."""
        return torch.cat(list(self.blocks(name))).view(self._shapes[name])

    def blocks(self, name: str) -> Iterator[torch.Tensor]:
        """Draw one tensor, a window at a time."""
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
        places = np.random.default_rng(seed)
        left = torch.Size(self._shapes[name]).numel()
        while left:
            count, place = min(left, WINDOW), int(places.integers(0, POOL - WINDOW))
            yield self._pool[place : place + count]
            left -= count

    def __iter__(self) -> Iterator[str]:
        """Names."""
        return iter(self._shapes)

    def __len__(self) -> int:
        """Number of tensors."""
        return len(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        """bf16."""
        return torch.bfloat16


def write_source(folder: Path, hidden: int, layers: int, shard_bytes: int) -> int:
    """A folder in the released layout; bytes of its largest tensor."""
    config = ModelConfig(
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=hidden * 7 // 2,
        num_attention_heads=hidden // 128,
        num_query_groups=max(1, hidden // 512),
    )
    vocabulary = Vocabulary.preset("emu3")
    rules = WeightMap(configuration.architecture(config, vocabulary), LAYOUTS["emu3"])
    sizes = rules.sizes
    shapes = {
        name: shape
        for rule, _, names in rules.rules()
        for name, shape in zip(names, rule.their_shapes(sizes), strict=True)
    }
    folder.mkdir()
    tensors = RandomTensors(shapes)
    write_tensors(folder, tensors, shard_bytes=shard_bytes)
    values = configuration.released_config(config, vocabulary, dtype="bfloat16")
    (folder / "config.json").write_text(json.dumps(values))
    return max(tensors.nbytes(name) for name in tensors)


def copy(source: Path, target: Path) -> float:
    """Seconds to copy the files of a folder to the disk."""
    forget(source)
    target.mkdir()
    start = time.monotonic()
    for path in files(source):
        shutil.copyfile(path, target / path.name)
        with open(target / path.name, "rb") as stream:
            os.fsync(stream.fileno())
    seconds = time.monotonic() - start
    shutil.rmtree(target)
    return seconds


def files(folder: Path) -> list[Path]:
    """The files that stand in a folder."""
    return sorted(path for path in folder.iterdir() if path.is_file())


def forget(folder: Path) -> None:
    """Take the files of a folder out of the page cache."""
    for path in files(folder):
        with open(path, "rb") as stream:
            os.fsync(stream.fileno())  # only what is on the disk can be forgotten
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def convert(*arguments: object) -> tuple[float, float, int]:
    """Seconds of a conversion, its start included, those of its CPU time, and its peak anonymous bytes."""
    start, before, peak = time.monotonic(), children(), 0
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}) as process:
        while process.poll() is None:
            peak = max(peak, anonymous(process.pid))
            time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return time.monotonic() - start, children() - before, peak


def children() -> float:
    """CPU seconds of the processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def anonymous(pid: int) -> int:
    """Anonymous resident bytes of a process; 0 once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)


def main() -> int:
    """Generate, convert both ways with a copy before each, compare, judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--shard-bytes", type=int, default=5_000_000_000)
    parser.add_argument("--rounds", type=int, default=3, help="measurements of every rate")
    parser.add_argument("--folder", type=Path, help="where to work; default: a temporary folder")
    parser.add_argument("--only", choices=("generate", "import", "export"), help="one piece, in --folder")
    parser.add_argument("--no-rate", action="store_true", help="judge memory and equality only")
    options = parser.parse_args()
    if options.only:
        if options.folder is None:
            parser.error("--only needs --folder, where the pieces find one another")
        options.folder.mkdir(parents=True, exist_ok=True)
        return prove(options.folder, options)
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="conversion-") as made:
        return prove(Path(made), options)


def prove(folder: Path, options: argparse.Namespace) -> int:
    """Run it, or a piece of it, in `folder`; 0 if all holds."""
    held = True
    if options.only in (None, "generate"):
        largest = write_source(folder / "hf", options.hidden, options.layers, options.shard_bytes)
        size = sum(path.stat().st_size for path in files(folder / "hf"))
        limit = min(LARGEST_ANONYMOUS, 3 * largest + 500e6)
        (folder / "limit").write_text(str(limit))
        print(f"source: {size / 1e9:.2f} GB, largest {largest / 1e9:.3f} GB; limit {limit / 1e9:.2f} GB")
    if options.only in (None, "import"):
        held &= measure("import", folder / "hf", folder / "hf", folder / "run", options)
        verify(folder / "hf", folder / "run")
        shutil.rmtree(folder / "hf")  # the run is equal to it
    if options.only in (None, "export"):
        (checkpoint,) = (folder / "run" / "checkpoints").glob("step-*")
        held &= measure("export", checkpoint, folder / "run", folder / "back", options)
        verify(folder / "run", folder / "back")
    print("all holds" if held else "not all holds")
    return 0 if held else 1


def measure(name: str, read: Path, source: Path, output: Path, options: argparse.Namespace) -> bool:
    """One way, several times, with a copy of what it reads before each; whether memory and rate hold."""
    copies, conversions, peaks = [], [], []
    layout = ("--layout", "emu3") if name == "export" else ()
    for _ in range(1 if options.no_rate else options.rounds):
        shutil.rmtree(output, ignore_errors=True)
        if not options.no_rate:
            before = time.process_time()
            copies.append(copy(read, output.parent / "copy"))
            print(f"copy: {copies[-1]:.1f} s, {time.process_time() - before:.1f} s of CPU")
        forget(read)
        seconds, cpu, peak = convert(name, "--source", source, "--output", output, *layout)
        conversions.append(seconds)
        peaks.append(peak)
        print(f"{name}: {seconds:.1f} s, {cpu:.1f} s of CPU, peak anonymous {peak / 1e9:.2f} GB")
    held = max(peaks) < float((output.parent / "limit").read_text())
    if options.no_rate:
        return held
    copying, converting = statistics.median(copies), statistics.median(conversions)
    rate = copying / converting
    print(f"{name}: {rate:.0%} of a copy's rate (medians {copying:.1f} and {converting:.1f} s)")
    return held and rate >= SLOWEST


def verify(first: Path, second: Path) -> None:
    """Bit by bit; ends the proof where they differ."""
    subprocess.run([sys.executable, str(TOOL), "verify", str(first), str(second)], check=True)


if __name__ == "__main__":
    sys.exit(main())
