"""Scorers of candidates for the sample worlds: how much of a caption the checker sees in the picture."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from emu3_megatron.errors import UserError
from emu3_megatron.samples.captions import parse_caption
from emu3_megatron.samples.checker import Checker
from emu3_megatron.samples.world import WorldConfig


@lru_cache(maxsize=2)
def _checker(world: str) -> Checker:
    return Checker(WorldConfig.preset(world))


def score_full(prompt: str, pixels: npt.NDArray[np.uint8]) -> Mapping[str, float]:
    """Share of the attributes that `prompt` states and the checker of the full world reads from `pixels`.

    Raises:
        UserError: the caption states nothing.
    """
    return _score("full", prompt, pixels)


def score_quickstart(prompt: str, pixels: npt.NDArray[np.uint8]) -> Mapping[str, float]:
    """The same for the quickstart's world."""
    return _score("quickstart", prompt, pixels)


def _score(world: str, prompt: str, pixels: npt.NDArray[np.uint8]) -> Mapping[str, float]:
    stated = parse_caption(prompt)
    if not stated:
        raise UserError(f"prompt {prompt!r} states no attribute of the sample world")
    reading = _checker(world).read_image(pixels)
    right = [getattr(reading, name) == value for name, value in stated.items()]
    return {"alignment": sum(right) / len(right)}
