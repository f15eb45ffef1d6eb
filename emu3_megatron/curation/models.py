"""Networks by a path on this machine: ONNX, TorchScript and Hugging Face folders. Nothing is downloaded."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from emu3_megatron.errors import UserError
from emu3_megatron.files import sha256_file

Array = npt.NDArray[Any]

IMAGE_SIZE = 224
"""Side of the pictures that CLIP and most classifiers take, where the file does not say."""

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Of CLIP's preprocessing (github.com/openai/CLIP), channels in 0..1."""


class OnnxModel:
    """An ONNX file in ONNX Runtime, on one thread."""

    def __init__(self, path: Path, device: str = "cpu") -> None:
        """Open the file. Raises `UserError` where it is none."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        wanted = ["CUDAExecutionProvider"] if device.startswith("cuda") else ["CPUExecutionProvider"]
        if wanted[0] not in onnxruntime.get_available_providers():
            raise UserError(
                f"{path}: this onnxruntime has no {wanted[0]}; install onnxruntime-gpu, or use the CPU"
            )
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=wanted)
        except Exception as error:  # onnxruntime's own types share no base class
            raise UserError(f"{path}: not a usable ONNX file: {str(error).splitlines()[0]}") from error
        self._inputs = [value.name for value in self._session.get_inputs()]
        shape = self._session.get_inputs()[0].shape
        self.image_size = shape[-1] if len(shape) == 4 and isinstance(shape[-1], int) else IMAGE_SIZE

    def __call__(self, *inputs: Array) -> list[Array]:
        """All outputs for the inputs in the file's order."""
        if len(inputs) != len(self._inputs):
            raise UserError(
                f"the ONNX model takes {len(self._inputs)} inputs ({self._inputs}), not {len(inputs)}"
            )
        return list(self._session.run(None, dict(zip(self._inputs, inputs, strict=True))))


def to_device(model: Any, device: str) -> Any:
    """A torch module for inference, on `device`. Raises `UserError` where that cannot be used."""
    try:
        return model.eval().to(device)
    except (RuntimeError, AssertionError) as error:  # no such device, none that is free, no torch for it
        raise UserError(
            f"the device {device!r} cannot be used: {str(error).splitlines()[0]}; name another one, or cpu"
        ) from error


def load_torchscript(path: Path) -> Any:
    """A TorchScript file as a function from arrays to a list of arrays. Raises `UserError`."""
    import torch

    try:
        module = torch.jit.load(str(path), map_location="cpu").eval()
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(
            f"{path}: neither .onnx nor a TorchScript file: {str(error).splitlines()[0]}"
        ) from error

    def run(*inputs: Array) -> list[Array]:
        with torch.no_grad():
            result = module(*(torch.from_numpy(value) for value in inputs))
        results = result if isinstance(result, (list, tuple)) else [result]
        return [value.numpy() for value in results]

    return run


def fingerprint(path: Path) -> str:
    """SHA-256 of a file, or of the files of a folder with their names."""
    if path.is_file():
        return sha256_file(path)
    digest = hashlib.sha256()
    for part in sorted(part for part in path.rglob("*") if part.is_file()):
        digest.update(f"{part.relative_to(path)} {sha256_file(part)}\n".encode())
    return digest.hexdigest()


def clip_pixels(pictures: list[Array], size: int = IMAGE_SIZE) -> Array:
    """CLIP's preprocessing: shorter side to `size`, middle square, float32 ``[N, 3, size, size]``."""
    from PIL import Image

    rows = []
    for picture in pictures:
        height, width = picture.shape[:2]
        shorter = min(height, width)
        image = Image.fromarray(np.asarray(picture)).resize(
            (size * width // shorter, size * height // shorter), Image.Resampling.BICUBIC
        )
        left, top = (image.width - size) // 2, (image.height - size) // 2
        values = np.asarray(image.crop((left, top, left + size, top + size)), np.float32) / 255
        rows.append(((values - CLIP_MEAN) / CLIP_STD).transpose(2, 0, 1))
    return np.stack(rows).astype(np.float32)
