"""Scenes of a clip are found and cut alike whatever it is encoded in, and however it was held."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from emu3_megatron.curation.config import CurationConfig, ProbeConfig, VideoConfig
from emu3_megatron.curation.job import curate
from emu3_megatron.media import probe_video
from tests.curation.corpus import RATE, Frames, pan, write_manifest
from tests.curation.test_job import read
from tests.media.clips import decode_in_order, encode, read_frames

ENCODERS: dict[str, tuple[str, dict[str, str]]] = {
    "h264.mp4": ("libx264", {}),
    "hevc.mp4": ("libx265", {"x265-params": "log-level=none"}),
    "vp9.webm": ("libvpx-vp9", {"b": "1M", "deadline": "realtime", "cpu-used": "8"}),
    "av1.mp4": ("libsvtav1", {"preset": "10", "crf": "30"}),
    "mpeg4.avi": ("mpeg4", {"b": "2M"}),
}
SCENE = 30
"""Frames of each of the two scenes."""


@pytest.fixture(scope="module")
def scenes() -> Frames:
    """Two scenes of 96 x 128 pixels."""
    both = [pan("astronaut.png", SCENE, 3.0), pan("coffee.png", SCENE, 3.0)]
    return np.ascontiguousarray(np.concatenate(both)[:, ::2, ::2])


def test_every_codec_and_rotation_gives_the_same_clips(tmp_path: Path, scenes: Frames) -> None:
    for name, (encoder, options) in ENCODERS.items():
        encode(tmp_path / name, scenes, encoder=encoder, options=options, rate=RATE)
    encode(
        tmp_path / "odd.webm",
        scenes[:, :-1, :-1],
        encoder="libvpx-vp9",
        options=ENCODERS["vp9.webm"][1],
        rate=RATE,
    )
    turns: dict[str, int] = {}
    originals = {**dict.fromkeys(ENCODERS, scenes), "odd.webm": scenes[:, :-1, :-1]}
    for turn in (90, 180, 270):
        encode(tmp_path / f"turned {turn}.mp4", scenes, rotation=turn, rate=RATE)
        originals[f"turned {turn}.mp4"] = np.rot90(scenes, turn // 90, axes=(1, 2))
        turns[f"turned {turn}.mp4"] = turn // 90
    manifest = write_manifest(tmp_path / "raw.jsonl", [{"id": name, "video": name} for name in originals])
    video = VideoConfig(stages=("probe", "scenes"), probe=ProbeConfig(min_width=64, min_height=64))
    output = tmp_path / "out"
    config = CurationConfig(
        manifest=(manifest,), output=output, video=video, processes=0, progress=False, thumbnails=0
    )
    assert curate(config) is not None
    assert not (output / "quarantine.jsonl").read_bytes()
    rows = {row["id"]: row for row in read(output / "manifest.jsonl")}
    ranges = ((0, SCENE), (SCENE, 2 * SCENE))
    assert set(rows) == {f"{name}@{first}-{stop}" for name in originals for first, stop in ranges}
    for name, original in originals.items():
        decoded = np.rot90(np.stack(decode_in_order(tmp_path / name)), turns.get(name, 0), axes=(1, 2))
        for first, stop in ranges:
            row = rows[f"{name}@{first}-{stop}"]
            info = probe_video(output / row["video"])
            assert info.rotation == 0
            assert info.frame_count == SCENE
            assert info.upright_size == original.shape[1:3]
            found = read_frames("pyav", output / row["video"], range(SCENE)).astype(int)
            apart = [np.abs(found[:-1] - decoded[first + k : stop - 1 + k]).mean() for k in (0, 1)]
            assert apart[0] < 5.0, row["id"]
            assert apart[0] < apart[1] / 2, row["id"]  # they are these frames and not their neighbours
            assert row["source"]["start"] == pytest.approx(first / RATE, abs=1e-3)
            assert row["source"]["end"] == pytest.approx(stop / RATE, abs=1e-3)
