"""Text corpora: the bytes of the shards depend on the input alone, whoever reads it and after any kill."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import multiprocessing
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from emu3_megatron.data import MultimodalDataset
from emu3_megatron.errors import UserError
from emu3_megatron.text import load_text_tokenizer
from emu3_megatron.tokenization import text_inputs, text_job
from emu3_megatron.tokenization.text_inputs import LinePart, cut
from emu3_megatron.tokenization.text_job import TextJobConfig, TextShards, tokenize_text
from tests.tokenization.conftest import Tokenizers, contents

MakeText = Callable[..., TextJobConfig]


@pytest.fixture(scope="module")
def texts() -> list[str]:
    generator = random.Random(0)
    words = "a small cat dog cup on the mat sea 一只小 猫 狗".split()  # noqa: SIM905
    return [" ".join(generator.choices(words, k=generator.randint(1, 60))) for _ in range(300)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> tuple[Path, ...]:
    """Documents as JSON Lines, compressed, and plain text; some lines blank, one without an end."""
    folder = tmp_path_factory.mktemp("text")
    lines = [
        json.dumps({"id": f"doc {i}", "text": text} if i % 3 else {"text": text}, ensure_ascii=False)
        for i, text in enumerate(texts[:200])
    ]
    (folder / "a.jsonl").write_text("\n\n".join(lines), encoding="utf-8")
    with gzip.open(folder / "b.jsonl.gz", "wt", encoding="utf-8") as stream:
        stream.writelines(json.dumps({"text": text}) + "\n" for text in texts[200:250])
    (folder / "c.txt").write_text("\n".join(texts[250:]) + "\n", encoding="utf-8")
    return tuple(folder / name for name in ("a.jsonl", "b.jsonl.gz", "c.txt"))


@pytest.fixture
def make_text(corpus: tuple[Path, ...], tokenizers: Tokenizers) -> MakeText:
    def make(output: Path, **settings: Any) -> TextJobConfig:
        defaults: dict[str, Any] = {
            "input": corpus,
            "text_tokenizer": tokenizers["text_tokenizer"],
            "vocabulary": "emu3",
            "name": "data",
            "shard_bytes": 4000,
            "progress": False,
        }
        return TextJobConfig(output=output, **{**defaults, **settings})

    return make


@pytest.mark.parametrize("seed", range(20))
def test_parts_of_any_size_hold_every_line_once(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = random.Random(seed)
    monkeypatch.setattr(text_inputs, "MAX_LINE_BYTES", 40)
    drawn = [b"x" * generator.choice([0, 1, 7, 39, 40, 100]) + b"\n" for _ in range(50)]
    data = b"".join(drawn)[: generator.choice([None, -1])]
    lines = data.splitlines(keepends=True)
    path = tmp_path / "a.jsonl"
    path.write_bytes(data)
    whole = list(LinePart(path, 0, len(data)).lines())
    assert [place for place, _ in whole] == [sum(map(len, lines[:i])) for i in range(len(lines))]
    assert [line for _, line in whole] == [line if len(line) <= 40 else None for line in lines]
    for size in (1, 3, 30, 200, 10_000):
        assert [line for part in cut([path], size) for line in part.lines()] == whole


def test_every_document_stands_in_the_dataset_in_order(
    tmp_path: Path, make_text: MakeText, texts: list[str], tokenizers: Tokenizers
) -> None:
    assert tokenize_text(make_text(tmp_path / "data"))
    dataset = MultimodalDataset.open(tmp_path / "data")
    tokenizer = load_text_tokenizer(tokenizers["text_tokenizer"])
    assert len(dataset) == len(texts)
    for number, text in enumerate(texts):
        ((ids, mode),) = dataset.document(number)
        assert mode == 0
        assert ids.tolist() == tokenizer.encode(text)
    manifest = json.loads((tmp_path / "data" / "manifest.json").read_text())
    assert manifest["provenance"]["documents"] == len(texts)
    assert len(list((tmp_path / "data").glob("*.bin"))) > 8


def test_workers_and_interruptions_give_the_same_bytes(
    tmp_path: Path, make_text: MakeText, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tokenize_text(make_text(tmp_path / "alone"))
    undisturbed = contents(tmp_path / "alone")
    shared = [make_text(tmp_path / "shared", worker=i, num_workers=3) for i in range(3)]
    assert [tokenize_text(config) for config in shared[::-1]] == [False, False, True]
    assert contents(tmp_path / "shared") == undisturbed

    config = make_text(tmp_path / "interrupted")
    original, calls = TextShards.make, 0

    def breaks(self: TextShards, *arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:
            encode = self.dialect.encode_texts
            left = [3]

            def stops(texts: Any) -> Any:
                left[0] -= 1
                if not left[0]:
                    raise KeyboardInterrupt
                return encode(texts)

            monkeypatch.setattr(self.dialect, "encode_texts", stops, raising=False)
            monkeypatch.setattr(text_job, "BATCH_DOCUMENTS", 4)
        return original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(TextShards, "make", breaks)
        with pytest.raises(KeyboardInterrupt):
            tokenize_text(config)
    made = contents(tmp_path / "interrupted")
    assert "data-00002" in "".join(made)
    assert "data-00003" not in "".join(made)
    assert "manifest.json" not in made
    monkeypatch.undo()
    assert tokenize_text(config)
    assert contents(tmp_path / "interrupted") == undisturbed


def test_kills_at_any_moment_leave_no_trace(tmp_path: Path, make_text: MakeText) -> None:
    begin = time.perf_counter()
    assert tokenize_text(make_text(tmp_path / "alone"))
    seconds = time.perf_counter() - begin
    config = make_text(tmp_path / "killed")
    generator, kills = random.Random(0), 0
    for _ in range(8):
        process = multiprocessing.get_context("fork").Process(target=tokenize_text, args=(config,))
        process.start()
        process.join(generator.uniform(0, seconds / 2))
        kills += process.is_alive()
        process.kill()
        process.join()
    assert kills
    assert tokenize_text(config)
    left = {name: data for name, data in contents(config.output).items() if not name.endswith(".tmp")}
    assert not any(p.name.startswith(".data-") for p in config.output.rglob("*"))
    assert left == contents(tmp_path / "alone")


def test_parquet_gives_the_documents_of_the_same_lines(
    tmp_path: Path, make_text: MakeText, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_inputs, "PARQUET_ROWS", 7)
    names = [f"d{i}" for i in range(len(texts))]
    records = [{"id": name, "text": text} for name, text in zip(names, texts, strict=True)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    table = pyarrow.table({"id": names, "other": [1] * len(texts), "text": texts})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=40, compression="zstd")
    assert tokenize_text(make_text(tmp_path / "rows", input=(tmp_path / "a.parquet",), shard_bytes=9000))
    assert tokenize_text(make_text(tmp_path / "lines", input=(tmp_path / "a.jsonl",), shard_bytes=1 << 20))
    rows, lines = (MultimodalDataset.open(tmp_path / name) for name in ("rows", "lines"))
    assert len(list((tmp_path / "rows").glob("*.bin"))) > 2
    assert len(rows) == len(lines) == len(texts)
    for number in range(len(texts)):
        assert rows.name(number) == lines.name(number)
        assert rows.document(number)[0][0].tolist() == lines.document(number)[0][0].tolist()


def test_bad_rows_of_parquet_are_listed_and_bad_files_named(tmp_path: Path, make_text: MakeText) -> None:
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"text": ["a cat", None, " ", "a dog"]})
    pyarrow.parquet.write_table(table, path, row_group_size=2)
    assert tokenize_text(make_text(tmp_path / "data", input=(path,), shard_bytes=1, quarantine_budget=0.5))
    listed = [json.loads(line) for line in (tmp_path / "data" / "quarantine.jsonl").read_text().splitlines()]
    assert [row["id"] for row in listed] == ["a.parquet:1", "a.parquet:2"]
    with pytest.raises(UserError, match="no column 'body', only text"):
        tokenize_text(make_text(tmp_path / "key", input=(path,), key="body"))
    (tmp_path / "b.parquet").write_bytes(path.read_bytes()[:-30])
    with pytest.raises(UserError, match=r"b\.parquet: cannot be read as Parquet"):
        tokenize_text(make_text(tmp_path / "cut", input=(tmp_path / "b.parquet",)))


@pytest.mark.parametrize(("longest", "encoded"), [(1000, False), (1000, True), (5000, False)])
def test_rows_that_are_no_text_or_too_long_cost_only_themselves(
    tmp_path: Path, make_text: MakeText, monkeypatch: pytest.MonkeyPatch, longest: int, encoded: bool
) -> None:
    monkeypatch.setattr(text_inputs, "MAX_LINE_BYTES", longest)
    names = pyarrow.array([b"a", b"b", b"\xff", b"d", None, b"f" * 500]).view(pyarrow.string())
    rows = [b"a cat", b"\xff", b"a dog", b"a" * 1001, b"a cup", b"b" * 501]
    texts = pyarrow.array(rows).view(pyarrow.string())
    table = pyarrow.table({"id": names, "text": texts.dictionary_encode() if encoded else texts})
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(table, path)
    assert tokenize_text(make_text(tmp_path / "data", input=(path,), quarantine_budget=0.7))
    listed = [json.loads(line) for line in (tmp_path / "data" / "quarantine.jsonl").read_text().splitlines()]
    expected = {1: "is not UTF-8", 2: "is not UTF-8"}
    if longest < 1001:
        expected.update(dict.fromkeys((3, 5), f"is longer than {longest} bytes"))
    assert [row["id"] for row in listed] == [f"a.parquet:{row}" for row in expected]
    assert [row["reason"].partition(":")[0] for row in listed] == list(expected.values())
    kept = MultimodalDataset.open(tmp_path / "data")
    good = [("a", "b", "", "d", "a.parquet:4", "f" * 500)[row] for row in range(6) if row not in expected]
    assert [kept.name(number)["id"] for number in range(len(kept))] == good


@pytest.mark.slow
def test_many_processes_give_the_same_bytes(tmp_path: Path, make_text: MakeText) -> None:
    assert tokenize_text(make_text(tmp_path / "alone"))
    assert tokenize_text(make_text(tmp_path / "many", processes=2))
    assert contents(tmp_path / "many") == contents(tmp_path / "alone")


def test_bad_lines_are_listed_and_the_rest_is_kept(tmp_path: Path, make_text: MakeText) -> None:
    path = tmp_path / "bad.jsonl"
    good = b'{"text": "a cat"}\n'
    bad = [b"{broken\n", b"[1]\n", b"{}\n", b'{"text": 5}\n', b'{"text": " "}\n', b'{"text": "\xff"}\n']
    path.write_bytes(b"".join(line + good for line in bad))
    config = make_text(tmp_path / "data", input=(path,), shard_bytes=60, quarantine_budget=0.5)
    assert tokenize_text(config)
    listed = [json.loads(line) for line in (tmp_path / "data" / "quarantine.jsonl").read_text().splitlines()]
    places = [path.read_bytes().index(line) for line in bad]
    assert [row["id"] for row in listed] == [f"bad.jsonl:{place}" for place in places]
    assert all(row["reason"] for row in listed)
    assert len(MultimodalDataset.open(tmp_path / "data")) == len(bad)
    with pytest.raises(UserError, match=r"6 of 12 lines.*quarantine_budget"):
        tokenize_text(make_text(tmp_path / "strict", input=(path,), quarantine_budget=0.4))
    assert not (tmp_path / "strict" / "manifest.json").exists()
    with pytest.raises(UserError, match=r"has a .body. that is not a string"):
        tokenize_text(make_text(tmp_path / "key", key="body"))


def zstd(data: bytes) -> bytes:
    stream = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(stream, "zstd") as packed:
        packed.write(data)
    return bytes(stream.getvalue())


PACKERS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstd}


@pytest.mark.parametrize("suffix", PACKERS)
def test_compressed_files_give_the_documents_of_the_plain_ones(
    tmp_path: Path, make_text: MakeText, texts: list[str], suffix: str
) -> None:
    """In one piece, in several, and as plain text."""
    half = [
        "".join(json.dumps({"text": text}) + "\n" for text in part).encode()
        for part in (texts[:150], texts[150:])
    ]
    pack = PACKERS[suffix]
    (tmp_path / f"a.jsonl.{suffix}").write_bytes(pack(half[0] + half[1]))
    (tmp_path / f"b.jsonl.{suffix}").write_bytes(pack(half[0]) + pack(half[1]))
    (tmp_path / f"c.txt.{suffix}").write_bytes(pack("\n".join(texts).encode()))
    for name in (f"a.jsonl.{suffix}", f"b.jsonl.{suffix}", f"c.txt.{suffix}"):
        (part,) = cut([tmp_path / name], 1000)
        assert [document.text for document in part.documents("text")] == texts, name


@pytest.mark.parametrize("suffix", [*PACKERS, "parquet"])
def test_damage_costs_what_follows_in_the_file_alone(
    tmp_path: Path, make_text: MakeText, suffix: str
) -> None:
    generator = random.Random(0)
    lines = [f"{generator.getrandbits(400):x}" for _ in range(3000)]
    data = "".join(json.dumps({"text": line}) + "\n" for line in lines).encode()
    names = ("a.jsonl", f"b.jsonl.{suffix}" if suffix in PACKERS else "b.parquet", "c.jsonl")
    for name in (names[0], names[2]):
        (tmp_path / name).write_text('{"text": "a cat"}\n' * 4000)
    path = tmp_path / names[1]
    if suffix in PACKERS:
        packed = PACKERS[suffix](data)
        path.write_bytes(packed[: len(packed) * 3 // 5])
    else:
        table = pyarrow.table({"text": lines})
        pyarrow.parquet.write_table(
            table, path, row_group_size=500, data_page_size=2000, use_dictionary=False
        )
        damaged = bytearray(path.read_bytes())
        middle = len(damaged) // 2
        damaged[middle : middle + 3000] = b"\xff" * 3000
        path.write_bytes(damaged)
    inputs = tuple(tmp_path / name for name in names)
    settings = {"input": inputs, "shard_bytes": 1 << 20}
    begin = time.perf_counter()
    with pytest.raises(UserError, match=rf"1 of 3 parts of the input are damaged.*{path.name}"):
        tokenize_text(make_text(tmp_path / "data", **settings))
    assert time.perf_counter() - begin < 9  # it is no passing fault, which is tried for 10.5 s
    assert tokenize_text(make_text(tmp_path / "data", quarantine_budget=0.4, **settings))
    (row,) = map(json.loads, (tmp_path / "data" / "quarantine.jsonl").read_text().splitlines())
    assert (row["path"], row["error"]) == (str(path), "DamagedInput")
    dataset = MultimodalDataset.open(tmp_path / "data")
    found = len(dataset) - 8000
    assert found < 3000
    assert found or suffix == "bz2"  # all of this is one block of bzip2
    tokenizer = load_text_tokenizer(make_text(tmp_path / "x").text_tokenizer)
    for number in (0, found - 1)[: 2 * found]:
        assert tokenizer.decode(dataset.document(4000 + number)[0][0].tolist()) == lines[number]


def test_what_does_not_fit_gives_one_clear_line(tmp_path: Path, make_text: MakeText) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a cat"}\n' * 1000)[:60])
    for settings, words in (
        ({"input": (tmp_path / "none.jsonl",)}, "cannot be read"),
        ({"input": (tmp_path / "empty.txt",)}, "nothing to tokenize"),
        ({"input": (tmp_path / "cut.jsonl.gz",)}, "is damaged"),
        ({"vocabulary": "auto"}, "--vocabulary"),
    ):
        with pytest.raises(UserError, match=words):
            tokenize_text(make_text(tmp_path / words.split()[0], **settings))
    for settings, words in (
        ({"processes": 0}, "processes=0"),
        ({"worker": 1}, "worker=1"),
        ({"quarantine_budget": 2.0}, "quarantine_budget"),
    ):
        with pytest.raises(UserError, match=words):
            make_text(tmp_path / "x", **settings)
    assert tokenize_text(make_text(tmp_path / "data"))
    with pytest.raises(UserError, match="shard_bytes"):
        tokenize_text(make_text(tmp_path / "data", shard_bytes=5000))
