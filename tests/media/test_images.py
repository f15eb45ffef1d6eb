"""Images decode to the pixels that PIL gives, whichever decoder takes them."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from emu3_megatron.media import decode_image
from tests.media.clips import PHOTOGRAPHS, encode_image


@pytest.mark.parametrize("name", ["astronaut.png", "camera.png", "horse.png", "rocket.jpg", "retina.jpg"])
def test_photographs_equal_pil(name: str) -> None:
    path = PHOTOGRAPHS / name
    assert np.array_equal(decode_image(path), np.array(Image.open(path).convert("RGB")))


MODES = ("RGB", "L", "CMYK", "P", "RGBA", "LA", "1")
FORMATS: list[tuple[str, dict[str, object], set[str]]] = [
    ("JPEG", {"quality": 80}, {"P", "RGBA", "LA"}),
    ("JPEG", {"progressive": True}, {"P", "RGBA", "LA"}),
    ("WEBP", {"lossless": True}, set()),
    ("BMP", {}, {"CMYK", "LA"}),
    ("TIFF", {}, set()),
    ("GIF", {}, {"CMYK"}),
    ("AVIF", {}, set()),
    ("PPM", {}, {"CMYK", "P", "LA"}),
    ("JPEG2000", {}, {"P", "1"}),
]
"""Formats, options, and the modes that PIL does not write in them."""


@pytest.mark.parametrize(
    ("file_format", "options", "mode"),
    [(name, options, mode) for name, options, never in FORMATS for mode in MODES if mode not in never],
)
def test_formats_and_modes_equal_pil(file_format: str, options: dict[str, object], mode: str) -> None:
    picture = Image.fromarray(np.array(Image.open(PHOTOGRAPHS / "chelsea.png"))[:65, :67]).convert(mode)
    stream = io.BytesIO()
    picture.save(stream, format=file_format, **options)
    reference = np.array(Image.open(io.BytesIO(stream.getvalue())).convert("RGB"))
    assert np.array_equal(decode_image(stream.getvalue()), reference)


def test_sixteen_bit_grey_keeps_its_upper_half(tmp_path: Path) -> None:
    grey = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    decoded = decode_image(tmp_path / "grey.png")
    assert np.array_equal(decoded, np.repeat((grey >> 8).astype(np.uint8)[..., None], 3, -1))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["RGB", "CMYK"])
def test_exif_orientation_is_applied(orientation: int, mode: str) -> None:
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = Image.fromarray(np.array(Image.open(PHOTOGRAPHS / "chelsea.png"))[:40, :64]).convert(mode)
    stream = io.BytesIO()
    picture.save(stream, format="JPEG", exif=exif)
    reference = np.array(ImageOps.exif_transpose(Image.open(io.BytesIO(stream.getvalue()))).convert("RGB"))
    assert np.array_equal(decode_image(stream.getvalue()), reference)


def test_the_first_picture_of_an_animation_is_taken() -> None:
    pictures = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    stream = io.BytesIO()
    pictures[0].save(stream, format="WEBP", save_all=True, append_images=pictures[1:], lossless=True)
    assert tuple(decode_image(stream.getvalue())[0, 0]) == (255, 0, 0)


def test_file_names_with_spaces_and_chinese(tmp_path: Path) -> None:
    path = tmp_path / "一只 猫.png"
    picture = np.full((8, 8, 3), 77, np.uint8)
    path.write_bytes(encode_image(picture, "PNG"))
    assert np.array_equal(decode_image(path), picture)
