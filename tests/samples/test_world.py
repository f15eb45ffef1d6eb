import numpy as np
import pytest

from emu3_megatron.samples import Scene, World, WorldConfig
from emu3_megatron.samples.definitions import BACKGROUNDS, COLOURS, DIRECTIONS, POSITIONS, SHAPES


@pytest.fixture(scope="module")
def world():
    return World(WorldConfig.preset("full"))


def test_the_world_is_as_large_as_promised():
    assert len(SHAPES) >= 6
    assert len(COLOURS) >= 8
    assert len(POSITIONS) == 9
    assert len(DIRECTIONS) == 4
    assert not set(COLOURS) & set(BACKGROUNDS)


@pytest.mark.parametrize("medium", ["image", "video"])
def test_held_out_combinations_are_never_trained_yet_every_pair_is(world, medium):
    train = world.combinations(medium, "train")
    held = world.combinations(medium, "held-out")
    assert not set(train) & set(held)
    assert 0.1 <= len(held) / (len(train) + len(held)) <= 0.15
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert {(c[i], c[j]) for c in held} <= {(c[i], c[j]) for c in train}
    for last in POSITIONS if medium == "image" else DIRECTIONS:
        assert any(c[2] == last for c in held)


@pytest.mark.parametrize("medium", ["image", "video"])
def test_samples_stay_in_their_split(world, medium):
    rng = np.random.default_rng(0)
    for split in ("train", "held-out"):
        allowed = set(world.combinations(medium, split))
        scenes = [world.sample(rng, medium, split) for _ in range(200)]
        assert {scene.combination for scene in scenes} <= allowed
        assert {scene.medium for scene in scenes} == {medium}


def test_the_seed_chooses_what_is_held_out():
    a, b, c = (World(WorldConfig(held_out_seed=seed)) for seed in (1, 1, 2))
    assert a.combinations("image", "held-out") == b.combinations("image", "held-out")
    assert a.combinations("image", "held-out") != c.combinations("image", "held-out")


def test_objects_lie_whole_in_the_picture(world):
    def ink(shape, position, offset):
        scene = Scene(
            shape=shape, colour="red", size="large", background="white", position=position, offset=offset
        )
        return np.abs(world.render(scene).astype(int) - 255).sum()

    for shape in SHAPES:
        middle = ink(shape, "center", (0, 0))
        for position in POSITIONS:
            assert ink(shape, position, (2, -2)) == ink(shape, position, (-2, 2)) == middle


def test_edges_are_smooth(world):
    scene = Scene(shape="circle", colour="blue", size="medium", background="white", position="top")
    pixels = world.render(scene)
    between = ((pixels != 255).any(-1) & (pixels != COLOURS["blue"]).any(-1)).sum()
    assert between > 20


def test_a_clip_moves_as_named(world):
    for direction, step in DIRECTIONS.items():
        scene = Scene(shape="square", colour="green", size="small", background="black", direction=direction)
        clip = world.render_clip(scene)
        assert clip.shape == (8, 64, 64, 3)
        moved = np.roll(clip[0], (14 * step[1], 14 * step[0]), (0, 1))
        np.testing.assert_array_equal(clip[-1], moved)


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"radii": (7.0, 10.0, 20.0)}, "quarter"),
        ({"radii": (7.0, 7.0, 9.0)}, "increasing"),
        ({"backgrounds": ("tartan",)}, "tartan"),
        ({"speed": 9.0}, "leaves the picture"),
        ({"frames": 1}, "frames=1"),
    ],
)
def test_a_world_that_cannot_be_drawn_is_refused(fields, word):
    with pytest.raises(ValueError, match=word):
        WorldConfig(**fields)


def test_unknown_names_are_refused(world):
    with pytest.raises(ValueError, match="quickstart"):
        WorldConfig.preset("huge")
    with pytest.raises(ValueError, match="held-out"):
        world.combinations("image", "test")
    still = Scene(shape="ring", colour="red", size="small", background="white", position="top")
    with pytest.raises(ValueError, match="direction"):
        world.render_clip(still)
