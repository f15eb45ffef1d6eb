"""From RGB pixels of any size to what the vision tokenizer eats: one DALI graph for stills and video.

Resize (cubic, antialiased, rounded to 8 bits as the released PIL code does), centred crop, normalisation to
[-1, 1].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from nvidia.dali import fn, pipeline_def, types
from torch.utils.dlpack import from_dlpack

from emu3_megatron.media import dali
from emu3_megatron.media.geometry import Geometry

MIDDLE = 127.5
"""Value of 8-bit samples that becomes 0; also the divisor: ``x / 127.5 - 1``."""


@pipeline_def(prefetch_queue_depth=1, exec_async=False, exec_pipelined=False)  # type: ignore[untyped-decorator]
def _graph(device: str) -> Any:
    """Resize, crop and normalise clips of shape ``[F, H, W, 3]``; a still is a clip of one frame."""
    frames = fn.external_source(name="frames", layout="FHWC", dtype=types.UINT8, ndim=4)
    size = fn.external_source(name="size", dtype=types.FLOAT, ndim=1)
    crop = fn.external_source(name="crop", dtype=types.FLOAT, ndim=1)
    if device == "gpu":
        frames = frames.gpu()
    resized = fn.resize(frames, size=size, interp_type=types.INTERP_CUBIC, antialias=True, dtype=types.UINT8)
    return fn.crop_mirror_normalize(
        resized, crop=crop, mean=[MIDDLE] * 3, std=[MIDDLE] * 3, dtype=types.FLOAT, output_layout="FCHW"
    )


class Preprocessor:
    """Runs the graph on batches; keep one for each thread."""

    def __init__(
        self, *, device: str = "cpu", device_index: int | None = None, batch_size: int = 64, threads: int = 1
    ) -> None:
        """Build the graph.

        Args:
            device: ``cpu`` or ``gpu``.
            device_index: which GPU, as CUDA counts them; the calling thread's current one where None.
            batch_size: clips in one run of the graph; longer lists are cut.
            threads: CPU threads of the graph.

        Raises:
            ValueError: a GPU is asked for where DALI sees none.
        """
        self._batch_size = batch_size
        on_gpu = dali.check_device(device) == "gpu"
        if on_gpu and device_index is None:
            device_index = torch.cuda.current_device()
        self._device = torch.device(f"cuda:{device_index}") if on_gpu else None
        self._pipeline = _graph(
            device,
            batch_size=batch_size,
            num_threads=threads,
            # Without a GPU DALI takes None only; 0 fails even for a graph that runs on the CPU.
            device_id=device_index if on_gpu else None,
        )
        self._pipeline.build()

    def __call__(
        self, clips: Sequence[npt.NDArray[np.uint8]], geometries: Sequence[Geometry]
    ) -> list[torch.Tensor]:
        """Preprocess clips of any sizes.

        Args:
            clips: RGB, uint8 ``[F, H, W, 3]`` each; a still has F = 1.
            geometries: the size of each.

        Returns:
            float32 ``[F, 3, height, width]`` in [-1, 1] each, on the graph's device.
        """
        if len(clips) != len(geometries):
            raise ValueError(f"{len(clips)} clips but {len(geometries)} geometries")
        results: list[torch.Tensor] = []
        for first in range(0, len(clips), self._batch_size):
            part = slice(first, first + self._batch_size)
            results += self._run(clips[part], geometries[part])
        return results

    def _run(
        self, clips: Sequence[npt.NDArray[np.uint8]], geometries: Sequence[Geometry]
    ) -> list[torch.Tensor]:
        """One run of the graph."""
        feed = self._pipeline.feed_input
        feed("frames", [np.ascontiguousarray(clip) for clip in clips])
        feed("size", [np.array([g.resized_height, g.resized_width], np.float32) for g in geometries])
        feed("crop", [np.array([g.height, g.width], np.float32) for g in geometries])
        (output,) = self._pipeline.run()
        # The graph reuses its output's memory in the next run, hence the copies.
        results = [from_dlpack(output[i]).clone() for i in range(len(clips))]
        if self._device is not None:
            # On a GPU they wait in torch's stream, behind the encoder's work; the next run is in another one.
            torch.cuda.current_stream(self._device).synchronize()
        return results


def to_uint8(pixels: torch.Tensor) -> npt.NDArray[np.uint8]:
    """Undo the normalisation: ``[..., 3, H, W]`` in [-1, 1] (clipped) to uint8 ``[..., H, W, 3]``."""
    levels = (pixels.detach().float().cpu() * MIDDLE + MIDDLE).round().clamp(0, 255).to(torch.uint8)
    array: npt.NDArray[np.uint8] = levels.movedim(-3, -1).contiguous().numpy()
    return array
