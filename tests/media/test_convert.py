"""The kernel's pictures are FFmpeg's to the last bit, whatever the matrix, range and place of chroma."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.video.reformatter import VideoReformatter

from emu3_megatron.media.convert import CONVERTER_FLAGS, FFmpegConverter, RGBConverter
from tests.media.clips import CLIPS, encode

BT709, UNSPECIFIED, FCC, BT601, SMPTE240M, BT2020 = 1, 2, 4, 5, 7, 9
"""FFmpeg's AVColorSpace."""

ALIKE = platform.machine().lower() in ("x86_64", "amd64")
"""Whether FFmpeg's own code for this machine is known to round as the kernel does; elsewhere it may not."""


def by_ffmpeg(frame: Any) -> np.ndarray:
    return (
        VideoReformatter()
        .reformat(frame, format="rgb24", interpolation=CONVERTER_FLAGS, threads=1)
        .to_ndarray()
    )


def converted(convert: RGBConverter, frame: Any) -> np.ndarray:
    rgb = np.empty((frame.height, frame.width, 3), np.uint8)
    convert(frame, rgb)
    return rgb


def noise(generator: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Planes of yuv420p, every value of 0..255, below one another as PyAV takes them."""
    return generator.integers(0, 256, (height * 3 // 2, width), dtype=np.uint8)


@pytest.mark.parametrize("full_range", [False, True])
@pytest.mark.parametrize("matrix", [BT709, UNSPECIFIED, FCC, BT601, SMPTE240M, BT2020])
def test_noise_in_every_matrix_and_range(matrix: int, full_range: bool) -> None:
    generator = np.random.default_rng(matrix)
    for height, width in ((2, 2), (16, 16), (64, 70), (34, 258)):
        convert = RGBConverter(FFmpegConverter())
        for _ in range(3):
            frame = av.VideoFrame.from_ndarray(noise(generator, height, width), format="yuv420p")
            frame.colorspace, frame.color_range = matrix, 2 if full_range else 1
            assert np.array_equal(converted(convert, frame), by_ffmpeg(frame))
        assert convert.uses_kernel or not ALIKE or (height, width) == (2, 2)


@pytest.mark.parametrize("place", range(6))
def test_streams_with_chroma_in_every_place(tmp_path: Path, place: int) -> None:
    pictures = np.random.default_rng(place).integers(0, 256, (4, 48, 64, 3), dtype=np.uint8)
    options = {"qp": "0", "x264-params": f"chromaloc={place}"}
    path = encode(tmp_path / "a.mp4", pictures, options=options)
    convert = RGBConverter(FFmpegConverter())
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            assert np.array_equal(converted(convert, frame), by_ffmpeg(frame))
    assert convert.uses_kernel or not ALIKE


def test_streams_that_differ_in_the_place_of_chroma_alone_share_ffmpegs_converter(tmp_path: Path) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (2, 48, 64, 3), dtype=np.uint8)
    ffmpeg = FFmpegConverter()
    for place in (0, 3, 1, 5, 0, 2, 4):
        options = {"qp": "0", "x264-params": f"chromaloc={place}"}
        path = encode(tmp_path / f"{place}.mp4", pictures, options=options)
        convert = RGBConverter(ffmpeg)
        with av.open(str(path)) as container:
            for frame in container.decode(video=0):
                assert np.array_equal(converted(convert, frame), by_ffmpeg(frame))
        assert convert.uses_kernel or not ALIKE


@pytest.mark.parametrize("name", ["bikes.mp4", "carphone_pristine.mp4", "bigbuckbunny.mp4"])
def test_real_clips(name: str) -> None:
    convert = RGBConverter(FFmpegConverter())
    with av.open(str(CLIPS / name)) as container:
        for number, frame in enumerate(container.decode(video=0)):
            assert np.array_equal(converted(convert, frame), by_ffmpeg(frame))
            if number == 8:
                break
    assert convert.uses_kernel or not ALIKE


def test_flat_frames_decide_nothing_and_a_change_of_kind_starts_anew() -> None:
    generator = np.random.default_rng(0)
    flat = np.full((48 * 3 // 2, 64), 100, np.uint8)
    convert = RGBConverter(FFmpegConverter())
    for planes, known in ((flat, False), (flat, False), (noise(generator, 48, 64), True), (flat, True)):
        frame = av.VideoFrame.from_ndarray(planes, format="yuv420p")
        assert np.array_equal(converted(convert, frame), by_ffmpeg(frame))
        assert convert.uses_kernel == known or not ALIKE
    frame = av.VideoFrame.from_ndarray(flat, format="yuv420p")
    frame.colorspace = BT709
    assert np.array_equal(converted(convert, frame), by_ffmpeg(frame))
    assert not convert.uses_kernel


@pytest.mark.parametrize(
    ("pixel_format", "size"),
    [("yuv444p", (32, 32)), ("yuv422p", (32, 32)), ("rgb24", (32, 32)), ("gray", (32, 32))],
)
def test_other_formats_are_left_to_ffmpeg(pixel_format: str, size: tuple[int, int]) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=pixel_format)
    convert = RGBConverter(FFmpegConverter())
    for _ in range(2):
        assert np.array_equal(converted(convert, frame), by_ffmpeg(frame))
    assert not convert.uses_kernel


def test_odd_sizes_are_left_to_ffmpeg() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (33, 47, 3), dtype=np.uint8)
    frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="yuv420p")
    convert = RGBConverter(FFmpegConverter())
    for _ in range(2):
        assert np.array_equal(converted(convert, frame), by_ffmpeg(frame))
    assert not convert.uses_kernel
