"""The few calls we make into DALI, and the traps around them.

Decoding uses the dynamic mode, where an error belongs to the call that caused it. (In a pipeline, one bad
sample loses its batch.) Preprocessing is a pipeline: its input is pixels, which cannot fail.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, distributions, version
from typing import Any

import numpy as np
import numpy.typing as npt
import nvidia.dali.backend
import nvidia.dali.experimental.dynamic as ndd
from nvidia.dali import types


def distribution() -> str:
    """Name of the installed DALI package, which depends on the CUDA version it was built for."""
    for name in ("nvidia-dali-cuda130", "nvidia-dali-cuda120"):
        try:
            version(name)
            return name
        except PackageNotFoundError:
            continue
    names = (d.metadata["Name"] or "" for d in distributions())
    return next(name for name in names if name.startswith("nvidia-dali"))


def gpu_available() -> bool:
    """Whether DALI sees a GPU. Asking never fails, with or without a driver."""
    return bool(nvidia.dali.backend.GetCUDADeviceCount())


def check_device(device: str) -> str:
    """Return `device` if it is ``cpu``, or ``gpu`` and one is there; raise `ValueError` otherwise."""
    if device not in ("cpu", "gpu"):
        raise ValueError(f"media device {device!r} must be cpu or gpu")
    if device == "gpu" and not gpu_available():
        raise ValueError("media device gpu: DALI sees no GPU; check the driver, or choose cpu")
    return device


def reason(error: Exception) -> str:
    """The one line of a DALI error that says what was wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "rror" in line or "ailed" in line]
    return (telling or lines or [type(error).__name__])[-1][:200]


def decode_images(encoded: Sequence[npt.NDArray[np.uint8]]) -> list[npt.NDArray[np.uint8]]:
    """Decode a batch of images to RGB, uint8 ``[H, W, 3]`` each, EXIF orientation applied.

    On the CPU always: GPU JPEG decoders round differently, and a token must not depend on the machine.
    Raises `RuntimeError` where any of them fails.
    """
    decoded = ndd.decoders.image(ndd.batch(list(encoded)), device="cpu", output_type=types.RGB)
    return [np.array(picture) for picture in decoded.cpu()]


def decode_video(
    encoded: npt.NDArray[np.uint8], indices: Sequence[int], device: str, device_index: int | None = None
) -> npt.NDArray[np.uint8]:
    """Decode chosen frames of a video file held in memory to RGB, uint8 ``[T, H, W, 3]``.

    `device` is ``cpu`` or ``gpu``, and `device_index` which GPU (the thread's current one where None).

    Raises `RuntimeError` on a codec that this device lacks, on damage, and on an index past the end
    (``pad_mode`` none; the default would invent black frames).
    """
    place = device if device_index is None else f"{device}:{device_index}"
    decoded: Any = ndd.decoders.video(
        ndd.as_tensor(encoded), device=place, frames=[int(i) for i in indices], pad_mode="none"
    )
    return np.array(decoded.cpu())
