"""Decoding still images: DALI in batches, PIL for what DALI lacks."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from emu3_megatron.media import dali
from emu3_megatron.media.errors import MediaError
from emu3_megatron.media.files import Media, read_media

Picture = npt.NDArray[np.uint8]
"""An RGB image, uint8 ``[H, W, 3]``, upright."""

DALI_FORMATS = frozenset({"JPEG", "MPO", "PNG", "WEBP", "BMP", "TIFF", "PPM"})
"""PIL's names of the formats that DALI decodes to the same pixels as PIL. Not GIF, AVIF; and not JPEG2000,
where a truncated file can end the whole process (segmentation fault, DALI 2.4)."""

DALI_MODES = frozenset({"L", "RGB", "RGBA"})
"""PIL's names of the pixel layouts that DALI decodes to the same pixels. Not 16-bit grey, palettes, CMYK."""

PROGRAM_FORMATS = frozenset({"EPS", "WMF"})
"""PIL's names of formats that are programs, which PIL lets others run: Ghostscript, Windows."""

MAX_IMAGE_PIXELS = 1 << 27
"""An image that claims more is refused before memory is taken for it (a decompression bomb)."""


def decode_images(media: Sequence[Media]) -> list[Picture | MediaError]:
    """Decode many images; a bad one yields its error in its place and never harms the others.

    Transparency is dropped, as PIL's ``convert("RGB")`` does; 16-bit samples keep their upper 8 bits; of an
    animation the first picture is taken.

    Raises:
        OSError: a fault of the file system that may pass.
    """
    results: list[Picture | MediaError | None] = [None] * len(media)
    for_dali: list[tuple[int, bytes]] = []
    for position, item in enumerate(media):
        try:
            encoded = read_media(item)
            if _suits_dali(encoded):
                for_dali.append((position, encoded))
            else:
                results[position] = _decode_with_pil(encoded)
        except MediaError as error:
            results[position] = error
    for (position, _), picture in zip(for_dali, _decode_batch([data for _, data in for_dali]), strict=True):
        results[position] = picture
    return [result if result is not None else MediaError("was not decoded") for result in results]


def decode_image(media: Media) -> Picture:
    """Decode one image; see `decode_images`.

    Raises:
        MediaError: the file is missing, empty, damaged or no image.
    """
    (result,) = decode_images([media])
    if isinstance(result, MediaError):
        raise result
    return result


def image_dimensions(media: Media) -> tuple[int, int]:
    """Height and width in pixels that an image's header claims, before it is turned upright.

    Raises:
        MediaError: as `decode_image`, for what the header shows.
    """
    with _open(read_media(media)) as image:
        return image.height, image.width


def _suits_dali(encoded: bytes) -> bool:
    """Read the header: is this for DALI? Raises `MediaError` where it is no image, or too large."""
    with _open(encoded) as image:
        if image.width * image.height > MAX_IMAGE_PIXELS:
            raise MediaError(
                f"claims {image.width}x{image.height} pixels, more than {MAX_IMAGE_PIXELS} in all"
            )
        if image.format not in DALI_FORMATS or image.mode not in DALI_MODES:
            return False
        try:
            return not getattr(image, "is_animated", False)
        except Exception as error:  # it looks for a second picture
            raise _bad_image(error) from error


def _decode_batch(encoded: list[bytes]) -> list[Picture | MediaError]:
    """Decode with DALI at once; where that fails, one by one, so that each file answers for itself."""
    if not encoded:
        return []
    try:
        return list(dali.decode_images([np.frombuffer(data, np.uint8) for data in encoded]))
    except RuntimeError:
        if len(encoded) > 1:
            middle = len(encoded) // 2
            return _decode_batch(encoded[:middle]) + _decode_batch(encoded[middle:])
    try:
        return [_decode_with_pil(encoded[0])]
    except MediaError as error:
        return [error]


def _decode_with_pil(encoded: bytes) -> Picture:
    """Decode one image with PIL."""
    with _open(encoded) as image:
        try:
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I"):  # 16-bit grey; PIL would clip at 255
                grey = (np.asarray(upright).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
                return np.repeat(grey[..., None], 3, axis=-1)
            return np.array(upright.convert("RGB"))
        except Exception as error:
            raise _bad_image(error) from error


def _open(encoded: bytes) -> Any:
    """Open with PIL, which reads the header only."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # our own limit on pixels speaks
            return Image.open(io.BytesIO(encoded), formats=_formats())
    except UnidentifiedImageError as error:
        raise MediaError("is not an image of a known format") from error
    except Exception as error:
        raise _bad_image(error) from error


@cache
def _formats() -> tuple[str, ...]:
    """PIL's names of the formats that are read, in PIL's order."""
    Image.init()
    return tuple(name for name in Image.ID if name not in PROGRAM_FORMATS)


def _bad_image(error: Exception) -> Exception:
    """What PIL's `error` amounts to. It raises many types; the bytes in memory are to blame for each."""
    if isinstance(error, MemoryError):
        return error
    return MediaError(f"cannot be decoded as an image: {str(error) or type(error).__name__}")
