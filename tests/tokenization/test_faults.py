"""Faults of the machine: they are tried again, cost no file its place, and stop no more than they must."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from emu3_megatron.errors import MachineFault
from emu3_megatron.tokenization import TokenizationConfig, retrying, tokenize
from emu3_megatron.tokenization import decode as decoding
from emu3_megatron.vision import VisionTokenizer
from tests.tokenization.conftest import contents

MakeConfig = Callable[..., TokenizationConfig]


def test_a_passing_fault_is_tried_again_and_never_quarantined(
    tmp_path: Path, corpus: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retrying, "RETRY_SECONDS", (0.0, 0.0))
    original, failures = decoding.decode_images, 0

    def flaky(media: Any) -> Any:
        nonlocal failures
        failures += 1
        if failures % 3:
            raise OSError(5, "Input/output error")
        return original(media)

    monkeypatch.setattr(decoding, "decode_images", flaky)
    assert tokenize(make_config(corpus, tmp_path / "data"))
    assert (tmp_path / "data" / "quarantine.jsonl").read_bytes() == b""

    def broken(media: Any) -> Any:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(decoding, "decode_images", broken)
    with pytest.raises(OSError, match="Input/output"):
        tokenize(make_config(corpus, tmp_path / "other"))
    assert not list((tmp_path / "other").glob("*.idx"))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
)
def test_want_of_memory_is_tried_again_and_then_one_line(
    tmp_path: Path,
    corpus: Path,
    make_config: MakeConfig,
    monkeypatch: pytest.MonkeyPatch,
    undisturbed: dict[str, bytes],
    error: Exception,
) -> None:
    monkeypatch.setattr(retrying, "RETRY_SECONDS", (0.0, 0.0))
    original, calls, shapes = VisionTokenizer.encode, 0, []

    def flaky(self: VisionTokenizer, pixels: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        shapes.append(pixels.shape)
        if calls in (1, 2, 4):
            raise error
        return original(self, pixels)

    monkeypatch.setattr(VisionTokenizer, "encode", flaky)
    assert tokenize(make_config(corpus, tmp_path / "data", num_shards=4))
    assert contents(tmp_path / "data") == undisturbed
    assert shapes[0] == shapes[1] == shapes[2]

    def full(self: VisionTokenizer, pixels: torch.Tensor) -> torch.Tensor:
        raise error

    monkeypatch.setattr(VisionTokenizer, "encode", full)
    with pytest.raises(MachineFault, match="--encode-pixels"):
        tokenize(make_config(corpus, tmp_path / "other"))
    assert not list((tmp_path / "other").glob("*.idx"))


def test_a_file_that_cannot_be_read_fails_its_shard_alone_and_is_named(
    tmp_path: Path,
    corpus: Path,
    make_config: MakeConfig,
    monkeypatch: pytest.MonkeyPatch,
    undisturbed: dict[str, bytes],
) -> None:
    """A bad sector in the first shard: the others are made, and the rest once the disk is mended."""
    monkeypatch.setattr(retrying, "RETRY_SECONDS", (0.0, 0.0))
    config = make_config(corpus, tmp_path / "data", num_shards=4)
    records = [json.loads(line) for line in corpus.read_text(encoding="utf-8").splitlines()]
    bad = [record for record in records if "text" not in record][1]
    name = bad.get("image", bad.get("video"))
    original = decoding._load

    def load(entry: Any) -> Any:
        if entry.media.path.name == name:
            raise OSError(5, "Input/output error")
        return original(entry)

    with monkeypatch.context() as patch:
        patch.setattr(decoding, "_load", load)
        with pytest.raises(OSError, match=rf"shards that could not be made: \[0\].*{name}"):
            tokenize(config)
    made = contents(tmp_path / "data")
    for shard in range(4):
        file = f"data-{shard:05d}-of-00004.bin"
        assert made.get(file) == (undisturbed[file] if shard else None)
    assert "manifest.json" not in made
    assert tokenize(config)
    assert contents(tmp_path / "data") == undisturbed


def test_a_full_disk_ends_a_worker_at_once_and_so_does_a_lost_one_soon(
    tmp_path: Path, corpus: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retrying, "RETRY_SECONDS", ())
    for number, shards in ((errno.ENOSPC, r"\[0\]"), (errno.EIO, r"\[0, 1, 2\]")):

        def broken(entry: Any, number: int = number) -> Any:
            raise OSError(number, "nothing goes")

        monkeypatch.setattr(decoding, "decode_images", broken)
        with pytest.raises(OSError, match=f"not be made: {shards}: "):
            tokenize(make_config(corpus, tmp_path / str(number), num_shards=6))
