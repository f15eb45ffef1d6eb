"""The images and videos of a folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from emu3_megatron.errors import UserError

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".gif", ".avif"}
)
"""Endings of names that are taken for still images, in lower case."""

VIDEO_SUFFIXES = frozenset({".mp4", ".mkv", ".webm", ".mov", ".avi", ".m4v", ".mpg", ".mpeg", ".ts"})
"""Endings of names that are taken for videos, in lower case."""


@dataclass(frozen=True, kw_only=True)
class MediaFolder:
    """Paths of the media below a folder, in the order of their names."""

    images: tuple[Path, ...]
    """Still images."""
    videos: tuple[Path, ...]
    """Videos."""


def list_media(folder: str | Path) -> MediaFolder:
    """Find images and videos in a folder and in those below it; hidden files are passed over.

    Raises:
        UserError: the folder is missing, or holds neither.
    """
    root = Path(folder)
    if not root.is_dir():
        raise UserError(f"{root} is not a folder: give one that holds images or videos")
    paths = sorted(path for path in root.rglob("*") if path.is_file() and not path.name.startswith("."))
    images = tuple(path for path in paths if path.suffix.lower() in IMAGE_SUFFIXES)
    videos = tuple(path for path in paths if path.suffix.lower() in VIDEO_SUFFIXES)
    if not images and not videos:
        endings = " ".join(sorted(IMAGE_SUFFIXES | VIDEO_SUFFIXES))
        raise UserError(f"{root} holds no image and no video: names must end with one of {endings}")
    return MediaFolder(images=images, videos=videos)
