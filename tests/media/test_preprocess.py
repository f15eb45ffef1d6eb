"""Sizes follow Emu3's rule, and the one graph equals a torch reference."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from emu3_megatron.media import (
    BoundedResizeRule,
    Geometry,
    MediaError,
    OpenVideo,
    Preprocessor,
    ResizeRule,
    dali,
    decode_image,
    fixed_geometry,
    frame_source,
    load_clip,
    load_stills,
    preprocess,
    to_uint8,
    write_mp4,
    write_png,
)
from tests.media.clips import CLIPS, PHOTOGRAPHS, encode, moving_picture


@pytest.mark.parametrize(
    ("ratio", "large", "small"),
    [
        ((1, 1), (90, 90), (64, 64)),
        ((4, 3), (78, 104), (55, 74)),
        ((3, 4), (104, 78), (74, 55)),
        ((16, 9), (68, 120), (48, 85)),
        ((9, 16), (120, 68), (85, 48)),
        ((3, 2), (73, 110), (52, 78)),
        ((2, 3), (110, 73), (78, 52)),
    ],
)
def test_sizes_are_those_of_the_released_processor(
    ratio: tuple[int, int], large: tuple[int, int], small: tuple[int, int]
) -> None:
    for area, tokens in ((518_400, large), (262_144, small)):
        plan = ResizeRule(area=area).plan(ratio[1] * 100, ratio[0] * 100)
        assert (plan.height // 8, plan.width // 8) == tokens
        assert plan.height % 8 == plan.width % 8 == 0


def test_the_crop_is_small_and_nothing_is_stretched() -> None:
    generator = np.random.default_rng(0)
    for _ in range(200):
        height, width = (int(x) for x in generator.integers(200, 2000, 2))
        if max(height / width, width / height) > 5:
            continue
        plan = ResizeRule().plan(height, width)
        assert plan.resized_height >= plan.height
        assert plan.resized_width >= plan.width
        assert plan.height * plan.width > 0.96 * plan.resized_height * plan.resized_width
        stretch = (plan.resized_height / height) / (plan.resized_width / width)
        assert stretch == pytest.approx(1, abs=0.01)


def test_wide_pixels_widen_the_picture() -> None:
    plan = ResizeRule(area=512 * 512).plan(576, 720, pixel_aspect=64 / 45)  # a 16:9 DVD
    assert plan == ResizeRule(area=512 * 512).plan(576, 1024)


def test_elongated_pictures_and_bad_rules_are_refused() -> None:
    with pytest.raises(MediaError, match="aspect ratio"):
        ResizeRule().plan(100, 600)
    with pytest.raises(ValueError, match="must hold one token"):
        ResizeRule(area=10)
    with pytest.raises(ValueError, match="at least 1"):
        ResizeRule(max_aspect_ratio=0.5)


@pytest.mark.parametrize("size", [(150, 200), (600, 800), (512, 512), (100, 333)])
def test_the_graph_equals_torch(size: tuple[int, int]) -> None:
    picture = decode_image(PHOTOGRAPHS / "astronaut.png")
    height, width = size[0] // 8 * 8, size[1] // 8 * 8
    geometry = Geometry(resized_height=size[0], resized_width=size[1], height=height, width=width)
    (result,) = Preprocessor()([picture[None]], [geometry])
    assert result.shape == (1, 3, height, width)
    assert result.dtype == torch.float32
    assert result.min() >= -1
    assert result.max() <= 1
    pixels = torch.from_numpy(picture).permute(2, 0, 1)[None].float()
    reference = torch.nn.functional.interpolate(pixels, size=size, mode="bicubic", antialias=True)
    top, left = (size[0] - height + 1) // 2, (size[1] - width + 1) // 2
    reference = reference[:, :, top : top + height, left : left + width].clamp(0, 255)
    difference = (result * 127.5 + 127.5 - reference).abs()
    assert difference.mean() < 0.4  # rounding to 8 bits alone is 0.25
    assert difference.max() <= 10


def test_a_picture_of_the_right_size_is_only_normalised() -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    (result,) = Preprocessor()([pictures], [fixed_geometry(64, 64, (64, 64))])
    expected = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
    assert torch.allclose(result, expected, atol=1e-6)
    assert np.array_equal(to_uint8(result), pictures)


def test_the_result_depends_on_neither_batch_nor_neighbours() -> None:
    generator = np.random.default_rng(0)
    clips = [
        generator.integers(0, 256, (f, h, w, 3), dtype=np.uint8)
        for f, h, w in [(1, 90, 70), (4, 64, 64), (1, 33, 51)]
    ]
    rule = ResizeRule(area=64 * 64)
    plans = [rule.plan(*clip.shape[1:3]) for clip in clips]
    together = Preprocessor(batch_size=2)(clips * 2, plans * 2)
    for clip, plan, result in zip(clips * 2, plans * 2, together, strict=True):
        assert torch.equal(Preprocessor()([clip], [plan])[0], result)


def test_a_still_and_a_frame_are_treated_alike(tmp_path: Path) -> None:
    frame = moving_picture(1)
    plan = ResizeRule(area=64 * 64).plan(96, 128)
    still, clip = Preprocessor()([frame, np.repeat(frame, 4, 0)], [plan, plan])
    assert torch.equal(still.expand_as(clip), clip)


def test_png_round_trip_is_exact(tmp_path: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (40, 24, 3), dtype=np.uint8)
    write_png(tmp_path / "a.png", picture)
    write_png(tmp_path / "b.png", picture)
    assert np.array_equal(np.array(Image.open(tmp_path / "a.png")), picture)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with pytest.raises(ValueError, match="uint8"):
        write_png(tmp_path / "c.png", picture.astype(np.float32))


@pytest.mark.parametrize(
    ("encoder", "size"),
    [
        *((encoder, (64, 64)) for encoder in (None, "libvpx-vp9", "mpeg4")),
        *((encoder, (63, 61)) for encoder in (None, "libvpx-vp9")),  # MPEG-4 has no 4:4:4 for odd sizes
    ],
)
def test_mp4_round_trip_is_close(tmp_path: Path, encoder: str | None, size: tuple[int, int]) -> None:
    frames = moving_picture(8, *size)
    for name in ("a.mp4", "b.mp4"):
        write_mp4(tmp_path / name, frames, 8, encoder=encoder)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    clip = load_clip(tmp_path / "a.mp4", 8, size)
    assert np.abs(to_uint8(clip).astype(int) - frames).mean() < 2.0


def test_write_mp4_refuses_nonsense(tmp_path: Path) -> None:
    frames = moving_picture(2)
    with pytest.raises(ValueError, match="encoder"):
        write_mp4(tmp_path / "a.mp4", frames, 8, encoder="no-such")
    with pytest.raises(ValueError, match="positive"):
        write_mp4(tmp_path / "a.mp4", frames, 0)
    with pytest.raises(ValueError, match="T > 0"):
        write_mp4(tmp_path / "a.mp4", frames[:0], 8)
    assert list(tmp_path.iterdir()) == []


def test_load_stills_and_clip(tmp_path: Path) -> None:
    stills = load_stills([PHOTOGRAPHS / "astronaut.png", PHOTOGRAPHS / "rocket.jpg"], (64, 48))
    assert stills.shape == (2, 3, 64, 48)
    clip = load_clip(CLIPS / "bikes.mp4", 8, (64, 64), fps=8, position="centre")
    assert clip.shape == (8, 3, 64, 64)
    assert clip.abs().max() <= 1
    with pytest.raises(MediaError, match=r"none\.png"):
        load_stills([PHOTOGRAPHS / "rocket.jpg", tmp_path / "none.png"], (64, 64))
    short = encode(tmp_path / "s.mp4", moving_picture(4))
    with pytest.raises(MediaError, match=r"s\.mp4.*too few"):
        load_clip(short, 8, (64, 64))


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (512, 512, (512, 512)),
        (600, 800, (600, 800)),
        (603, 797, (600, 800)),
        (1024, 1024, (1024, 1024)),
        (2048, 2048, (1024, 1024)),
        (256, 256, (512, 512)),
        (300, 400, (448, 592)),
        (2000, 1000, (1448, 720)),
        (512, 511, (512, 512)),
    ],
)
def test_pictures_between_the_bounds_keep_their_size(
    height: int, width: int, expected: tuple[int, int]
) -> None:
    rule = BoundedResizeRule()
    geometry = rule.plan(height, width)
    assert (geometry.height, geometry.width) == expected
    assert rule.min_area <= geometry.height * geometry.width <= rule.max_area
    assert geometry.resized_height >= geometry.height
    assert geometry.resized_width >= geometry.width


def test_bounds_in_the_wrong_order_are_refused() -> None:
    with pytest.raises(ValueError, match="swap them"):
        BoundedResizeRule(min_area=100, max_area=64)


def test_the_number_of_the_gpu_reaches_dali_and_its_copies_are_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that a machine without a GPU can show of that path."""
    events: list[object] = []

    class Output:
        def __getitem__(self, index: int) -> torch.Tensor:
            events.append("copy")
            return torch.zeros(1, 3, 8, 8)

    class Pipeline:
        def __init__(self, device: str, **settings: object) -> None:
            events.append((device, settings["device_id"]))

        def build(self) -> None: ...

        def feed_input(self, *_: object) -> None: ...

        def run(self) -> tuple[Output]:
            return (Output(),)

    class Stream:
        def __init__(self, device: torch.device) -> None:
            self.device = device

        def synchronize(self) -> None:
            events.append(self.device)

    def video(_: object, *, device: str, **__: object) -> None:
        events.append(device)
        raise RuntimeError("there is no GPU")

    monkeypatch.setattr(dali, "gpu_available", lambda: True)
    monkeypatch.setattr(preprocess, "_graph", Pipeline)
    monkeypatch.setattr(preprocess, "from_dlpack", lambda tensor: tensor)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(dali.ndd.decoders, "video", video)
    clips, plans = [np.zeros((1, 8, 8, 3), np.uint8)] * 2, [fixed_geometry(8, 8, (8, 8))] * 2
    for index in (3, None):
        number = 1 if index is None else index
        events.clear()
        Preprocessor(device="gpu", device_index=index)(clips, plans)
        assert events == [("gpu", number), "copy", "copy", torch.device("cuda", number)]
    path = encode(tmp_path / "a.mp4", moving_picture(4))
    for name, index, expected in (("dali", 3, "gpu:3"), ("auto", 2, "gpu:2"), ("dali", None, "gpu")):
        events.clear()
        with OpenVideo(path) as opened, pytest.raises(OSError, match="no GPU"):
            frame_source(name, device="gpu", device_index=index).frames(opened, [0])
        assert set(events) == {expected}
