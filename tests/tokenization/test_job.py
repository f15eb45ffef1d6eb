"""A job's bytes depend on its settings alone: not on workers, kills, or bad neighbours."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from emu3_megatron.data import MultimodalDataset
from emu3_megatron.errors import UserError
from emu3_megatron.grammar import Dialect, Image, Video
from emu3_megatron.media import Preprocessor, ResizeRule, decode_image
from emu3_megatron.text import load_text_tokenizer
from emu3_megatron.tokenization import (
    TokenizationConfig,
    TokenizationJob,
    choose_vocabulary,
    tokenize,
)
from emu3_megatron.vision import VisionTokenizer
from tests.media.bad_files import write_bad_corpus
from tests.media.clips import (
    CLIPS,
    cut_losslessly,
    encode_image,
    moving_picture,
)
from tests.tokenization.conftest import Tokenizers, contents

MakeConfig = Callable[..., TokenizationConfig]
ROOT = Path(__file__).resolve().parents[2]


def run_tool(config: TokenizationConfig, **popen: Any) -> subprocess.Popen[str]:
    """Start the command-line program with these settings."""
    arguments = [sys.executable, str(ROOT / "tools" / "tokenize_media.py"), "--no-progress"]
    for key, value in asdict(config).items():
        if key == "manifest":
            arguments += ["--manifest", *map(str, value)]
        elif key not in ("progress", "finalize") and value not in (None, ""):
            arguments += ["--" + key.replace("_", "-"), str(value)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        arguments, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **popen
    )


def test_documents_hold_the_codes_of_their_files(
    tmp_path: Path, corpus: Path, tokenizers: Tokenizers, make_config: MakeConfig
) -> None:
    assert tokenize(make_config(corpus, tmp_path / "data", num_shards=2))
    dataset = MultimodalDataset.open(tmp_path / "data")
    records = [json.loads(line) for line in corpus.read_text(encoding="utf-8").splitlines()]
    assert len(dataset) == len(records)
    vision = VisionTokenizer.from_pretrained(tokenizers["vision_tokenizer"])
    text = load_text_tokenizer(tokenizers["text_tokenizer"])
    dialect = Dialect.preset("emu3", choose_vocabulary("auto", text, vision), text)
    rule = ResizeRule(area=64 * 64)
    for index, record in enumerate(records):
        segments = dataset.document(index)
        words = record.get("caption", record.get("text"))
        if words is not None:
            ids, mode = segments.pop(0)
            assert mode == 0
            assert text.decode(ids.tolist()) == words
        if "text" in record:
            assert not segments
            continue
        ((ids, mode),) = segments
        assert mode == 1
        span = dialect.parse_span(ids)
        if "image" in record:
            picture = decode_image(corpus.parent / record["image"])
            (pixels,) = Preprocessor()([picture[None]], [rule.plan(*picture.shape[:2])])
            assert isinstance(span, Image)
            assert np.array_equal(span.codes, vision.encode(pixels)[0].numpy())
        else:
            assert isinstance(span, Video)
            assert len(span.codes) == 2
            assert span.seconds == pytest.approx(8 / span.fps, abs=1e-3)


def test_several_captions_of_a_picture_and_a_clip_are_stored(
    tmp_path: Path, corpus: Path, tokenizers: Tokenizers, make_config: MakeConfig
) -> None:
    """One span each; what the tokenizer leaves nothing of is left out, as a single caption is."""
    captions = ["a small cat", "一只小 cat", "a cat on the mat"]
    records = [
        {"id": "picture", "image": str(corpus.parent / "0.png"), "captions": captions},
        {"id": "clip", "video": str(corpus.parent / "0.mp4"), "captions": captions[1:]},
        {"id": "one", "image": str(corpus.parent / "0.png"), "captions": captions[:1]},
        {"id": "plain", "image": str(corpus.parent / "0.png"), "caption": captions[0]},
    ]
    manifest = tmp_path / "m.jsonl"
    manifest.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert tokenize(make_config(manifest, tmp_path / "data"))
    dataset = MultimodalDataset.open(tmp_path / "data")
    text = load_text_tokenizer(tokenizers["text_tokenizer"])
    documents = {dataset.sample_id(number): dataset.document(number) for number in range(4)}
    for name, expected in (("picture", captions), ("clip", captions[1:]), ("one", captions[:1])):
        *stored, (span, mode) = documents[name]
        assert [text.decode(ids.tolist()) for ids, _ in stored] == expected
        assert [each for _, each in stored] == [0, 3, 3][: len(expected)]
        assert (mode, span[0]) == (1, dataset.vocabulary.boi)
    for (ids, mode), (same, same_mode) in zip(documents["one"], documents["plain"], strict=True):
        assert np.array_equal(ids, same)
        assert mode == same_mode
    assert np.array_equal(documents["picture"][-1][0], documents["plain"][-1][0])


def test_a_split_that_no_entry_has_is_one_line(
    tmp_path: Path, tokenizers: Tokenizers, make_config: MakeConfig
) -> None:
    """And no dataset; the splits that there are stand in it."""
    records = [{"text": f"a cat {n}", **({"split": "texts"} if n else {})} for n in range(5)]
    manifest = tmp_path / "m.jsonl"
    manifest.write_text("".join(json.dumps(record) + "\n" for record in records))
    settings = {"num_shards": 2, "num_workers": 2}
    config = make_config(manifest, tmp_path / "data", split="images", **settings)
    assert not tokenize(config)
    with pytest.raises(UserError, match="split='images' gave no document") as raised:
        tokenize(make_config(manifest, tmp_path / "data", split="images", worker=1, **settings))
    assert "texts (4), none (1)" in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "data" / "manifest.json").exists()
    assert tokenize(make_config(manifest, tmp_path / "texts", split="texts", num_shards=2))
    assert len(MultimodalDataset.open(tmp_path / "texts")) == 4


def test_sizes_follow_the_pictures(tmp_path: Path, corpus: Path, make_config: MakeConfig) -> None:
    assert tokenize(make_config(corpus, tmp_path / "data"))
    manifest = json.loads((tmp_path / "data" / "manifest.json").read_text())
    assert manifest["provenance"]["images"] == 19
    assert manifest["provenance"]["clips"] == 9
    assert manifest["provenance"]["frames"] == 72
    assert manifest["provenance"]["texts"] == 8
    assert manifest["provenance"]["quarantined"] == 0
    assert (tmp_path / "data" / "quarantine.jsonl").read_bytes() == b""


@pytest.mark.parametrize("source", ["pyav", "auto"])
def test_a_part_of_a_video_gives_the_bytes_of_the_cut_file(
    tmp_path: Path, make_config: MakeConfig, source: str
) -> None:
    """`start` and `end`, as curation and captioning write them."""
    whole = CLIPS / "carphone_pristine.mp4"
    parts = {"a": (0.0, 1.0), "b": (1.0, 2.5), "c": (3.2, 4.0)}
    for place, (start, end) in parts.items():
        cut_losslessly(whole, tmp_path / f"{place}.mp4", start, end)
    rows = {
        "parts": [{"video": str(whole), "start": start, "end": end} for start, end in parts.values()],
        "files": [{"video": f"{place}.mp4"} for place in parts],
    }
    made = {}
    for name, records in rows.items():
        manifest = tmp_path / f"{name}.jsonl"
        lines = [{"id": str(i), **record} for i, record in enumerate(records)]
        manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
        assert tokenize(make_config(manifest, tmp_path / name, frame_source=source))
        made[name] = contents(tmp_path / name)
    assert made["parts"]["quarantine.jsonl"] == b""
    for suffix in (".bin", ".idx"):
        assert made["parts"][f"data-00000-of-00001{suffix}"] == made["files"][f"data-00000-of-00001{suffix}"]


@pytest.mark.parametrize("workers", [2, 3, 5])
def test_any_number_of_workers_gives_the_same_bytes(
    tmp_path: Path, corpus: Path, make_config: MakeConfig, undisturbed: dict[str, bytes], workers: int
) -> None:
    output = tmp_path / "data"
    order = list(range(workers))[::-1]
    complete = [
        tokenize(
            make_config(corpus, output, num_shards=4, worker=w, num_workers=workers, decode_threads=w + 1)
        )
        for w in order
    ]
    assert complete[-1]
    assert contents(output) == undisturbed


def test_shards_do_not_know_their_neighbours(
    tmp_path: Path, corpus: Path, make_config: MakeConfig, undisturbed: dict[str, bytes]
) -> None:
    """Only the third shard is made; it is the one of the whole job."""
    assert not tokenize(make_config(corpus, tmp_path / "data", num_shards=4, worker=2, num_workers=4))
    made = contents(tmp_path / "data")
    for suffix in (".bin", ".idx"):
        assert made[f"data-00002-of-00004{suffix}"] == undisturbed[f"data-00002-of-00004{suffix}"]
    assert "manifest.json" not in made


def test_a_second_run_writes_nothing_and_a_lost_shard_is_made_again(
    tmp_path: Path, corpus: Path, make_config: MakeConfig, undisturbed: dict[str, bytes]
) -> None:
    output, config = tmp_path / "data", make_config(corpus, tmp_path / "data", num_shards=4)
    assert tokenize(config)
    before = {p: p.stat().st_mtime_ns for p in output.glob("*.bin")}
    assert tokenize(config)
    assert {p: p.stat().st_mtime_ns for p in output.glob("*.bin")} == before
    (output / "data-00001-of-00004.bin").unlink()
    (output / "manifest.json").unlink()
    assert tokenize(config)
    assert contents(output) == undisturbed


@pytest.mark.slow
def test_kills_at_any_moment_leave_no_trace(
    tmp_path: Path, corpus: Path, make_config: MakeConfig, undisturbed: dict[str, bytes]
) -> None:
    output = tmp_path / "data"
    config = make_config(corpus, output, num_shards=4)
    for target in (1, 2, 3):  # killed while this shard is in hand
        process = run_tool(config, start_new_session=True)
        while process.poll() is None and not (output / f"data-{target - 1:05d}-of-00004.idx").exists():
            time.sleep(0.005)
        time.sleep(0.02 * target)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    process = run_tool(config)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    final = contents(output)
    for name in set(final) - set(undisturbed):  # a small file that was being written at a kill
        assert name.endswith(".tmp")
        assert not name.startswith(".data-")
        del final[name]
    assert final == undisturbed


def test_an_interrupted_shard_is_not_published(
    tmp_path: Path, corpus: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(corpus, tmp_path / "data", num_shards=4)
    original, calls = VisionTokenizer.encode, 0

    def breaks(self: VisionTokenizer, pixels: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return original(self, pixels)

    monkeypatch.setattr(VisionTokenizer, "encode", breaks)
    with pytest.raises(KeyboardInterrupt):
        tokenize(config)
    names = set(contents(tmp_path / "data"))
    assert not any(name.startswith("data-00003") or name.endswith(".tmp") for name in names)
    assert "manifest.json" not in names


def bad_corpus(folder: Path) -> tuple[Path, dict[str, str]]:
    """A manifest of good and bad entries in turn; the bad ones with a part of their reason."""
    long, picture = folder.with_name("long.png"), folder.with_name("picture.mp4")
    long.write_bytes(encode_image(np.zeros((10, 80, 3), np.uint8), "PNG"))
    picture.write_bytes(encode_image(moving_picture(1)[0], "PNG"))
    carphone = str(CLIPS / "carphone_pristine.mp4")
    further: dict[str, tuple[dict[str, Any], str]] = {
        "long": ({"image": str(long)}, "aspect ratio"),
        "picture as video": ({"video": str(picture)}, "too"),
        "part past the end": ({"video": carphone, "start": 60}, "no frame"),
        "part too short": ({"video": carphone, "start": 1, "end": 1.1}, "too few"),
        "part without sense": ({"video": carphone, "start": 2, "end": 1}, "start < end"),
        "caption alone": ({"caption": "c"}, "neither"),
        "nothing": ({}, "exactly one"),
        "blank text": ({"text": " "}, "must be a string"),
    }
    return write_bad_corpus(folder, further)


def test_bad_entries_are_set_aside_by_name_and_nothing_good_is_lost(
    tmp_path: Path, make_config: MakeConfig
) -> None:
    manifest, reasons = bad_corpus(tmp_path / "corpus")
    assert tokenize(make_config(manifest, tmp_path / "data", num_shards=2, quarantine_budget=0.5))
    quarantine = [
        json.loads(line) for line in (tmp_path / "data" / "quarantine.jsonl").read_text().splitlines()
    ]
    assert len(reasons) >= 30
    assert [entry["id"] for entry in quarantine] == list(reasons)
    for entry in quarantine:
        assert entry["reason"]
        assert reasons[entry["id"]] in entry["reason"]
        assert entry["error"] in ("MediaError", "EntryError")
    dataset = MultimodalDataset.open(tmp_path / "data")
    assert len(dataset) == len(reasons) + 1


def test_past_the_budget_the_job_fails_with_one_line(tmp_path: Path, make_config: MakeConfig) -> None:
    manifest, reasons = bad_corpus(tmp_path / "corpus")
    config = make_config(manifest, tmp_path / "data", quarantine_budget=0.4)
    process = run_tool(config)
    _, errors = process.communicate()
    assert process.returncode == 2
    lines = [line for line in errors.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert f"{len(reasons)} of {2 * len(reasons) + 1} entries cannot be used" in lines[0]
    assert "--quarantine-budget" in lines[0]
    assert not (tmp_path / "data" / "manifest.json").exists()
    assert tokenize(make_config(manifest, tmp_path / "data", quarantine_budget=0.5))


def test_other_settings_are_refused_in_the_same_folder(
    tmp_path: Path, corpus: Path, make_config: MakeConfig
) -> None:
    TokenizationJob(make_config(corpus, tmp_path / "data"))
    for change in (
        {"video_frames": 4},
        {"num_shards": 2},
        {"dialect": "emu3-frames"},
        {"image_area": 4096 * 4},
    ):
        with pytest.raises(UserError, match=next(iter(change))):
            TokenizationJob(make_config(corpus, tmp_path / "data", **change))
    for change in ({"quarantine_budget": 0.2}, {"worker": 1, "num_workers": 2}, {"decode_threads": 3}):
        TokenizationJob(make_config(corpus, tmp_path / "data", **change))
    corpus_too = tmp_path / "manifest.jsonl"
    corpus_too.write_text('{"text": "x"}\n')
    with pytest.raises(UserError, match="manifests"):
        TokenizationJob(make_config(corpus_too, tmp_path / "data"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"video_frames": 6}, "multiple of 4"),
        ({"worker": 2, "num_workers": 2}, "worker=2"),
        ({"num_shards": 0}, "num_shards=0"),
        ({"quarantine_budget": 2.0}, "quarantine_budget"),
        ({"precision": "fp8"}, "fp8"),
        ({"video_position": "end"}, "position"),
        ({"image_area": 3}, "area"),
        ({"frame_source": "opencv"}, "opencv"),
        ({"dialect": "latin"}, "latin"),
        ({"vocabulary": "tiny"}, "text"),
        ({"vocabulary": "emu9"}, "emu9"),
        ({"device": "abacus"}, "abacus"),
        ({"media_device": "gpu"}, "GPU"),
        ({"text_tokenizer": Path("none.model")}, "no such file"),
        ({"vision_tokenizer": None}, "--vocabulary"),
        ({"vision_tokenizer": None, "vocabulary": "emu3"}, "--vision-tokenizer"),
    ],
)
def test_settings_that_do_not_fit_give_one_clear_line(
    tmp_path: Path, corpus: Path, make_config: MakeConfig, change: dict[str, Any], words: str
) -> None:
    if change.get("media_device") == "gpu" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match=words) as caught:
        tokenize(make_config(corpus, tmp_path / "data", **change))
    assert "\n" not in str(caught.value)


def test_splits_and_plain_text_without_a_vision_tokenizer(tmp_path: Path, make_config: MakeConfig) -> None:
    manifest = tmp_path / "m.jsonl"
    lines = [
        {"id": str(i), "text": f"a cat {i}", "split": "held-out" if i % 3 else "train"} for i in range(9)
    ]
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = make_config(
        manifest, tmp_path / "data", split="train", vision_tokenizer=None, vocabulary="emu3", num_shards=4
    )
    assert tokenize(config)
    dataset = MultimodalDataset.open(tmp_path / "data")
    assert len(dataset) == 3
    provenance = json.loads((tmp_path / "data" / "manifest.json").read_text())["provenance"]
    assert (provenance["entries"], provenance["other_splits"]) == (3, 6)


def test_finalize_alone_names_what_is_missing(tmp_path: Path, corpus: Path, make_config: MakeConfig) -> None:
    output = tmp_path / "data"
    assert not tokenize(make_config(corpus, output, num_shards=2, num_workers=2))
    with pytest.raises(UserError, match=r"shards \[1\] of 2"):
        tokenize(make_config(corpus, output, num_shards=2, finalize=True))
    assert tokenize(make_config(corpus, output, num_shards=2, worker=1, num_workers=2))
    (output / "manifest.json").unlink()
    assert tokenize(make_config(corpus, output, num_shards=2, finalize=True))
    assert len(MultimodalDataset.open(output)) == 36


def test_bf16_runs(tmp_path: Path, corpus: Path, make_config: MakeConfig) -> None:
    assert tokenize(make_config(corpus, tmp_path / "data", precision="bf16"))
    assert len(MultimodalDataset.open(tmp_path / "data")) == 36


def test_stock_megatron_opens_the_shards(tmp_path: Path, corpus: Path, make_config: MakeConfig) -> None:
    assert tokenize(make_config(corpus, tmp_path / "data"))
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    stock = IndexedDataset(str(tmp_path / "data" / "data-00000-of-00001"), multimodal=True)
    ours = MultimodalDataset.open(tmp_path / "data")
    segments = [segment for i in range(len(ours)) for segment in ours.document(i)]
    assert len(stock) == len(segments)
    for (ids, mode), (expected, expected_mode) in zip(
        (stock[i] for i in range(len(stock))), segments, strict=True
    ):
        assert np.array_equal(ids, expected)
        assert mode == expected_mode
