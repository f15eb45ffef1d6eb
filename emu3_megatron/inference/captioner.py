"""A model of ours as a captioner of `curation`: images and clips to text by the generation engine."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from emu3_megatron.curation.captions import CaptionAnswer, Captioner, CaptionError, CaptionRequest
from emu3_megatron.curation.config import CaptionConfig
from emu3_megatron.curation.models import fingerprint
from emu3_megatron.curation.server import ServerCaptioner
from emu3_megatron.errors import UserError, one_line
from emu3_megatron.grammar import Video
from emu3_megatron.inference.bundle import open_bundle
from emu3_megatron.inference.sampling import Sampling
from emu3_megatron.inference.tasks import Generator
from emu3_megatron.media import MediaError, Preprocessor, ResizeRule


class EngineCaptioner:
    """Captions by a `Generator`. The instruction is not shown: the model continues the picture with text."""

    concurrency = 1

    def __init__(self, generator: Generator, config: CaptionConfig, name: str) -> None:
        """`name` identifies the model."""
        self._generator, self._config = generator, config
        self._preprocessor = Preprocessor()
        self._vision = generator.bundle.vision_tokenizer
        self._rule = ResizeRule(area=config.area, spatial_factor=self._vision.spatial_factor)
        self._sampling = Sampling(temperature=config.temperature)
        self.batch_size = config.batch_size
        self.name = (
            f"{name}, area {config.area}, {config.max_tokens} tokens, temperature {config.temperature:g}"
        )

    def __call__(self, requests: Sequence[CaptionRequest]) -> list[CaptionAnswer | CaptionError]:
        """See `Captioner`."""
        answers: list[CaptionAnswer | CaptionError] = [CaptionError("was not captioned") for _ in requests]
        codes: dict[int, npt.NDArray[np.int64] | Video] = {}
        for place, request in enumerate(requests):
            try:
                codes[place] = self._encode(request)
            except (MediaError, UserError) as error:
                answers[place] = CaptionError(one_line(error))
        captions = self._generator.image_to_text(
            list(codes.values()), max_new_tokens=self._config.max_tokens, sampling=self._sampling
        )
        for place, caption in zip(codes, captions, strict=True):
            text = caption.text.strip()
            empty = CaptionError("the model's caption is empty")
            answers[place] = CaptionAnswer(text, caption.finished) if text else empty
        return answers

    def _encode(self, request: CaptionRequest) -> npt.NDArray[np.int64] | Video:
        """Codes ``[h, w]`` of an image; a clip, its frames at their own distance in time."""
        frames = np.stack(list(request.pictures))
        if request.kind == "video" and len(frames) % self._vision.temporal_factor:
            factor = self._vision.temporal_factor
            raise UserError(f"{len(frames)} frames are there; the model takes a multiple of {factor}")
        (pixels_TCHW,) = self._preprocessor([frames], [self._rule.plan(*frames.shape[1:3])])
        if request.kind == "image":
            return self._generator.encode_images(pixels_TCHW)[0]
        rate = round(len(frames) / request.seconds, 3)
        return self._generator.encode_clip(pixels_TCHW, rate, request.seconds)


def open_captioner(config: CaptionConfig) -> Captioner:
    """The captioner of a configuration: a server, or a model of ours on a single process.

    Raises:
        UserError: the server does not answer, the folder holds no model, or its dialect has no such clips.
    """
    if config.checkpoint is None:
        return ServerCaptioner(config)
    from emu3_megatron.parallel import platform
    from emu3_megatron.parallel.config import ParallelConfig
    from emu3_megatron.parallel.groups import initialize_parallel

    initialize_parallel(ParallelConfig(), platform.install(config.platform), seed=0)
    bundle = open_bundle(
        config.checkpoint, text_tokenizer=config.text_tokenizer, vision_tokenizer=config.vision_tokenizer
    )
    generator = Generator(bundle, max_rows=config.batch_size)
    return EngineCaptioner(generator, config, f"checkpoint {fingerprint(config.checkpoint)}")
