"""Faults of the machine, which no file is blamed for, and files of which too many cannot be used."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from emu3_megatron.curation import scoring
from emu3_megatron.curation.config import CurationConfig, ImageConfig, SizeConfig
from emu3_megatron.curation.contamination import read_prompts
from emu3_megatron.curation.job import curate
from emu3_megatron.curation.models import to_device
from emu3_megatron.curation.quality import NoReferenceScorer
from emu3_megatron.errors import UserError
from tests.curation.corpus import save, write_manifest

FAULTS: dict[str, Exception] = {
    "memory": MemoryError("no memory"),
    "memory of the GPU": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "lost GPU": RuntimeError("CUDA error: an illegal memory access was encountered"),
    "memory of torch": RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"),
    "disk": OSError(5, "Input/output error"),
}


class Scorer:
    """Fails `times` times with `error`, then likes everything."""

    def __init__(self, error: Exception, times: int) -> None:
        self.error, self.times = error, times

    def __call__(self, pictures: Sequence[Any]) -> list[float]:
        self.times -= 1
        if self.times >= 0:
            raise self.error
        return [9.0] * len(pictures)


def prepare(folder: Path, count: int, broken: Sequence[int] = ()) -> CurationConfig:
    """A job over small pictures."""
    for i in range(count):
        save(folder / f"CUDA {i}.png", np.full((40, 40, 3), i, np.uint8))
    for i in broken:
        (folder / f"CUDA {i}.png").write_bytes(b"none")
    records = [{"id": str(i), "image": str(folder / f"CUDA {i}.png")} for i in range(count)]
    image = ImageConfig(stages=("probe", "quality"), probe=SizeConfig(min_width=32, min_height=32))
    return CurationConfig(
        manifest=(write_manifest(folder / "raw.jsonl", records),),
        output=folder / "out",
        image=image,
        processes=0,
        thumbnails=0,
        progress=False,
    )


def names(path: Path) -> list[str]:
    return [json.loads(line)["id"] for line in path.read_bytes().split(b"\n")[:-1]]


@pytest.mark.parametrize("fault", FAULTS)
def test_no_file_is_blamed_for_the_machine(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "RETRY_SECONDS", (0.0, 0.0))
    config = prepare(tmp_path, 3)
    scorer = Scorer(FAULTS[fault], 99)
    monkeypatch.setattr(NoReferenceScorer, "__call__", lambda self, pictures: scorer(pictures))
    with pytest.raises(OSError, match=r"quality of .*CUDA 0\.png"):
        curate(config)
    assert not (config.output / "manifest.jsonl").exists()
    scorer.times = 2  # it passes
    assert curate(config) is not None
    assert names(config.output / "manifest.jsonl") == ["0", "1", "2"]
    assert not (config.output / "quarantine.jsonl").read_bytes()


def test_a_library_that_trips_over_a_file_is_no_fault_of_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(prepare(tmp_path, 1), max_unusable_fraction=1.0)
    scorer = Scorer(RuntimeError(f"does not like {tmp_path / 'CUDA 0.png'}"), 1)
    monkeypatch.setattr(NoReferenceScorer, "__call__", lambda self, pictures: scorer(pictures))
    assert curate(config) is not None
    assert names(config.output / "quarantine.jsonl") == ["0"]


def test_a_missing_package_ends_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = Scorer(ModuleNotFoundError("No module named 'scorer'"), 1)
    monkeypatch.setattr(NoReferenceScorer, "__call__", lambda self, pictures: scorer(pictures))
    with pytest.raises(UserError, match="cannot import what it needs"):
        curate(prepare(tmp_path, 1))


def test_a_device_that_is_not_there_has_one_line() -> None:
    with pytest.raises(UserError, match="the device 'warp' cannot be used"):
        to_device(torch.nn.Linear(1, 1), "warp")


@pytest.mark.parametrize("workers", [1, 2])
def test_too_many_unusable_files_end_the_job(tmp_path: Path, workers: int) -> None:
    """Of two workers each finds few enough; the one that finishes sees all."""
    broken = (3, 140, 149)
    config = prepare(tmp_path, 150, broken)
    config = replace(
        config,
        image=replace(config.image, stages=("probe",)),
        max_unusable_fraction=2 / 150,
        num_workers=workers,
    )
    assert [curate(replace(config, worker=i)) for i in range(1, workers)] == [None] * (workers - 1)
    with pytest.raises(UserError, match=r"3 of 150 entries cannot be used.* allows 2.*CUDA 3\.png.*again"):
        curate(config)
    assert not (config.output / "manifest.jsonl").exists()
    assert names(config.output / "quarantine.jsonl") == [str(i) for i in broken]
    assert curate(replace(config, max_unusable_fraction=0.02)) is not None
    assert len(names(config.output / "manifest.jsonl")) == 147


LINE_ENDS = "\u2028\u2029\x85\x0b\x0c\x1c"
"""What ends a line for Python's str and not for JSON Lines."""


def test_a_name_may_hold_any_character(tmp_path: Path) -> None:
    config = prepare(tmp_path, 1)
    config = replace(config, image=replace(config.image, stages=("probe",)))
    record = {"id": f"a{LINE_ENDS}b", "image": str(tmp_path / "CUDA 0.png")}
    write_manifest(config.manifest[0], [record])
    for _ in range(2):  # the second time from the scores that are kept
        assert curate(config) is not None
        assert names(config.output / "manifest.jsonl") == [record["id"]]


def test_prompts_may_hold_any_character(tmp_path: Path) -> None:
    prompt = f"a cat{LINE_ENDS[:3]}on a mat"
    write_manifest(tmp_path / "a.jsonl", [{"prompt": prompt}, {"prompt": "b"}])
    assert list(read_prompts(tmp_path / "a.jsonl")) == [prompt, "b"]
    (tmp_path / "a.txt").write_bytes(f"{prompt}\r\n\nb".encode())
    assert list(read_prompts(tmp_path / "a.txt")) == [prompt, "b"]
    (tmp_path / "deep.jsonl").write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"deep\.jsonl:1: is not valid JSON"):
        list(read_prompts(tmp_path / "deep.jsonl"))
