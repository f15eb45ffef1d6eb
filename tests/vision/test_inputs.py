"""Sizes that do not fit are refused, padded, cut or floored; wrong input is named with its remedy."""

from __future__ import annotations

import pytest
import torch

from emu3_megatron.vision import VisionTokenizer
from emu3_megatron.vision.inputs import cut, fit_pixels
from tests.vision.oracle import TINY, adopt, reference, reference_codes

Pair = tuple[object, VisionTokenizer]


@pytest.fixture(scope="module")
def pair() -> Pair:
    model = reference(TINY)
    return model, adopt(model, TINY)


def pixels(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_floor_is_what_the_reference_does(pair: Pair) -> None:
    model, ours = pair
    for shape in ((1, 3, 30, 21), (2, 3, 9, 35), (1, 7, 3, 13, 18), (1, 5, 3, 8, 9)):
        x = pixels(*shape)
        codes = ours.encode(x, fit="floor")
        assert torch.equal(codes, reference_codes(model, x))
        assert codes.shape[-2:] == (shape[-2] // 4, shape[-1] // 4)


def test_crop_encodes_what_is_left(pair: Pair) -> None:
    _, ours = pair
    x = pixels(1, 7, 3, 13, 18)
    assert torch.equal(ours.encode(x, fit="crop"), ours.encode(x[:, :4, :, :12, :16]))
    image = pixels(2, 3, 12, 16)
    assert torch.equal(ours.encode(image, fit="crop"), ours.encode(image))


def test_pad_repeats_the_borders_and_decoding_takes_them_off(pair: Pair) -> None:
    _, ours = pair
    for shape in ((1, 3, 30, 21), (1, 2, 3, 13, 18), (1, 5, 3, 3, 1)):
        x = pixels(*shape)
        codes = ours.encode(x, fit="pad")
        whole = fit_pixels(x, "pad", spatial_factor=4, temporal_factor=4)
        assert torch.equal(cut(whole, size=shape[-2:], frames=shape[1] if len(shape) == 5 else None), x)
        assert torch.equal(whole[..., -1, :], whole[..., shape[-2] - 1, :])
        assert torch.equal(whole[..., -1], whole[..., shape[-1] - 1])
        assert torch.equal(codes, ours.encode(whole))
        assert codes.shape[-2:] == (-(-shape[-2] // 4), -(-shape[-1] // 4))
        frames = shape[1] if len(shape) == 5 else None
        decoded = ours.decode(codes, size=(shape[-2], shape[-1]), frames=frames)
        assert decoded.shape == shape
        everything = ours.decode(codes)
        assert torch.equal(decoded, cut(everything, size=(shape[-2], shape[-1]), frames=frames))
    assert ours.encode(pixels(1, 1, 3, 8, 8), fit="pad").shape == (1, 1, 2, 2)


@pytest.mark.parametrize(
    ("shape", "fit", "message"),
    [
        ((1, 3, 30, 32), "refuse", r"30x32: both must be multiples of 4; .* fit='pad' or fit='crop'"),
        ((1, 3, 3, 8, 8), "refuse", r"3 frames: .* multiple of 4; choose fit='crop'.* or fit='pad'"),
        ((1, 3, 3, 8, 8), "crop", r"number of frames is 3, less than one code \(4\): .* fit='pad'"),
        ((1, 2, 3, 8, 8), "floor", r"number of frames is 2, less than one code \(4\): .* fit='pad'"),
        ((1, 3, 3, 8), "crop", r"height is 3, less than one code \(4\)"),
        ((1, 3, 8, 8), "stretch", r"fit is 'stretch': choose one of refuse, pad, crop, floor"),
        ((1, 16, 16, 3), "refuse", r"before height; channels stand last here: permute\(0, 3, 1, 2\)"),
        ((1, 4, 16, 16, 3), "pad", r"channels stand last here: permute\(0, 1, 4, 2, 3\)"),
        ((1, 3, 8, 16, 16), "pad", r"channels stand before the frames here: transpose\(1, 2\)"),
        ((3, 16, 16), "pad", r"of a single image, give \[None\]"),
    ],
)  # fmt: skip
def test_what_cannot_fit_is_refused_with_a_remedy(shape: tuple[int, ...], fit: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VisionTokenizer(TINY).encode(torch.zeros(shape), fit=fit)


def test_numbers_that_are_none_and_the_range_of_bytes_are_refused_whatever_the_fit() -> None:
    tokenizer, x = VisionTokenizer(TINY), pixels(1, 3, 9, 9)
    x[0, 1, 8, 8] = float("nan")
    with pytest.raises(ValueError, match=r"nan.* must lie in \[-1, 1\]"):
        tokenizer.encode(x, fit="crop")
    x[0, 1, 8, 8] = float("inf")
    with pytest.raises(ValueError, match=r"inf: they must lie in \[-1, 1\]"):
        tokenizer.encode(x, fit="pad")
    with pytest.raises(ValueError, match=r"they must lie in \[-1, 1\] \(uint8 / 127.5 - 1\)"):
        tokenizer.encode(pixels(1, 3, 8, 8) * 127.5 + 127.5)


def test_a_size_that_was_not_encoded_is_refused() -> None:
    tokenizer, codes = VisionTokenizer(TINY), torch.zeros(1, 2, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match="height to keep is 9: the codes give 1 to 8"):
        tokenizer.decode(codes, size=(9, 8))
    with pytest.raises(ValueError, match="only clips have frames"):
        tokenizer.decode(codes, frames=1)
    with pytest.raises(ValueError, match="number of frames to keep is 5: the codes give 1 to 4"):
        tokenizer.decode(codes[None], frames=5)
