"""The text corpus proof: 2 GB of JSON Lines within 1 GB of memory, at the tokenizer library's own speed.

``make prove NAME=text-corpus``; ``ARGS="--folder DIR"`` keeps the corpus and what is done, so that a run that
is cut off (``--seconds``) goes on where it stopped. Documents of 20 to a million characters, cut from the
sources and documents of this Python installation, are tokenized with Qwen's tokenizer by
`tools/tokenize_text.py`; the largest resident set of its processes is read while it runs. Then the speed, in
CPU seconds, alternately in one process: a part of the corpus by the job's own code (reading, JSON, checksums
and writing too) and by the tokenizer library's batch call on the texts alone, on one thread; with Qwen's
tokenizer and a SentencePiece model, on this corpus and on one of shorter documents. Exit code 0 only if all
hold.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from emu3_megatron.text import QwenTokenizer, SentencePieceTokenizer, load_text_tokenizer
from emu3_megatron.text.sentence_piece import train_sentencepiece
from emu3_megatron.tokenization.text_inputs import LinePart
from emu3_megatron.tokenization.text_job import TextJobConfig, TextShards
from emu3_megatron.vocabulary import Vocabulary

LIMIT_BYTES = 10**9
LEAST_SHARE = 0.9
SUFFIXES = (".py", ".md", ".rst", ".txt")
POOL_CHARACTERS = 40_000_000
LONG, SHORT = 7.6, 6.1
"""Logarithm of the median length: 2,000 and 450 characters; the means are 4,100 and 920."""


def tokenizer_file() -> Path:
    """Qwen's ranks, from the registry package `dashscope`, a test dependency."""
    spec = find_spec("dashscope")
    if spec is None or spec.origin is None:
        raise SystemExit("install the test extras: dashscope holds Qwen's ranks file")
    return Path(spec.origin).parent / "resources" / "qwen.tiktoken"


def text_pool() -> str:
    """Text of this installation, up to `POOL_CHARACTERS`."""
    pieces: list[str] = []
    left = POOL_CHARACTERS
    for root in (sysconfig.get_paths()["stdlib"], sysconfig.get_paths()["purelib"]):
        for path in sorted(Path(root).rglob("*")):
            if left > 0 and path.suffix in SUFFIXES and path.is_file():
                pieces.append(path.read_text(encoding="utf-8", errors="replace"))
                left -= len(pieces[-1])
    return "".join(pieces)


def write_corpus(path: Path, size: int, length_log: float) -> None:
    """Documents of random places and lengths, until the file has `size` bytes."""
    pool, generator, written = text_pool(), random.Random(0), 0
    temporary = path.with_suffix(".part")
    with open(temporary, "wb", buffering=1 << 20) as stream:
        number = 0
        while written < size:
            length = min(1_000_000, 20 + int(generator.lognormvariate(length_log, 1.2)))
            start = generator.randrange(len(pool) - length)
            record = {"id": f"document {number}", "text": pool[start : start + length]}
            written += stream.write(json.dumps(record, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
            number += 1
    temporary.rename(path)
    print(f"{path}: {written / 1e9:.2f} GB, {number} documents", flush=True)


def tokenize(corpus: Path, output: Path, shard_bytes: int, seconds: float) -> tuple[bool, int]:
    """Run the tool for at most `seconds`.

    Returns:
        Whether the dataset is complete, and the largest resident set of its processes in bytes.
    """
    command = [sys.executable, str(ROOT / "tools" / "tokenize_text.py"), "--input", f"[{corpus}]"]
    command += ["--output", str(output), "--text_tokenizer", str(tokenizer_file()), "--vocabulary", "emu3"]
    command += ["--processes", "2", "--shard_bytes", str(shard_bytes), "--progress", "false"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = psutil.Popen(command, env=environment)
    deadline, largest = time.monotonic() + seconds, 0
    while process.poll() is None:
        try:
            family = [process, *process.children(recursive=True)]
            largest = max(largest, *(one.memory_info().rss for one in family))
        except psutil.NoSuchProcess:
            pass
        if time.monotonic() > deadline:
            for one in (*process.children(recursive=True), process):
                one.kill()
        time.sleep(0.05)
    return (output / "manifest.json").exists(), largest


def library_batch(tokenizer: Path) -> Callable[[list[str]], list[list[int]]]:
    """The library's own batch call, on one thread."""
    loaded = load_text_tokenizer(tokenizer)
    if isinstance(loaded, QwenTokenizer):
        return lambda texts: loaded._encoding.encode_ordinary_batch(texts, num_threads=1)
    assert isinstance(loaded, SentencePieceTokenizer)
    return lambda texts: loaded._processor.encode(texts, num_threads=1)


def speed(corpus: Path, folder: Path, tokenizer: Path, rounds: int, part_bytes: int) -> float:
    """Median over rounds of the library's CPU time over the job's, for the same texts."""
    config = TextJobConfig(input=(corpus,), output=folder, text_tokenizer=tokenizer, vocabulary="emu3")
    shards = TextShards(config, Vocabulary.preset("emu3"))
    library = library_batch(tokenizer)
    ratios: list[float] = []
    for number in range(rounds):
        part = LinePart(corpus, number * part_bytes, (number + 1) * part_bytes)
        texts = [document.text for document in part.documents("text")]
        begin = time.process_time()
        tokens = sum(map(len, library(texts)))
        middle = time.process_time()
        report = shards.make(number, rounds, part)
        end = time.process_time()
        ratios.append((middle - begin) / (end - middle))
        print(
            f"round {number + 1}: library {part_bytes / (middle - begin) / 1e6:.2f} MB/s a core, job "
            f"{part_bytes / (end - middle) / 1e6:.2f}: {ratios[-1]:.1%}; {tokens} and {report.tokens} tokens",
            flush=True,
        )
    return statistics.median(ratios)


def compare(folder: Path, corpus: Path, rounds: int, part_bytes: int) -> list[str]:
    """Compare the speeds of two tokenizers on long and short documents; lines about those too slow."""
    short, model = folder / "short.jsonl", folder / "pieces.model"
    if not short.exists():
        write_corpus(short, (rounds + 1) * part_bytes, SHORT)
    if not model.exists():
        train_sentencepiece([text_pool()[:1_500_000]], model, 8000)
    wrong: list[str] = []
    for tokenizer in (tokenizer_file(), model):
        for texts in (corpus, short):
            name = f"{tokenizer.stem} on {texts.stem}"
            share = speed(texts, folder / "speed", tokenizer, rounds, part_bytes)
            print(f"{name}: the job reaches {share:.1%} of the library's own batch speed (median)")
            if share < LEAST_SHARE:
                wrong.append(f"{name}: {share:.1%} is less than {LEAST_SHARE:.0%}")
    return wrong


def prove(folder: Path, arguments: argparse.Namespace) -> list[str]:
    """Run everything in `folder`; lines about what does not hold."""
    folder.mkdir(parents=True, exist_ok=True)
    corpus, seen = folder / "corpus.jsonl", folder / "largest"
    if not corpus.exists():
        write_corpus(corpus, int(arguments.gigabytes * 1e9), LONG)
    wrong: list[str] = []
    if arguments.rounds:
        wrong += compare(folder, corpus, arguments.rounds, int(arguments.part * 1e6))
    if arguments.seconds:
        done, largest = tokenize(corpus, folder / "data", arguments.shard_bytes, arguments.seconds)
        largest = max(largest, int(seen.read_text()) if seen.exists() else 0)
        seen.write_text(str(largest))
        shards = len(list((folder / "data").glob("*.bin")))
        state = "complete" if done else "cut off, run again to go on"
        print(f"{shards} shards, {state}; largest resident set of a process {largest / 1e6:.0f} MB")
        if not done:
            wrong.append("the corpus is not tokenized to its end")
        if largest > LIMIT_BYTES:
            wrong.append(f"{largest} bytes are more than {LIMIT_BYTES}")
    return wrong


def main() -> int:
    """Run the proof and return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="keeps the corpus and the shards")
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--shard-bytes", type=int, default=1 << 24)
    parser.add_argument("--seconds", type=float, default=7200.0, help="for the corpus; 0 leaves it out")
    parser.add_argument("--rounds", type=int, default=5, help="of the comparison; 0 leaves it out")
    parser.add_argument("--part", type=float, default=16.0, help="megabytes of a round")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        wrong = prove(arguments.folder or Path(temporary), arguments)
    print("\n".join(f"FAIL {line}" for line in wrong) or "pass")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
