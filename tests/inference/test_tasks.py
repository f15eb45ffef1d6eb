"""From prompts to pixels and captions, with tiny random parts."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from emu3_megatron.errors import UserError
from emu3_megatron.inference import Generator, ModelBundle, Sampling
from emu3_megatron.inference.tasks import image_size
from emu3_megatron.vision import VisionTokenizer, VisionTokenizerConfig
from tests.inference import worlds

VISION = VisionTokenizerConfig(
    channels=32, channel_multiplier=(1, 1, 1), num_res_blocks=1, attention_resolutions=(2,), codebook_size=64
)
GUIDED = Sampling(guidance=2.0, top_k=10)


@pytest.fixture(scope="module", autouse=True)
def _world() -> Iterator[None]:
    with worlds.one_process():
        yield


@pytest.fixture(scope="module")
def bundle() -> ModelBundle:
    torch.manual_seed(0)
    config = worlds.model_config()
    vision = VisionTokenizer(VISION).eval()
    return ModelBundle(worlds.tiny_model(config), config, worlds.dialect(), vision)


@pytest.fixture(scope="module")
def generator(bundle: ModelBundle) -> Generator:
    return Generator(bundle)


def test_text_to_image(generator: Generator, bundle: ModelBundle) -> None:
    """Pixels are those of the codes; seeds are what is said; a second call repeats the first."""
    from emu3_megatron.media import to_uint8

    prompts = ["a red dog", "blue", "a"]
    finished: list[int] = []
    images = generator.text_to_image(
        prompts, height=8, width=12, sampling=GUIDED, seeds=[5, 6, 5], progress=finished.append
    )
    assert sum(finished) == 3
    assert [(image.prompt, image.seed) for image in images] == list(zip(prompts, [5, 6, 5], strict=True))
    for image in images:
        assert image.codes.shape == (2, 3)
        assert image.pixels.shape == (8, 12, 3)
        expected = to_uint8(bundle.vision_tokenizer.decode(torch.from_numpy(image.codes)[None])[0])
        assert np.abs(expected.astype(int) - image.pixels.astype(int)).max() <= 1
    (again,) = generator.text_to_image(["blue"], height=8, width=12, sampling=GUIDED, seeds=[6])
    np.testing.assert_array_equal(again.codes, images[1].codes)


def test_negative_prompt_matters_only_with_guidance(generator: Generator) -> None:
    def codes(guidance: float, negative: str) -> np.ndarray:
        sampling = Sampling(guidance=guidance, temperature=0)
        (image,) = generator.text_to_image(
            ["red"], height=16, width=16, sampling=sampling, negative_prompt=negative
        )
        return image.codes

    assert np.array_equal(codes(1.0, ""), codes(1.0, "ugly"))
    assert not np.array_equal(codes(4.0, ""), codes(4.0, "ugly"))


def test_text_to_video(generator: Generator) -> None:
    (video,) = generator.text_to_video(["go"], height=4, width=8, frames=8, fps=12.5, sampling=GUIDED)
    assert video.codes.shape == (2, 1, 2)
    assert video.pixels.shape == (8, 4, 8, 3)
    assert (video.fps, video.given_frames) == (12.5, 0)


def test_continuation_keeps_the_given_frames(generator: Generator, bundle: ModelBundle) -> None:
    clips = torch.rand(3, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    videos = generator.continue_video(clips, frames=12, fps=8.0, prompts=["a", "bb", ""], sampling=GUIDED)
    given = bundle.vision_tokenizer.encode(clips).numpy()
    for own, video in zip(given, videos, strict=True):
        assert video.codes.shape == (3, 2, 2)
        np.testing.assert_array_equal(video.codes[:1], own)
        assert video.given_frames == 4
        assert video.pixels.shape == (12, 8, 8, 3)


def test_captions_are_text_of_the_limited_length(generator: Generator) -> None:
    images = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    captions = generator.image_to_text(
        images, prefix="a ", max_new_tokens=6, sampling=Sampling(temperature=1.0)
    )
    codes = generator.encode_images(images)
    assert captions == generator.image_to_text(
        codes, prefix="a ", max_new_tokens=6, sampling=Sampling(temperature=1.0)
    )
    for caption in captions:
        assert caption.text.startswith("a ")
        assert len(caption.text) <= 2 + 6
        assert caption.tokens <= 6
        assert caption.finished or caption.tokens == 6


def test_what_cannot_be_done_is_refused(generator: Generator) -> None:
    with pytest.raises(UserError, match="multiple of 4"):
        generator.text_to_image(["a"], height=9, width=8)
    with pytest.raises(UserError, match="frames=6"):
        generator.text_to_video(["a"], height=8, width=8, frames=6, fps=8)
    with pytest.raises(UserError, match="ask for more"):
        generator.continue_video(torch.zeros(1, 4, 3, 8, 8), frames=4, fps=8)
    with pytest.raises(UserError, match="guidance"):
        generator.image_to_text(torch.zeros(1, 3, 8, 8), sampling=GUIDED)
    with pytest.raises(UserError, match="2 seeds for 1"):
        generator.text_to_image(["a"], height=8, width=8, seeds=[1, 2])


@pytest.mark.parametrize(
    ("ratio", "area", "tokens"),
    [
        ("1:1", 518_400, (90, 90)),
        ("4:3", 518_400, (78, 104)),
        ("3:4", 518_400, (104, 78)),
        ("16:9", 518_400, (68, 120)),
        ("9:16", 518_400, (120, 68)),
        ("3:2", 518_400, (73, 110)),
        ("2:3", 518_400, (110, 73)),
        ("16:9", 262_144, (48, 85)),
        ("3:2", 262_144, (52, 78)),
    ],
)
def test_sizes_are_the_released_ones(ratio: str, area: int, tokens: tuple[int, int]) -> None:
    assert image_size(ratio, area, 8) == (tokens[0] * 8, tokens[1] * 8)


@pytest.mark.parametrize("ratio", ["1", "1:0", "a:b", "1:2:3", "-1:2"])
def test_a_ratio_is_two_positive_integers(ratio: str) -> None:
    with pytest.raises(UserError, match="WIDTH:HEIGHT"):
        image_size(ratio, 1000, 8)
