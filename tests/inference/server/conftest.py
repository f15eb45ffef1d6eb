"""A tiny model behind the server's application."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from emu3_megatron.inference import Generator, ModelBundle
from emu3_megatron.inference.server.limits import Limits
from emu3_megatron.vision import VisionTokenizer
from tests.inference import worlds
from tests.inference.test_tasks import VISION

LIMITS = Limits(
    pixels=4096, length=400, understanding_area=256, upload_pixels=1 << 16, body_bytes=1 << 20, frames=12
)


@pytest.fixture(scope="module")
def generator() -> Iterator[Generator]:
    with worlds.one_process():
        torch.manual_seed(0)
        vision = VisionTokenizer(VISION).eval()
        config = worlds.model_config()
        yield Generator(ModelBundle(worlds.tiny_model(config), config, worlds.dialect("emu3-frames"), vision))
