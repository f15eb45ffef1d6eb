"""Whatever is wrong with a file becomes a MediaError with a reason; a passing fault does not."""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from emu3_megatron.media import MediaError, OpenVideo, decode_images, frame_source, probe_video
from emu3_megatron.media import files as media_files
from tests.media.clips import CLIPS, PHOTOGRAPHS, encode, encode_image, moving_picture

NOBODY = 65534
"""The user without rights, on Linux."""


def use_video(path: Path, indices: tuple[int, ...] | None = None) -> None:
    with OpenVideo(path) as video:
        frame_source("auto").frames(video, indices or range(video.info.frame_count))


def test_bad_paths(tmp_path: Path) -> None:
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("this is no video\n" * 50)
    (tmp_path / "picture.mp4").write_bytes(encode_image(moving_picture(1)[0], "PNG"))
    expected = {
        "missing.mp4": "no such file",
        "folder.mp4": "is a folder",
        "empty.mp4": "zero bytes",
        "text.mp4": "cannot be read as video",
    }
    for name, reason in expected.items():
        with pytest.raises(MediaError, match=reason):
            probe_video(tmp_path / name)
        (error,) = decode_images([tmp_path / name])
        assert isinstance(error, MediaError)
        assert str(error)
    with pytest.raises(MediaError, match="no such file"):
        use_video(tmp_path / ("n" * 10) / "x.mp4")


@contextlib.contextmanager
def without_rights() -> Iterator[None]:
    """Root reads everything, so root is somebody else for a moment."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(user)


def test_unreadable_file() -> None:
    with tempfile.TemporaryDirectory() as folder:  # unlike pytest's, not below a folder of root's alone
        os.chmod(folder, 0o755)
        path = Path(folder) / "a.png"
        path.write_bytes(b"x")
        with without_rights():
            assert path.read_bytes() == b"x"
        path.chmod(0)
        with without_rights():
            (error,) = decode_images([path])
    assert "permission denied" in str(error)


@pytest.mark.parametrize("part", [0.3, 0.6, 0.9, 0.99])
@pytest.mark.parametrize(
    ("name", "encoder", "container_options"),
    [
        ("tail.mp4", "libx264", {}),
        ("faststart.mp4", "libx264", {"movflags": "faststart"}),
        ("a.mkv", "libx264", {}),
        ("a.webm", "libvpx-vp9", {}),
        ("a.avi", "mpeg4", {}),
    ],
)
def test_truncated_video_is_refused(
    tmp_path: Path, part: float, name: str, encoder: str, container_options: dict[str, str]
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (48, 96, 128, 3), dtype=np.uint8)
    path = encode(tmp_path / name, noise, encoder=encoder, container_options=container_options)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])
    with pytest.raises(MediaError):
        use_video(path)


def test_truncated_real_clip_is_refused(tmp_path: Path) -> None:
    data = (CLIPS / "bikes.mp4").read_bytes()
    path = tmp_path / "bikes.mp4"
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(MediaError):
        use_video(path, (0,))


@pytest.mark.parametrize("seed", range(4))
def test_flipped_bits_in_a_real_clip_are_noticed(tmp_path: Path, seed: int) -> None:
    """H.264's decoder marks what it conceals, and frames that refer to it are refused too."""
    data = np.frombuffer((CLIPS / "bikes.mp4").read_bytes(), np.uint8).copy()
    generator = np.random.default_rng(seed)
    data[generator.integers(len(data) // 10, len(data) * 9 // 10, 3)] ^= np.uint8(1 << generator.integers(8))
    (tmp_path / "a.mp4").write_bytes(data.tobytes())
    with pytest.raises(MediaError, match="damaged"):
        use_video(tmp_path / "a.mp4")


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM"])
@pytest.mark.parametrize("part", [0.5, 0.95])
def test_truncated_image_is_refused(file_format: str, part: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encode_image(noise, file_format)
    (result,) = decode_images([data[: int(len(data) * part)]])
    assert isinstance(result, MediaError)
    assert str(result)


def test_a_damaged_animation_is_a_bad_file() -> None:
    """PIL's look for further pictures raises errors of many types."""
    pictures = [PIL.Image.fromarray(picture) for picture in moving_picture(3, 24, 20)]
    buffer = io.BytesIO()
    pictures[0].save(buffer, "GIF", save_all=True, append_images=pictures[1:])
    encoded = buffer.getvalue()
    for size in range(1, len(encoded), max(1, len(encoded) // 200)):
        (result,) = decode_images([encoded[:size]])
        assert isinstance(result, (np.ndarray, MediaError)), size


def test_a_path_that_cannot_be_one_is_a_bad_file() -> None:
    (error,) = decode_images(["a\0.png"])
    assert isinstance(error, MediaError)


@pytest.mark.parametrize("tag", ["5.3", "soon", "00:00:0x"])
def test_a_duration_tag_that_is_none_is_ignored(tmp_path: Path, tag: str) -> None:
    path = tmp_path / "a.mkv"
    encode(path, moving_picture(6), encoder="libx264")
    encoded = path.read_bytes()
    start = encoded.index(b"DURATION") + 8
    start = encoded.index(b"00:00:0", start)
    size = len("00:00:00.750000000")
    path.write_bytes(encoded[:start] + tag.encode().ljust(size, b" ") + encoded[start + size :])
    assert probe_video(path).frame_count == 6


def test_one_bad_image_harms_no_other(tmp_path: Path) -> None:
    good = [PHOTOGRAPHS / name for name in ("astronaut.png", "rocket.jpg", "coffee.png")]
    broken = (PHOTOGRAPHS / "astronaut.png").read_bytes()[:5000]
    results = decode_images(
        [good[0], broken, good[1], tmp_path / "none.png", b"", good[2], b"\x89PNG garbage"]
    )
    bad = [isinstance(result, MediaError) for result in results]
    assert bad == [False, True, False, True, True, False, True]
    alone = [decode_images([path])[0] for path in good]
    for together, single in zip([results[0], results[2], results[5]], alone, strict=True):
        assert isinstance(together, np.ndarray)
        assert np.array_equal(together, single)


def test_a_playlist_or_a_session_is_no_video(tmp_path: Path) -> None:
    """FFmpeg follows either to other files and hosts."""
    encode(tmp_path / "clip.mp4", moving_picture())
    texts = {
        "list.mp4": "ffconcat version 1.0\nfile clip.mp4\n",
        "absolute.mp4": f"ffconcat version 1.0\nfile {tmp_path / 'clip.mp4'}\n",
        "session.mp4": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=-\nc=IN IP4 127.0.0.1\nt=0 0\n"
        "m=video 50040 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
        "stream.mp4": "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\nclip.mp4\n#EXT-X-ENDLIST\n",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
        begin = time.perf_counter()
        for media in (tmp_path / name, text.encode()):
            with pytest.raises(MediaError):
                probe_video(media)
        assert time.perf_counter() - begin < 9, name  # a socket that hears nothing gives up after 10 s


def test_an_image_that_is_a_program_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import EpsImagePlugin

    def run(*_: object, **__: object) -> None:
        raise AssertionError("Ghostscript was started")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", run)
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n{} loop\n%%EOF\n"
    (error,) = decode_images([program])
    assert isinstance(error, MediaError)
    assert "known format" in str(error)


def test_decompression_bomb_is_refused() -> None:
    header = b"P6\n60000 60000\n255\n" + b"\0" * 100
    (result,) = decode_images([header])
    assert isinstance(result, MediaError)
    assert "pixels" in str(result)


def test_a_passing_fault_is_not_the_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(encode_image(moving_picture(1)[0], "PNG"))

    def broken(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(media_files, "open", broken, raising=False)
    with pytest.raises(OSError, match="Input/output") as caught:
        decode_images([path])
    assert not isinstance(caught.value, MediaError)


def test_a_passing_fault_during_video_is_not_the_files(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """FFmpeg reads through our stream, so a fault of the disk arrives as itself."""
    path = encode(tmp_path / "a.mp4", moving_picture())

    class Flaky(io.FileIO):
        def readinto(self, buffer: object) -> int:
            raise OSError(5, "Input/output error")

        def read(self, size: int = -1) -> bytes:
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(media_files, "open", lambda *_: Flaky(path), raising=False)
    with pytest.raises(OSError, match="Input/output") as caught:
        probe_video(path)
    assert not isinstance(caught.value, MediaError)
