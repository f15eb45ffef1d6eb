"""Entries that mean a part of their video, by `start` and `end`, as curation and captioning write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from emu3_megatron.curation.config import CurationConfig, DuplicatesConfig, ProbeConfig, VideoConfig
from emu3_megatron.curation.job import curate
from emu3_megatron.curation.report import Report
from emu3_megatron.media import probe_video
from tests.curation.corpus import RATE, pan, write_manifest
from tests.media.clips import decode_in_order, encode

STAGES = ("probe", "scenes", "motion", "duplicates")
SCENES = {"astronaut.png": (0, 36), "coffee.png": (36, 72), "rocket.jpg": (72, 108)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three scenes of three seconds in one file."""
    folder = tmp_path_factory.mktemp("parts") / "raw"
    folder.mkdir()
    encode(folder / "cuts.mp4", np.concatenate([pan(name, 36) for name in SCENES]), rate=RATE)
    return folder


def run(folder: Path, records: list[dict[str, Any]], name: str, **settings: Any) -> tuple[Path, Report]:
    """A job over entries of the file."""
    manifest = write_manifest(
        folder / f"{name}.jsonl", [{"video": str(folder / "cuts.mp4"), **record} for record in records]
    )
    video = VideoConfig(**{"stages": STAGES, "probe": ProbeConfig(min_width=200, min_height=160), **settings})
    output = folder.parent / name
    config = CurationConfig(
        manifest=(manifest,), output=output, video=video, processes=0, thumbnails=1, progress=False
    )
    report = curate(config)
    assert report is not None
    return output, report


def rows(path: Path) -> dict[str, dict[str, Any]]:
    return {row["id"]: row for row in map(json.loads, path.read_bytes().split(b"\n")[:-1])}


def test_parts_of_one_file_keep_their_own_frames_and_captions(folder: Path) -> None:
    records: list[dict[str, Any]] = [
        {"id": "first", "start": 0.0, "end": 3.0, "caption": "an astronaut"},
        {"id": "rest", "start": 3, "end": None, "caption": "coffee, then a rocket"},
        {"id": "inside", "start": 4.5, "end": 5.75},
    ]
    output, report = run(folder, records, "written")
    kept = rows(output / "manifest.jsonl")
    assert {name: row.get("caption") for name, row in kept.items()} == {
        "first@0-36": "an astronaut",
        "rest@36-72": "coffee, then a rocket",
        "rest@72-108": "coffee, then a rocket",
    }
    source = decode_in_order(folder / "cuts.mp4")
    for name, row in kept.items():
        first, stop = (int(part) for part in name.split("@")[1].split("-"))
        assert row["source"]["id"] == name.split("@")[0]
        assert (row["source"]["start"], row["source"]["end"]) == pytest.approx((first / RATE, stop / RATE))
        assert not {"start", "end"} & row.keys()  # the file is the clip already
        written = decode_in_order(output / row["video"])
        assert len(written) == stop - first
        assert np.abs(written[5].astype(int) - source[first + 5]).mean() < 4
    probes = rows(output / "stages" / "video-probe.jsonl")
    assert {name: row["score"]["seconds"] for name, row in probes.items()} == {
        "first@0-36": 3.0,
        "rest@36-108": 6.0,
        "inside@54-69": 1.25,
    }
    dropped = {row["reason"]: row["units"] for row in report.as_json()["dropped"]}
    assert dropped == {"clip too short": 1}
    assert {row["stage"]: row["units"] for row in report.as_json()["stages"]}["scenes"] == 3


def test_parts_stay_parts_where_no_clip_is_written_and_are_curated_again(folder: Path) -> None:
    parts = [{"id": "first", "start": 0, "end": 3}, {"id": "last", "start": 6.0, "end": 90}]
    output, _ = run(folder, parts, "stated", write_clips=False)
    kept = rows(output / "manifest.jsonl")
    assert {name: (row["start"], row["end"]) for name, row in kept.items()} == {
        "first@0-36": (0.0, 3.0),
        "last@72-108": (6.0, 9.0),
    }
    again, _ = run(folder, list(kept.values()), "again", write_clips=False)
    assert {name: (row["start"], row["end"]) for name, row in rows(again / "manifest.jsonl").items()} == {
        "first@0-36@0-36": (0.0, 3.0),
        "last@72-108@72-108": (6.0, 9.0),
    }


def test_a_part_is_a_clip_without_the_stage_that_splits(folder: Path) -> None:
    output, _ = run(folder, [{"id": "a", "start": 1.0, "end": 2.5}], "unsplit", stages=("duplicates",))
    ((name, row),) = rows(output / "manifest.jsonl").items()
    assert (name, row["source"]["id"]) == ("a@12-30", "a")
    assert probe_video(output / row["video"]).frame_count == 18


def test_all_of_a_file_named_as_a_part_is_the_file(folder: Path) -> None:
    duplicates = DuplicatesConfig(max_distance=0)
    output, _ = run(
        folder,
        [{"id": "null", "start": None, "end": None}, {"id": "all", "start": 0, "end": 9}],
        "whole",
        stages=("probe",),
        duplicates=duplicates,
    )
    kept = rows(output / "manifest.jsonl")
    assert set(kept) == {"null", "all@0-108"}
    assert not (output / "clips").exists()


def test_a_part_that_is_none_is_set_aside(folder: Path) -> None:
    bad = {
        "late": {"start": 60},
        "backwards": {"start": 3, "end": 2},
        "negative": {"start": -1},
        "word": {"end": "3"},
    }
    good = [{"id": f"good {i}", "start": i / 12, "end": 9} for i in range(96)]
    output, _ = run(
        folder,
        [*({"id": name, **part} for name, part in bad.items()), *good],
        "bad",
        stages=("probe",),
        write_clips=False,
    )
    listed = rows(output / "quarantine.jsonl")
    assert set(listed) == set(bad)
    assert "no frame from 60 s" in listed["late"]["reason"]
    assert listed["late"]["error"] == "MediaError"
    assert "0 <= start < end" in listed["backwards"]["reason"]
    assert "number of seconds" in listed["word"]["reason"]
