"""A corpus of good files and of every kind of bad one, for the tests of whole jobs."""

from __future__ import annotations

import json
import os
import struct
import wave
import zlib
from pathlib import Path
from typing import Any

import av
import numpy as np

from tests.media.clips import CLIPS, PHOTOGRAPHS, encode, encode_image, moving_picture

Record = dict[str, Any]


def write_bad_corpus(
    folder: Path, further: dict[str, tuple[Record, str]] | None = None
) -> tuple[Path, dict[str, str]]:
    """Write a manifest in which a good image stands before each bad file, and a good video at the end.

    Args:
        folder: where to; it is made.
        further: bad entries to add, by id: the entry and a part of its reason.

    Returns:
        The manifest, and for each bad entry's id a part of the reason that must be given.
    """
    folder.mkdir(parents=True)
    bad = {**_paths(folder), **_images(folder), **_videos(folder), **(further or {})}
    lines: list[Record] = []
    for number, (name, (record, _)) in enumerate(bad.items()):
        (folder / f"{number}.png").write_bytes(encode_image(moving_picture(1, 64, 64)[0], "PNG"))
        lines += [
            {"id": f"good {number}", "image": f"{number}.png", "caption": "a cat"},
            {"id": name, **record},
        ]
    lines.append({"id": "good video", "video": str(CLIPS / "carphone_pristine.mp4")})
    manifest = folder / "manifest.jsonl"
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return manifest, {name: reason for name, (_, reason) in bad.items()}


def _paths(folder: Path) -> dict[str, tuple[Record, str]]:
    """Paths that lead to no usable file, whatever its contents."""
    (folder / "folder.png").mkdir()
    (folder / "folder.mp4").mkdir()
    (folder / "empty.png").touch()
    (folder / "empty.mp4").touch()
    (folder / "file").write_text("a file, not a folder")
    os.mkfifo(folder / "pipe.png")
    os.mkfifo(folder / "pipe.mp4")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    (folder / "dangling.mp4").symlink_to(folder / "gone.mp4")
    found: dict[str, tuple[Record, str]] = {
        "missing image": ({"image": "none.png", "caption": "c"}, "no such file"),
        "missing video": ({"video": "none.mp4"}, "no such file"),
        "folder as image": ({"image": "folder.png"}, "is a folder"),
        "folder as video": ({"video": "folder.mp4"}, "is a folder"),
        "empty image": ({"image": "empty.png"}, "zero bytes"),
        "empty video": ({"video": "empty.mp4"}, "zero bytes"),
        "pipe as image": ({"image": "pipe.png"}, "pipe"),
        "pipe as video": ({"video": "pipe.mp4"}, "pipe"),
        "link to itself": ({"image": "loop.png"}, "symbolic links"),
        "dangling link": ({"video": "dangling.mp4"}, "no such file"),
        "folder that is a file": ({"image": "file/a.png"}, "not a directory"),
        "endless name": ({"image": "n" * 300 + ".png"}, "name too long"),
    }
    if os.geteuid():  # root reads everything
        (folder / "locked.png").write_bytes(b"x")
        (folder / "locked.png").chmod(0)
        found["unreadable"] = ({"image": "locked.png"}, "permission denied")
    return found


def _images(folder: Path) -> dict[str, tuple[Record, str]]:
    """Files that are no image, or a damaged one."""
    photograph = (PHOTOGRAPHS / "rocket.jpg").read_bytes()
    png = encode_image(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8), "PNG")
    middle = bytearray(png)
    middle[len(png) // 2 : len(png) // 2 + 64] = bytes(64)
    contents = {
        "text as image": (b"not an image\n" * 100, "not an image"),
        "noise as image": (np.random.default_rng(1).bytes(5000), "not an image"),
        "video as image": ((CLIPS / "carphone_pristine.mp4").read_bytes(), "not an image"),
        "signature alone": (png[:8], ""),
        "header alone": (png[:40], ""),
        "image cut at a tenth": (photograph[: len(photograph) // 10], ""),
        "image cut in half": (photograph[: len(photograph) // 2], "truncated"),
        "image cut at its end": (png[: len(png) - 40], ""),
        "corrupted middle of an image": (bytes(middle), ""),
        "image of claimed size": (_claiming(png, 60_000, 60_000), ""),
        "decompression bomb": (b"P6\n90000 90000\n255\n" + bytes(100), "pixels"),
    }
    for name, (data, _) in contents.items():
        (folder / f"{name}.png").write_bytes(data)
    return {name: ({"image": f"{name}.png"}, reason) for name, (_, reason) in contents.items()}


def _claiming(png: bytes, width: int, height: int) -> bytes:
    """A PNG whose header states another size, with the checksum that belongs to it."""
    header = b"IHDR" + struct.pack(">II", width, height) + png[24:29]
    return png[:12] + header + struct.pack(">I", zlib.crc32(header)) + png[33:]


def _videos(folder: Path) -> dict[str, tuple[Record, str]]:
    """Files that are no video, or a damaged one."""
    real = (CLIPS / "carphone_pristine.mp4").read_bytes()
    webm = encode(folder / "whole.webm", moving_picture(), encoder="libvpx-vp9").read_bytes()
    avi = encode(folder / "whole.avi", moving_picture(), encoder="mpeg4").read_bytes()
    media = real.index(b"mdat") + 4
    contents = {
        "text as video.mp4": (b"not a video\n" * 100, "cannot be read as video"),
        "noise as video.mp4": (np.random.default_rng(2).bytes(5000), "cannot be read as video"),
        "video cut at a tenth.mp4": (real[: len(real) // 10], ""),
        "video cut at two thirds.mp4": (real[: len(real) * 2 // 3], ""),
        "webm cut.webm": (webm[: len(webm) * 6 // 10], "truncated"),
        "webm header alone.webm": (webm[:300], ""),
        "avi cut.avi": (avi[: len(avi) // 2], ""),
        "corrupted start of a video.mp4": (real[:media] + bytes(20_000) + real[media + 20_000 :], ""),
        "frames of claimed size.y4m": (b"YUV4MPEG2 W60000 H60000 F25:1\nFRAME\n" + bytes(1000), ""),
    }
    for name, (data, _) in contents.items():
        (folder / name).write_bytes(data)
    with wave.open(str(folder / "sound alone.wav"), "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(8000)
        sound.writeframes(bytes(16_000))
    with av.open(str(folder / "no frames.mp4"), "w") as container:
        container.add_stream("libx264", rate=12, width=64, height=64)
        container.start_encoding()
    found: dict[str, tuple[Record, str]] = {
        name: ({"video": name}, reason) for name, (_, reason) in contents.items()
    }
    found["sound alone"] = ({"video": "sound alone.wav"}, "no video stream")
    found["no frames"] = ({"video": "no frames.mp4"}, "")
    return found
