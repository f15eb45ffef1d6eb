"""Frames by index are the frames that sequential decoding gives, from either source."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from emu3_megatron.media import ClipRule, MediaError, OpenVideo, frame_source, probe_video, sources
from tests.media.clips import CLIPS, cut_losslessly, decode_in_order, encode, moving_picture, read_frames

INDICES = (0, 1, 5, 11, 17, 23)

STREAMS = [
    ("h264.mp4", "libx264", {"bf": "2", "g": "8"}),
    ("open_group.mp4", "libx264", {"x264-params": "open-gop=1:keyint=6:bframes=3", "bf": "3"}),
    ("stream.ts", "libx264", {"bf": "2", "g": "8"}),
    ("h264.mkv", "libx264", {"g": "8"}),
    ("h264.avi", "libx264", {"g": "8", "bf": "2"}),
    ("hevc.mp4", "libx265", {"x265-params": "log-level=none:keyint=8"}),
    ("vp9.webm", "libvpx-vp9", {"g": "8"}),
    ("av1.mp4", "libsvtav1", {"preset": "10", "g": "8"}),
    ("vp8.webm", "libvpx", {"g": "8", "auto-alt-ref": "1", "lag-in-frames": "10"}),
    ("mpeg4.mp4", "mpeg4", {"g": "8"}),
    ("mpeg4.avi", "mpeg4", {"g": "8", "bf": "2"}),
    ("mjpeg.avi", "mjpeg", {}),
]
"""Name, encoder and its options."""


def reference_of(reference: list[np.ndarray], indices: Sequence[int]) -> np.ndarray:
    return np.stack([reference[i] for i in indices])


@pytest.mark.parametrize(("name", "encoder", "options"), STREAMS)
def test_selected_frames_are_those_of_sequential_decoding(
    tmp_path: Path, name: str, encoder: str, options: dict[str, str]
) -> None:
    pixel_format = "yuvj420p" if encoder == "mjpeg" else "yuv420p"
    path = encode(
        tmp_path / name, moving_picture(), encoder=encoder, options=options, pixel_format=pixel_format
    )
    reference = decode_in_order(path)
    info = probe_video(path)
    assert info.frame_count == len(reference) == 24
    chosen = ([0], [23], [3, 4], [13], INDICES, (4, 4, 5), (7, 8))
    for indices in chosen:
        assert np.array_equal(read_frames("pyav", path, indices), reference_of(reference, indices))
    source = frame_source("pyav")
    for known, order in itertools.product((None, info), (chosen, chosen[::-1])):
        with OpenVideo(path, known) as video:  # what was taken before changes nothing
            for indices in order:
                assert np.array_equal(source.frames(video, indices), reference_of(reference, indices))


def test_fragmented_mp4_is_exact(tmp_path: Path) -> None:
    path = encode(
        tmp_path / "f.mp4",
        moving_picture(),
        options={"g": "6"},
        container_options={"movflags": "frag_keyframe+empty_moov"},
    )
    reference = decode_in_order(path)
    for i in INDICES:
        assert np.array_equal(read_frames("pyav", path, [i])[0], reference[i])


@pytest.mark.parametrize("rate", [12, 1000])
@pytest.mark.parametrize(
    ("encoder", "pixel_format", "options"),
    [
        ("mpeg4", "yuv420p", {}),
        ("mpeg4", "yuv420p", {"bf": "2"}),
        ("mjpeg", "yuvj420p", {}),
        ("libx264", "yuv420p", {}),
        ("libx264", "yuv420p", {"bf": "0"}),
    ],
)
def test_avi_may_pause_between_frames(
    tmp_path: Path, encoder: str, pixel_format: str, options: dict[str, str], rate: int
) -> None:
    """An AVI file's header counts places without a frame, even after the last; what a cut takes is missed."""
    ticks = [0, 1, 2, 3, 8, 9, 10, 11, 12, 20, 21, 22]
    path = encode(
        tmp_path / "v.avi",
        moving_picture(12),
        encoder=encoder,
        pixel_format=pixel_format,
        options=options,
        ticks=ticks,
        rate=rate,
    )
    info, reference = probe_video(path), decode_in_order(path)
    assert info.frame_count == len(reference) == 12
    if encoder != "libx264":  # whose frames AVI only knows by the time of decoding
        assert np.allclose(info.timestamps * 1000, ticks)
    for chosen in ([4, 9, 11], [0, 3], range(12)):
        assert np.array_equal(read_frames("pyav", path, chosen), reference_of(reference, chosen))
    data = path.read_bytes()
    with av.open(str(path)) as container:
        places = [packet.pos for packet in container.demux(video=0) if packet.size]
    for place in places[1::5]:
        for damaged in (data[:place], data[:place] + bytes(len(data) - place)):
            path.write_bytes(damaged)
            with pytest.raises(MediaError, match="truncated"):
                probe_video(path)


def test_variable_frame_rate_keeps_every_time_stamp(tmp_path: Path) -> None:
    ticks = [0, 40, 80, 120, 400, 440, 1000, 1040, 1080, 2000, 2040, 3000]
    path = encode(tmp_path / "v.mkv", moving_picture(12), ticks=ticks)
    info, reference = probe_video(path), decode_in_order(path)
    assert np.allclose(info.timestamps * 1000, ticks, atol=1)
    frames = read_frames("pyav", path, (4, 9, 11))
    assert np.array_equal(frames, np.stack([reference[i] for i in (4, 9, 11)]))


@pytest.mark.parametrize(
    ("name", "encoder", "pixel_format", "full_range", "size"),
    [
        ("a.webm", "libvpx-vp9", "yuv420p", False, (96, 128)),
        ("b.mp4", "libvpx-vp9", "yuv420p", True, (96, 128)),
        ("odd.webm", "libvpx-vp9", "yuv420p", False, (97, 129)),
        ("c.webm", "libvpx", "yuv420p", False, (96, 128)),
        ("d.avi", "mjpeg", "yuvj420p", True, (96, 128)),
    ],
)
def test_dali_and_pyav_give_the_same_bytes(
    tmp_path: Path, name: str, encoder: str, pixel_format: str, full_range: bool, size: tuple[int, int]
) -> None:
    path = encode(
        tmp_path / name,
        moving_picture(24, *size),
        encoder=encoder,
        pixel_format=pixel_format,
        full_range=full_range,
    )
    info = probe_video(path)
    assert frame_source("dali").supports(info)
    assert info.full_range == full_range
    assert np.array_equal(read_frames("dali", path, INDICES), read_frames("pyav", path, INDICES))


def test_dali_and_pyav_agree_on_a_variable_frame_rate(tmp_path: Path) -> None:
    ticks = [0, 40, 80, 120, 400, 440, 1000, 1040, 1080, 2000, 2040, 3000]
    path = encode(tmp_path / "v.webm", moving_picture(12), encoder="libvpx-vp9", ticks=ticks)
    info = probe_video(path)
    assert np.allclose(info.timestamps * 1000, ticks, atol=1)
    for rule in (ClipRule(frames=4, fps=2.0), ClipRule(frames=8, fps=2.5, position="centre")):
        indices = rule.select(info).indices
        expected = np.stack([decode_in_order(path)[i] for i in indices])
        for source in ("dali", "pyav", "auto"):
            assert np.array_equal(read_frames(source, path, indices), expected)


def test_bt709_from_dali_is_corrected(tmp_path: Path) -> None:
    original = 64 + moving_picture() // 2  # no colour that BT.601 would clip
    path = encode(tmp_path / "a.mp4", original, encoder="libvpx-vp9", matrix=1, options={"b": "4M"})
    info = probe_video(path)
    assert info.matrix == "bt709"
    dali = read_frames("dali", path, INDICES).astype(int)
    pyav = read_frames("pyav", path, INDICES).astype(int)
    automatic = read_frames("auto", path, INDICES)
    assert np.abs(dali - pyav).mean() < 1.0
    assert np.abs((dali - pyav).mean((0, 1, 2))).max() < 0.7  # no tint
    assert np.abs(pyav - original[list(INDICES)]).mean() < 2.0
    assert np.array_equal(automatic, pyav)


@pytest.mark.parametrize("rotation", [90, 180, 270])
@pytest.mark.parametrize(("encoder", "source"), [("libx264", "pyav"), ("libvpx-vp9", "dali")])
def test_rotation_makes_pictures_upright(tmp_path: Path, rotation: int, encoder: str, source: str) -> None:
    original = moving_picture(4)
    path = encode(tmp_path / "r.mp4", original, rotation=rotation, encoder=encoder, options={"b": "4M"})
    info = probe_video(path)
    frames = read_frames(source, path, (0, 3)).astype(int)
    turned = np.rot90(original[[0, 3]], rotation // 90, axes=(1, 2))
    assert info.upright_size == turned.shape[1:3]
    assert frames.shape == turned.shape
    assert np.abs(frames - turned).mean() < 3.0


def test_pixel_aspect_follows_the_rotation(tmp_path: Path) -> None:
    wide = encode(tmp_path / "w.mp4", moving_picture(4), pixel_aspect=Fraction(4, 3))
    turned = encode(tmp_path / "t.mp4", moving_picture(4), pixel_aspect=Fraction(4, 3), rotation=90)
    assert probe_video(wide).pixel_aspect == pytest.approx(4 / 3)
    assert probe_video(turned).pixel_aspect == pytest.approx(3 / 4)


@pytest.mark.parametrize("name", ["bikes.mp4", "carphone_pristine.mp4"])
def test_real_clips_are_exact(name: str) -> None:
    path = CLIPS / name
    info, reference = probe_video(path), decode_in_order(path)
    assert info.frame_count == len(reference)
    indices = [0, 3, 50, info.frame_count - 1]
    frames = read_frames("auto", path, indices)
    assert np.array_equal(frames, np.stack([reference[i] for i in indices]))


@pytest.mark.parametrize("name", ["bikes.mp4", "carphone_pristine.mp4"])
@pytest.mark.parametrize("interval", [(0.0, 1.0), (1.52, 3.44), (2.0, 3.999)])
def test_parts_of_real_clips_are_those_of_the_cut_file(
    tmp_path: Path, name: str, interval: tuple[float, float]
) -> None:
    cut = cut_losslessly(CLIPS / name, tmp_path / "cut.mp4", *interval)
    whole_info, cut_info = probe_video(CLIPS / name), probe_video(cut)
    for rule in (ClipRule(frames=8), ClipRule(frames=8, fps=10.0), ClipRule(frames=4, position="centre")):
        part = rule.select(whole_info, interval)
        alone = rule.select(cut_info)
        assert np.array_equal(
            read_frames("pyav", CLIPS / name, part.indices), read_frames("pyav", cut, alone.indices)
        )
        assert part.fps == pytest.approx(alone.fps, abs=0.01)


def test_dali_cuts_parts_as_pyav_does(tmp_path: Path) -> None:
    whole = cut_losslessly(CLIPS / "carphone_pristine.mp4", tmp_path / "whole.webm", 0.0, 4.0)
    cut = cut_losslessly(whole, tmp_path / "cut.webm", 1.1, 3.0)
    whole_info, cut_info = probe_video(whole), probe_video(cut)
    assert frame_source("dali").supports(whole_info)
    for rule in (ClipRule(frames=8), ClipRule(frames=8, fps=6.0, position="centre")):
        indices = rule.select(whole_info, (1.1, 3.0)).indices
        expected = read_frames("pyav", cut, rule.select(cut_info).indices)
        assert np.array_equal(read_frames("dali", whole, indices), expected)
        assert np.array_equal(read_frames("pyav", whole, indices), expected)


def test_encoded_bytes_are_as_good_as_a_path(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.webm", moving_picture(), encoder="libvpx-vp9")
    data = path.read_bytes()
    assert np.array_equal(probe_video(data).pts, probe_video(path).pts)
    for source in ("dali", "pyav"):
        assert np.array_equal(read_frames(source, data, (3, 9)), read_frames(source, path, (3, 9)))


def test_indices_outside_the_video_are_refused(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.webm", moving_picture(4), encoder="libvpx-vp9")
    for source in ("dali", "pyav"):
        for indices in ((0, 4), (-1,), ()):
            with pytest.raises(ValueError, match="must lie in"):
                read_frames(source, path, indices)


def test_dali_says_what_it_cannot_decode(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.mp4", moving_picture(4))
    info = probe_video(path)
    assert not frame_source("dali").supports(info)
    with pytest.raises(MediaError, match="DALI"):
        read_frames("dali", path, (0,))


def test_unknown_source_is_refused() -> None:
    with pytest.raises(ValueError, match="choose auto, dali or pyav"):
        frame_source("opencv")


def test_a_decoder_that_fails_for_a_while_costs_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DALI's errors look alike; a clip known to be good tells the machine's from the file's."""
    path = encode(tmp_path / "a.webm", moving_picture(), encoder="libvpx-vp9")
    expected = read_frames("dali", path, INDICES)
    original, calls, failing = sources.dali.decode_video, 0, range(0)

    def decode(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls in failing:
            raise RuntimeError("CUDA_ERROR_NO_DEVICE")
        return original(*arguments)

    monkeypatch.setattr(sources.dali, "decode_video", decode)
    failing = range(1, 100)
    with pytest.raises(OSError, match="known to be good"):
        read_frames("dali", path, INDICES)
    calls, failing = 0, range(1, 2)
    assert np.array_equal(read_frames("dali", path, INDICES), expected)
    calls, failing = 0, range(1, 4, 2)
    with pytest.raises(MediaError, match="DALI"):
        read_frames("dali", path, INDICES)
