import io

import av
import numpy as np
import pytest
from PIL import Image

from emu3_megatron.samples import Checker, World, WorldConfig, encode_mp4, encode_png

PRESETS = ("quickstart", "full")


def _wrong(reading, scene):
    return [name for name, value in scene.to_dict().items() if getattr(reading, name) != value]


def _from_mp4(data):
    with av.open(io.BytesIO(data)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def _blurred(pixels, rng, width):
    small = Image.fromarray(pixels).resize((width, width), Image.Resampling.BILINEAR)
    noisy = np.asarray(small.resize((64, 64), Image.Resampling.BICUBIC), float) + rng.normal(
        0, 10, pixels.shape
    )
    return np.clip(noisy, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("preset", PRESETS)
def test_png_files_are_read_right(preset):
    config = WorldConfig.preset(preset)
    world, checker, rng = World(config), Checker(config), np.random.default_rng(0)
    scenes = [world.sample(rng, "image", split) for split in ("train", "held-out") for _ in range(150)]
    wrong = 0
    for scene in scenes:
        pixels = np.array(Image.open(io.BytesIO(encode_png(world.render(scene)))))
        wrong += bool(_wrong(checker.read_image(pixels), scene))
    assert wrong <= 0.01 * len(scenes)


@pytest.mark.parametrize("preset", PRESETS)
def test_mp4_files_are_read_right(preset):
    config = WorldConfig.preset(preset)
    world, checker, rng = World(config), Checker(config), np.random.default_rng(0)
    scenes = [world.sample(rng, "video", split) for split in ("train", "held-out") for _ in range(25)]
    readings = [checker.read_clip(_from_mp4(encode_mp4(world.render_clip(s), config.fps))) for s in scenes]
    assert sum(bool(_wrong(r, s)) for r, s in zip(readings, scenes, strict=True)) == 0


@pytest.mark.parametrize(("preset", "width"), [("quickstart", 24), ("full", 32)])
def test_blurred_and_noisy_pictures_are_read(preset, width):
    config = WorldConfig.preset(preset)
    world, checker, rng = World(config), Checker(config), np.random.default_rng(0)
    scenes = [world.sample(rng, "image", "train") for _ in range(100)]
    wrong = sum(bool(_wrong(checker.read_image(_blurred(world.render(s), rng, width)), s)) for s in scenes)
    assert wrong <= 5


def test_nothing_is_guessed():
    checker = Checker(WorldConfig())
    blank = np.full((64, 64, 3), 255, np.uint8)
    reading = checker.read_image(blank)
    assert (reading.shape, reading.colour, reading.size, reading.position) == (None, None, None, None)
    assert reading.background == "white"
    reading = checker.read_clip(np.stack([blank] * 8))
    assert (reading.shape, reading.colour, reading.direction) == (None, None, None)


def test_a_still_object_has_no_direction():
    config = WorldConfig()
    world, checker, rng = World(config), Checker(config), np.random.default_rng(0)
    frame = world.render(world.sample(rng, "image", "train"))
    assert checker.read_clip(np.stack([frame] * 8)).direction is None


def test_readings_follow_the_pixels():
    config = WorldConfig()
    world, checker, rng = World(config), Checker(config), np.random.default_rng(3)
    clip = world.render_clip(world.sample(rng, "video", "train"))
    forward, backward = checker.read_clip(clip).direction, checker.read_clip(clip[::-1].copy()).direction
    opposite = {"left": "right", "right": "left", "up": "down", "down": "up"}
    assert forward is not None
    assert backward == opposite[forward]


def test_fit_tells_clean_from_garbled():
    config = WorldConfig()
    world, checker, rng = World(config), Checker(config), np.random.default_rng(0)
    pixels = world.render(world.sample(rng, "image", "train"))
    garbled = rng.permutation(pixels.reshape(-1, 3)).reshape(pixels.shape)
    assert checker.read_image(pixels).fit > 0.9
    assert checker.read_image(garbled).fit < 0.5


@pytest.mark.parametrize(
    "pixels",
    [np.zeros((32, 32, 3), np.uint8), np.zeros((64, 64, 3), np.float32), np.zeros((64, 64), np.uint8)],
)
def test_other_arrays_are_refused(pixels):
    with pytest.raises(ValueError, match="reads uint8"):
        Checker(WorldConfig()).read_image(pixels)
