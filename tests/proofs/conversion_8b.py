"""The conversion proof: an Emu3-sized checkpoint goes both ways in little memory, near the speed of a copy.

``make prove NAME=conversion_8b``: random bf16 weights of the released shape (8.49 billion parameters, 17 GB)
are written in shards, imported, exported in the released layout, and compared with the source, each in a
process of its own. Peak anonymous memory stays under 6 GB and under three times the largest tensor plus
500 MB; each way takes at most 1 / 0.6 of the time that copying the same files takes. Needs four times the
size of the checkpoint on the disk. ``--hidden 1280 --layers 32`` is a seventh of it. Exit code 0 only if all
holds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from emu3_megatron.conversion import configuration  # noqa: E402
from emu3_megatron.conversion.lazy import LazyTensors  # noqa: E402
from emu3_megatron.conversion.maps import LAYOUTS, WeightMap  # noqa: E402
from emu3_megatron.conversion.tensor_files import write_tensors  # noqa: E402
from emu3_megatron.model import ModelConfig  # noqa: E402
from emu3_megatron.vocabulary import Vocabulary  # noqa: E402

LARGEST_ANONYMOUS = 6e9
SLOWEST = 0.6
TOOL = ROOT / "tools" / "convert_checkpoint.py"


class RandomTensors(LazyTensors):
    """bf16 tensors that depend on their names alone."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self._shapes = shapes

    def __getitem__(self, name: str) -> torch.Tensor:
        """Draw one tensor."""
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
        generator = torch.Generator().manual_seed(seed)
        return torch.empty(self._shapes[name], dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)

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
    """Seconds to copy a folder's weights, to the disk."""
    target.mkdir()
    start = time.monotonic()
    for path in sorted(source.glob("*.safetensors")):
        shutil.copyfile(path, target / path.name)
        with open(target / path.name, "rb") as stream:
            os.fsync(stream.fileno())
    seconds = time.monotonic() - start
    shutil.rmtree(target)
    return seconds


def convert(*arguments: object) -> tuple[float, int]:
    """Seconds of a conversion, its start included, and its peak anonymous memory in bytes."""
    start, peak = time.monotonic(), 0
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}) as process:
        while process.poll() is None:
            peak = max(peak, anonymous(process.pid))
            time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return time.monotonic() - start, peak


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
    parser.add_argument("--folder", type=Path, help="where to work; default: a temporary folder")
    parser.add_argument("--no-rate", action="store_true", help="judge memory and equality only")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="conversion-") as made:
        return prove(Path(made), options)


def prove(folder: Path, options: argparse.Namespace) -> int:
    """Run it in `folder`; 0 if all holds."""
    largest = write_source(folder / "hf", options.hidden, options.layers, options.shard_bytes)
    size = sum(path.stat().st_size for path in (folder / "hf").glob("*.safetensors"))
    limit = min(LARGEST_ANONYMOUS, 3 * largest + 500e6)
    print(f"source: {size / 1e9:.2f} GB, largest tensor {largest / 1e9:.3f} GB; limit {limit / 1e9:.2f} GB")
    held = True
    steps = {
        "import": ("import", "--source", folder / "hf", "--output", folder / "run"),
        "export": ("export", "--source", folder / "run", "--output", folder / "back", "--layout", "emu3"),
    }
    for name, arguments in steps.items():
        copying = copy(folder / "hf", folder / "copy")
        seconds, peak = convert(*arguments)
        rate = copying / seconds
        print(f"{name}: {seconds:.1f} s, {rate:.0%} of a copy's rate; peak anonymous {peak / 1e9:.2f} GB")
        held &= peak < limit and (options.no_rate or rate >= SLOWEST)
    subprocess.run(
        [sys.executable, str(TOOL), "verify", str(folder / "hf"), str(folder / "back")], check=True
    )
    print("all holds" if held else "not all holds")
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
