"""From pixels to vision codes: samples of one shape are encoded together."""

from __future__ import annotations

import time

import numpy as np
import numpy.typing as npt
import torch

from emu3_megatron.tokenization.retrying import retry
from emu3_megatron.vision import VisionTokenizer

Codes = npt.NDArray[np.int64]


class BucketEncoder:
    """Collects samples by shape and encodes a bucket when it is full.

    Batches depend on nothing but the samples added since the last `finish`, in order: neither on timing nor
    on other shards. So the same shard gives the same batches, and the same codes, whoever makes it.

    Args:
        tokenizer: the vision tokenizer, on its device, in evaluation mode.
        max_pixels: pixels times frames of a batch; a larger sample makes a batch of its own.
    """

    def __init__(self, tokenizer: VisionTokenizer, *, max_pixels: int) -> None:
        self._tokenizer = tokenizer
        self._max_pixels = max_pixels
        self._buckets: dict[tuple[int, ...], list[tuple[int, torch.Tensor]]] = {}
        self._codes: dict[int, Codes] = {}
        self.seconds = 0.0
        """Time spent encoding."""

    def add(self, key: int, pixels: torch.Tensor, *, video: bool) -> None:
        """Take a sample.

        Args:
            key: names the sample in the result of `finish`.
            pixels: ``[F, 3, H, W]`` in [-1, 1]; F = 1 for an image.
            video: whether it is a clip; F is then a multiple of the temporal factor.
        """
        sample = pixels if video else pixels[0]
        bucket = self._buckets.setdefault(tuple(sample.shape), [])
        bucket.append((key, sample))
        if (len(bucket) + 1) * sample.numel() > self._max_pixels * 3:
            self._encode(self._buckets.pop(tuple(sample.shape)))

    def finish(self) -> dict[int, Codes]:
        """Encode what is left.

        Returns:
            Codes by key of all samples since the last call, int64: ``[h, w]`` of images, ``[t, h, w]``
            of clips.

        Raises:
            OutOfMemory: memory stayed too short.
        """
        while self._buckets:
            self._encode(self._buckets.pop(next(iter(self._buckets))))
        codes, self._codes = self._codes, {}
        return codes

    def clear(self) -> None:
        """Forget the samples of a shard that failed."""
        self._buckets.clear()
        self._codes.clear()

    def _encode(self, bucket: list[tuple[int, torch.Tensor]]) -> None:
        """Encode one bucket, as a whole even where memory is short: a batch's shape decides its codes."""
        begin = time.perf_counter()
        codes = retry(self._codes_of, [sample for _, sample in bucket])
        for (key, _), code in zip(bucket, codes, strict=True):
            self._codes[key] = code
        self.seconds += time.perf_counter() - begin

    def _codes_of(self, samples: list[torch.Tensor]) -> Codes:
        """Codes of samples of one shape, ``[B, ...]``."""
        codes: Codes = self._tokenizer.encode(torch.stack(samples)).cpu().numpy()
        return codes
