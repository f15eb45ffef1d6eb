"""Draws the pictures that training shows in TensorBoard (`samples.painter`)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from emu3_megatron.errors import UserError
from emu3_megatron.grammar import Dialect
from emu3_megatron.inference.bundle import ModelBundle
from emu3_megatron.inference.sampling import Sampling
from emu3_megatron.inference.tasks import Generator
from emu3_megatron.model import ModelConfig
from emu3_megatron.text import load_text_tokenizer
from emu3_megatron.training.config import SamplesConfig
from emu3_megatron.vision import VisionTokenizer
from emu3_megatron.vocabulary import Vocabulary


class Painter:
    """Draws the same prompts with the same random numbers at every call.

    Args:
        model: The whole model, in training.
        shape: Its configuration.
        vocabulary: Of the run's datasets.
        config: What to draw and with which tokenizers.

    Raises:
        UserError: the vision tokenizer has another number of codes.
    """

    def __init__(
        self, model: torch.nn.Module, shape: ModelConfig, vocabulary: Vocabulary, config: SamplesConfig
    ) -> None:
        vision = VisionTokenizer.from_pretrained(config.vision_tokenizer)
        if vision.config.codebook_size != vocabulary.codebook_size:
            raise UserError(
                f"samples.vision_tokenizer={config.vision_tokenizer} has "
                f"{vision.config.codebook_size} codes, the datasets' vocabulary "
                f"{vocabulary.codebook_size}; give the one they were made with"
            )
        vision = vision.to(next(model.parameters()).device).eval()
        text = load_text_tokenizer(config.text_tokenizer)
        dialect = Dialect.preset(config.dialect, vocabulary, text)
        self._generator = Generator(ModelBundle(model, shape, dialect, vision))
        self._config = config

    def __call__(self) -> list[npt.NDArray[np.uint8]]:
        """RGB pictures ``[H, W, 3]``, one for each prompt."""
        drawn = self._generator.text_to_image(
            self._config.prompts,
            height=self._config.height,
            width=self._config.width,
            sampling=Sampling(guidance=self._config.guidance, top_k=2048),
        )
        return [image.pixels for image in drawn]
