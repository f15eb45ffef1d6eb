"""Scenes, motion and text of clips, real and made."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emu3_megatron.curation.clips import steady_frames
from emu3_megatron.curation.config import MotionConfig, SceneConfig, TextCoverageConfig
from emu3_megatron.curation.frames import SOURCE, open_video, small_size
from emu3_megatron.curation.motion import MotionStage
from emu3_megatron.curation.ocr import TextCoverageStage
from emu3_megatron.curation.scenes import SceneStage, transitions
from emu3_megatron.curation.units import Unit
from emu3_megatron.media import OpenVideo
from tests.curation.corpus import RATE, pan, write_videos
from tests.media.clips import CLIPS, decode_in_order, encode, moving_picture


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_videos(tmp_path_factory.mktemp("videos"))


def video(path: Path) -> Unit:
    return Unit(id=path.stem, kind="video", record={"video": path.name}, path=path)


def cuts(path: Path, **settings: Any) -> list[int]:
    """First frames of the scenes after the first."""
    stage = SceneStage(SceneConfig(min_clip_seconds=0.0, max_clip_seconds=1e6, **settings))
    unit = video(path)
    return [part.frames[0] for part, _ in stage.split(unit, stage.score(unit)) if part.frames][1:]


def test_cuts_are_found_at_their_frames(videos: dict[str, Path]) -> None:
    assert cuts(videos["cuts"]) == [36, 72]
    for name in ("static", "long", "short"):
        assert cuts(videos[name]) == []


def test_fades_are_found(videos: dict[str, Path]) -> None:
    (cut,) = cuts(videos["fade"])
    assert 30 <= cut <= 42


@pytest.mark.parametrize("name", ["bikes.mp4", "carphone_pristine.mp4"])
def test_cuts_are_those_of_pyscenedetect_itself(name: str) -> None:
    """Its own reader, its own loop; this package only keeps the measures between the two halves."""
    from scenedetect import ContentDetector, ThresholdDetector, detect

    config = SceneConfig()
    scenes = detect(str(CLIPS / name), ContentDetector(config.content_threshold, config.min_scene_seconds))
    fades = detect(str(CLIPS / name), ThresholdDetector(config.fade_threshold, config.min_scene_seconds))
    expected = {scene[0].frame_num for scene in [*scenes[1:], *fades[1:]]}
    found = cuts(CLIPS / name)
    assert len(found) == len(expected)
    assert all(min(abs(cut - other) for other in expected) <= 1 for cut in found)


def test_transnet_finds_the_cuts_and_the_fade(videos: dict[str, Path]) -> None:
    assert cuts(videos["cuts"], detector="transnetv2") == [36, 72]
    fade = cuts(videos["fade"], detector="transnetv2")
    assert fade
    assert all(26 <= cut <= 46 for cut in fade)


@settings(deadline=None)
@given(st.lists(st.booleans(), max_size=30))
def test_transitions_are_runs(marks: list[bool]) -> None:
    found = transitions([float(mark) for mark in marks], 0.5)
    runs = "".join("1" if mark else "0" for mark in marks).split("0")
    assert len(found) <= sum(1 for run in runs if run)
    assert all(0 < cut < len(marks) and marks[cut - 1] for cut in found)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.floats(0.02, 0.2), min_size=2, max_size=200),
    st.sets(st.integers(1, 199), max_size=6),
    st.floats(0.1, 3.0),
    st.floats(1.0, 4.0),
)
def test_clips_cover_the_scenes_within_the_limits(
    gaps: list[float], places: set[int], least: float, factor: float
) -> None:
    """At any frame rate: no clip crosses a cut or overlaps another, and only short ones are dropped."""
    times = np.concatenate([[0.0], np.cumsum(gaps)]).round(6).tolist()
    change = [60.0 if i in places else 0.0 for i in range(len(times))]
    score = {
        "seconds": times,
        "fps": (len(times) - 1) / times[-1],
        "change": change,
        "level": [99.0] * len(times),
    }
    longest = least * factor
    stage = SceneStage(
        SceneConfig(
            min_clip_seconds=least, max_clip_seconds=longest, min_scene_seconds=0.0, margin_seconds=0.0
        )
    )
    unit = Unit(id="v", kind="video", record={}, path=Path("v"))
    parts = stage.split(unit, score)
    edges = sorted(place for place in places if place < len(times))
    end = 0
    slack = 2 / score["fps"] + max(gaps)
    for part, decision in parts:
        first, stop = part.frames
        assert first == end
        end = stop
        assert not any(first < edge < stop for edge in edges)
        start, finish = part.interval
        assert finish - start <= longest + slack
        assert decision.keep == (stop > first and finish - start >= least - 1e-6)
    assert end == len(times)


def motion(path: Path, **settings: Any) -> float:
    stage = MotionStage(MotionConfig(**settings))
    return float(stage.score(video(path))["motion"])


@pytest.mark.parametrize("speed", [1.0, 3.0, 12.0])
def test_motion_is_displacement_over_the_shorter_edge(tmp_path: Path, speed: float) -> None:
    path = encode(tmp_path / "a.mp4", pan("astronaut.png", 24, speed), rate=RATE)
    assert motion(path) == pytest.approx(speed / 192, rel=0.15)


def test_motion_does_not_depend_on_the_frame_rate(tmp_path: Path) -> None:
    slow = encode(tmp_path / "slow.mp4", pan("coffee.png", 12, 4.0), rate=12)
    fast = encode(tmp_path / "fast.mp4", pan("coffee.png", 48, 1.0), rate=48)
    assert motion(fast) == pytest.approx(motion(slow), rel=0.1)


def test_motion_decides(videos: dict[str, Path]) -> None:
    stage = MotionStage(MotionConfig())
    reasons = {}
    for name in ("static", "long", "racing"):
        unit = video(videos[name])
        reasons[name] = stage.decide(unit, stage.score(unit)).reason
    assert reasons == {"static": "too little motion", "long": "", "racing": "too much motion"}


def test_a_model_takes_the_place_of_dis(tmp_path: Path, videos: dict[str, Path]) -> None:
    class Constant(torch.nn.Module):
        def forward(self, first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            flow = torch.zeros_like(first[:, :2]) + torch.tensor([3.0, 4.0]).view(1, 2, 1, 1)
            return flow * 0, flow

    # Traced, since scripting reads the source of functions that other tests have redirected.
    pictures = torch.zeros(2, 1, 3, 8, 8)
    torch.jit.trace(Constant(), tuple(pictures)).save(str(tmp_path / "flow.pt"))
    assert motion(videos["cuts"], model=tmp_path / "flow.pt") == pytest.approx(5 / 192, rel=1e-4)
    assert MotionStage(MotionConfig(model=tmp_path / "flow.pt")).key != MotionStage(MotionConfig()).key


def test_text_in_the_picture(videos: dict[str, Path]) -> None:
    stage = TextCoverageStage(TextCoverageConfig())
    scores = {name: stage.score(video(videos[name])) for name in ("captioned", "cuts")}
    assert scores["captioned"]["coverage"] > 0.2
    assert scores["cuts"]["coverage"] < 0.02
    assert scores["cuts"]["frames"] == 18  # nine seconds at 2 FPS


def test_streams_give_the_frames_of_a_plain_decode(tmp_path: Path, videos: dict[str, Path]) -> None:
    for path in (videos["bikes"], encode(tmp_path / "a.ts", moving_picture(30), rate=12)):
        expected = decode_in_order(path)
        with OpenVideo(path) as video:
            for first, stop in ((0, None), (17, 23)):
                frames = list(SOURCE.stream(video, first=first, stop=stop))
                assert len(frames) == len(expected[first:stop])
                assert all(np.array_equal(a, b) for a, b in zip(frames, expected[first:stop], strict=True))
            small = next(SOURCE.stream(video, size=small_size(video.info, width=64)))
            assert small.shape[1] == 64


def test_steady_frames_resample_a_variable_rate(tmp_path: Path) -> None:
    ticks = [0, 100, 200, 600, 700, 800]
    path = encode(tmp_path / "a.mkv", moving_picture(6), encoder="libx264", ticks=ticks)
    with open_video(path) as video:
        frames = list(steady_frames(video, 0, 6))
        decoded = list(SOURCE.stream(video))
    shown = [next(i for i, other in enumerate(decoded) if np.array_equal(frame, other)) for frame in frames]
    assert shown == sorted(shown)
    assert set(shown) >= {0, 2, 5}
    assert shown.count(2) > 1
    constant = encode(tmp_path / "b.mp4", moving_picture(9), rate=12)
    with open_video(constant) as video:
        assert len(list(steady_frames(video, 2, 8))) == 6


def test_a_part_of_a_video_is_scored_alone(videos: dict[str, Path]) -> None:
    """The second scene of the cuts stands in frames 36 to 72."""
    stage = MotionStage(MotionConfig())
    whole = video(videos["cuts"])
    part = replace(whole, frames=(36, 72))
    assert stage.score(part)["most"] < 0.05
    assert stage.score(part) != stage.score(replace(whole, frames=(0, 36)))
