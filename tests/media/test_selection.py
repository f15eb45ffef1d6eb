"""A clip holds the frames on display at its instants."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from emu3_megatron.media import ClipRule, MediaError, VideoInfo, frame_range


def video(pts: list[int], time_base: Fraction) -> VideoInfo:
    return VideoInfo(
        codec="h264",
        width=64,
        height=64,
        pixel_format="yuv420p",
        rotation=0,
        pixel_aspect=1.0,
        matrix="bt601",
        full_range=False,
        time_base=time_base,
        pts=np.array(pts, np.int64),
        ordinal=False,
    )


@pytest.mark.parametrize(("rate", "wanted"), [(24, 24), (24, 12), (24, 8), (30, 15), (30, 10), (25, 5)])
@pytest.mark.parametrize("milliseconds", [False, True])
def test_whole_ratios_take_every_nth_frame(rate: int, wanted: int, milliseconds: bool) -> None:
    base = Fraction(1, 1000) if milliseconds else Fraction(1, rate * 512)
    pts = [round(Fraction(i, rate) / base) + 17 for i in range(200)]
    clip = ClipRule(frames=8, fps=wanted).select(video(pts, base))
    assert clip.indices == tuple(range(0, 8 * rate // wanted, rate // wanted))
    assert clip.fps == wanted
    assert clip.seconds == 8 / wanted


def test_variable_rate_shows_what_a_player_shows() -> None:
    info = video([0, 40, 80, 500, 540, 900, 1000], Fraction(1, 1000))
    assert ClipRule(frames=4, fps=4).select(info).indices == (0, 2, 3, 4)


def test_a_slower_stream_repeats_frames() -> None:
    info = video(list(range(4)), Fraction(1, 4))
    assert ClipRule(frames=8, fps=8).select(info).indices == (0, 0, 1, 1, 2, 2, 3, 3)


def test_positions() -> None:
    info = video(list(range(100)), Fraction(1, 10))
    assert ClipRule(frames=10, position="centre").select(info).indices == tuple(range(45, 55))
    assert ClipRule(frames=10, fps=5, position="centre").select(info).indices == tuple(range(40, 60, 2))
    assert ClipRule(frames=4).select(info).fps == pytest.approx(10)


def test_exactly_long_enough_is_enough() -> None:
    info = video(list(range(8)), Fraction(1, 8))
    for position in ("start", "centre"):
        for fps in (None, 8.0):
            assert ClipRule(frames=8, fps=fps, position=position).select(info).indices == tuple(range(8))
    for fps in (None, 8.0):
        with pytest.raises(MediaError, match="too"):
            ClipRule(frames=9, fps=fps).select(info)


def test_a_single_frame_is_a_video_of_a_second() -> None:
    info = video([5], Fraction(1, 10))
    assert (info.fps, info.seconds) == (1.0, 1.0)


def test_bad_rules_are_refused() -> None:
    for rule in ({"frames": 0}, {"fps": 0.0}, {"fps": -1.0}, {"position": "end"}):
        with pytest.raises(ValueError, match="clip"):
            ClipRule(**rule)  # type: ignore[arg-type]


def test_a_part_holds_the_frames_that_appear_in_it() -> None:
    info = video([0, 40, 80, 500, 540, 900, 1000], Fraction(1, 1000))
    for interval, wanted in {
        (0.0, None): (0, 7),
        (0.04, 0.5): (1, 3),
        (0.03, 0.55): (1, 5),
        (0.6, 0.8): (5, 5),
        (0.9, 50.0): (5, 7),
        (2.0, None): (7, 7),
    }.items():
        assert frame_range(info, interval) == wanted


@pytest.mark.parametrize("milliseconds", [False, True])
@pytest.mark.parametrize("rate", [Fraction(24), Fraction(30000, 1001), Fraction(25)])
def test_parts_that_meet_share_no_frame_and_lose_none(rate: Fraction, milliseconds: bool) -> None:
    """Edges at the frames' exact times, rounded to microseconds as curation does."""
    base = Fraction(1, 1000) if milliseconds else 1 / (rate * 512)
    info = video([round(Fraction(i) / rate / base) + 3 for i in range(120)], base)
    edges = [round(float(i / rate), 6) for i in range(121)]
    for first in range(0, 120, 7):
        assert frame_range(info, (edges[first], edges[first + 1])) == (first, first + 1)
        assert frame_range(info, (edges[first], None)) == (first, 120)


@pytest.mark.parametrize("position", ["start", "centre"])
@pytest.mark.parametrize("fps", [None, 5.0, 12.0])
def test_a_clip_of_a_part_is_the_clip_of_the_cut_file(position: str, fps: float | None) -> None:
    info = video([round(i * 1000 / 24) for i in range(100)], Fraction(1, 1000))
    rule = ClipRule(frames=8, fps=fps, position=position)
    first, stop = frame_range(info, (1.0, 3.1))
    cut = rule.select(replace(info, pts=info.pts[first:stop]))
    clip = rule.select(info, (1.0, 3.1))
    assert clip.indices == tuple(first + index for index in cut.indices)
    assert (clip.fps, clip.seconds) == (cut.fps, cut.seconds)


def test_a_part_that_is_too_short_or_outside_is_refused() -> None:
    info = video(list(range(40)), Fraction(1, 10))
    for interval, reason in (((0.0, 0.7), "too few"), ((9.0, None), "no frame"), ((3.95, 3.99), "no frame")):
        with pytest.raises(MediaError, match=reason):
            ClipRule(frames=8).select(info, interval)
