"""The plan of a mixture of a trillion tokens in 1,000 shards opens, and gives any window, at once.

``make prove NAME=plan-scale`` writes texts of about 20,000 tokens as shards whose tokens are holes in files
(they take no disk), builds an epoch of the plan ahead, and then, each in a fresh process, opens the plan and
reads the window at a random place. Passes if the median takes less than 2 s and the largest process less than
1 GB.
``ARGS="--tokens 1e9 --shards 10"`` makes it small.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from emu3_megatron.data import Mixture, Plan, Source, write_manifest
from emu3_megatron.data.format import TEXT_MODE, checksum_bytes, crc32c, index_bytes, shard_stem
from emu3_megatron.vocabulary import Vocabulary

ROOT = Path(__file__).resolve().parents[2]
VOCABULARY = Vocabulary.preset("tiny")
CONTEXT_LENGTH = 131_072
LENGTHS = tuple(range(12_000, 28_001, 1000))
DIFFERENT_SHARDS = 16
"""The others repeat their lengths."""
SECONDS, BYTES = 2.0, 1e9

OPEN = """
import json, sys, time
started = time.perf_counter()
from tests.proofs.plan_scale import open_plan
plan = open_plan(sys.argv[1])
window = plan.window(int(sys.argv[2]))
assert int(window.length.sum()) > 0
seconds = time.perf_counter() - started
# Not ru_maxrss, which counts what the parent had when it forked.
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps([seconds, int(peak.split()[1]) * 1024, time.process_time()]))
"""


def shard_files(documents: int, seed: int) -> tuple[dict[str, bytes], dict[str, Any]]:
    """A shard's files by suffix, all but the ``.bin``, and its record but for the names."""
    lengths = np.random.default_rng(seed).choice(LENGTHS, documents).astype(np.int32)
    modes = np.full(documents, TEXT_MODE, dtype=np.int8)
    index = index_bytes(lengths, modes, np.arange(documents + 1, dtype=np.int64))
    checksum_of = np.zeros(max(LENGTHS) + 1, dtype=np.uint32)
    checksum_of[list(LENGTHS)] = [crc32c(bytes(4 * length)) for length in LENGTHS]
    files = {".idx": index, ".crc": checksum_bytes(index, checksum_of[lengths]), ".jsonl": b""}
    tokens = int(lengths.sum(dtype=np.int64))
    sizes = {".bin": 4 * tokens, **{suffix: len(data) for suffix, data in files.items()}}
    return files, {
        "vocabulary_fingerprint": VOCABULARY.fingerprint,
        "documents": documents,
        "sequences": documents,
        "tokens": tokens,
        "text_tokens": tokens,
        "longest_document": int(lengths.max()),
        "files": {suffix: {"bytes": count, "sha256": "0" * 64} for suffix, count in sizes.items()},
    }


def write_shards(folder: Path, tokens: float, shards: int) -> int:
    """Shards whose every token is 0, their ``.bin`` a hole; returns the number of documents."""
    each = max(1, round(tokens / shards / np.mean(LENGTHS)))
    different = [shard_files(each, seed) for seed in range(min(shards, DIFFERENT_SHARDS))]
    for shard in range(shards):
        files, record = different[shard % len(different)]
        stem = folder / shard_stem("scale", shard, shards)
        for suffix, data in files.items():
            Path(f"{stem}{suffix}").write_bytes(data)
        with open(f"{stem}.bin", "wb") as stream:
            stream.truncate(record["files"][".bin"]["bytes"])
        Path(f"{stem}.json").write_text(json.dumps({"shard": stem.name, **record}))
    write_manifest(folder, "scale", shards, vocabulary=VOCABULARY)
    return each * shards


def open_plan(folder: str) -> Plan:
    """The plan, as a run would open it."""
    mixture = Mixture([Source(path=folder)])
    return Plan(mixture, seed=1, context_length=CONTEXT_LENGTH, fill=True, cache=Path(folder) / "plan")


def prove(folder: Path, tokens: float, shards: int, tries: int) -> tuple[float, float]:
    """Median seconds and largest memory of opening the plan and reading one window."""
    documents = write_shards(folder, tokens, shards)
    started = time.perf_counter()
    plan = open_plan(str(folder))
    opened = time.perf_counter() - started
    windows = plan.windows_before(-(-documents // plan.block_draws))
    built = time.perf_counter() - started - opened
    print(
        f"{documents:,} documents in {shards:,} shards; measured in {opened:.1f} s, an epoch of {windows:,} "
        f"windows planned in {built:.1f} s ({documents / built / 1e6:.2f} M documents/s)"
    )
    results = []
    for index in np.random.default_rng(0).integers(0, windows, tries).tolist():
        command = [sys.executable, "-c", OPEN, str(folder), str(index)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        results.append(json.loads(done.stdout))
        seconds, memory, busy = results[-1]
        print(f"window {index:,}: {seconds:.2f} s ({busy:.2f} s of CPU), {memory / 1e6:.0f} MB")
    return statistics.median(result[0] for result in results), max(result[1] for result in results)


def main() -> int:
    """Run, print the verdict, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tokens", type=float, default=1e12)
    parser.add_argument("--shards", type=int, default=1000)
    parser.add_argument("--tries", type=int, default=5)
    parser.add_argument("--folder", help="where to write about 4 GB; a temporary folder by default")
    arguments = parser.parse_args()
    if arguments.folder:
        Path(arguments.folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        seconds, memory = prove(Path(name), arguments.tokens, arguments.shards, arguments.tries)
    passed = seconds < SECONDS and memory < BYTES
    print(
        f"{'pass' if passed else 'FAIL'}: {seconds:.2f} s, below {SECONDS:g}; {memory / 1e6:.0f} MB, below "
        f"{BYTES / 1e6:.0f}"
    )
    return int(not passed)


if __name__ == "__main__":
    sys.exit(main())
