"""A small raw corpus of real photographs and clips, and of clips made for one fault each."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from tests.media.clips import CLIPS, PHOTOGRAPHS, encode

Frames = npt.NDArray[np.uint8]
HEIGHT, WIDTH, RATE = 192, 256, 12


def photograph(name: str, size: tuple[int, int] | None = None) -> Frames:
    """A photograph of scikit-image, RGB ``[H, W, 3]``, scaled to `size` (rows, columns)."""
    with Image.open(PHOTOGRAPHS / name) as image:
        picture = image.convert("RGB")
        return np.asarray(picture if size is None else picture.resize(size[::-1], Image.Resampling.LANCZOS))


def pan(name: str, frames: int, speed: float = 2.0, start: int = 0) -> Frames:
    """A camera that moves to the right over a photograph, `speed` pixels a frame, and back at its end."""
    picture = photograph(name, (HEIGHT, 2 * WIDTH))
    span = picture.shape[1] - WIDTH
    places = (start + np.round(np.arange(frames) * speed).astype(int)) % (2 * span)
    return np.stack([picture[:, x : x + WIDTH] for x in np.where(places > span, 2 * span - places, places)])


def written(picture: Frames, text: str, size: int = 20) -> Frames:
    """A picture with lines of text over most of it."""
    image = Image.fromarray(picture)
    draw = ImageDraw.Draw(image)
    for row in range(4, image.height - size, int(1.4 * size)):
        font = ImageFont.load_default(size)
        draw.text((6, row), text, fill="white", font=font, stroke_width=2, stroke_fill="black")
    return np.asarray(image)


def text_page(rows: int = 640, columns: int = 560) -> Frames:
    """A page of print."""
    image = Image.new("RGB", (columns, rows), "white")
    draw = ImageDraw.Draw(image)
    words = "the quick brown fox jumps over the lazy dog and runs away into the deep forest"
    for row in range(30, rows - 30, 24):
        draw.text((30, row), words[row % 17 :][:52], fill="black", font=ImageFont.load_default(18))
    return np.asarray(image)


def chart(rows: int = 560, columns: int = 700) -> Frames:
    """A bar chart with axes and a few labels."""
    image = Image.new("RGB", (columns, rows), "white")
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(20)
    draw.line([(80, 60), (80, rows - 80), (columns - 40, rows - 80)], fill="black", width=3)
    draw.text((columns // 3, 14), "Sales by year", fill="black", font=font)
    for i, height in enumerate((120, 260, 190, 330, 240)):
        left = 120 + i * 105
        draw.rectangle([left, rows - 80 - height, left + 70, rows - 82], fill=(60, 110 + 20 * i, 200))
        draw.text((left + 8, rows - 70), f"202{i}", fill="black", font=font)
    return np.asarray(image)


def drawing(rows: int = 560, columns: int = 560) -> Frames:
    """Flat shapes, as in a cartoon."""
    image = Image.new("RGB", (columns, rows), (150, 205, 245))
    draw = ImageDraw.Draw(image)
    draw.ellipse([400, 40, 510, 150], fill=(255, 220, 70))
    draw.polygon([(0, 420), (180, 200), (360, 420)], fill=(110, 130, 150))
    draw.rectangle([0, 420, columns, rows], fill=(90, 180, 80))
    draw.ellipse([200, 300, 360, 520], fill=(200, 80, 60), outline="black", width=5)
    draw.ellipse([240, 340, 270, 370], fill="white", outline="black", width=4)
    return np.asarray(image)


def screenshot(rows: int = 600, columns: int = 900) -> Frames:
    """Windows with title bars, menus and buttons."""
    image = Image.new("RGB", (columns, rows), (236, 236, 236))
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(16)
    draw.rectangle([0, 0, columns, 36], fill=(50, 60, 80))
    draw.text((14, 8), "Editor - report.txt", fill="white", font=font)
    for i, name in enumerate(("File", "Edit", "View", "Tools", "Help")):
        draw.text((14 + 70 * i, 44), name, fill="black", font=font)
    draw.rectangle([0, 70, 210, rows], fill=(220, 224, 230), outline="grey")
    draw.rectangle([210, 70, columns - 1, rows - 40], fill="white", outline="grey")
    for i in range(12):
        draw.text((20, 90 + 36 * i), f"chapter {i}", fill="black", font=font)
        draw.text((230, 90 + 36 * i), "some lines of a document here", fill="black", font=font)
        draw.rectangle([700, 86 + 36 * i, 860, 112 + 36 * i], outline=(120, 120, 120), fill=(225, 230, 240))
    return np.asarray(image)


def write_videos(folder: Path) -> dict[str, Path]:
    """Clips of one fault each, and good ones."""
    cuts = np.concatenate([pan("astronaut.png", 36), pan("coffee.png", 36), pan("rocket.jpg", 36)])
    fade = np.concatenate([pan("chelsea.png", 36), pan("motorcycle_left.png", 36)]).astype(np.float32)
    gain = np.ones(72, np.float32)
    gain[26:46] = np.concatenate([np.linspace(1, 0, 10), np.linspace(0, 1, 10)])
    videos = {
        "cuts": cuts,
        "fade": (fade * gain[:, None, None, None]).astype(np.uint8),
        "static": np.repeat(pan("coffee.png", 1), 36, axis=0),
        "captioned": np.stack(
            [written(frame, "SUBSCRIBE FOR MORE VIDEOS") for frame in pan("rocket.jpg", 36)]
        ),
        "racing": pan("chelsea.png", 36, 28.0),
        "short": pan("astronaut.png", 14),
        "long": pan("hubble_deep_field.jpg", 96),
    }
    paths = {name: encode(folder / f"{name}.mp4", frames, rate=RATE) for name, frames in videos.items()}
    shutil.copy(CLIPS / "bikes.mp4", folder / "bikes.mp4")
    return {**paths, "bikes": folder / "bikes.mp4"}


def write_manifest(path: Path, records: list[dict[str, Any]]) -> Path:
    """A JSON Lines file."""
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    path.write_text("".join(lines), encoding="utf-8")
    return path


def save(path: Path, picture: Frames, **options: Any) -> Path:
    """An image file."""
    Image.fromarray(picture).save(path, **options)
    return path
