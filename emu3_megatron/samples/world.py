"""The sample world: scenes of one object, their held-out combinations, and how they are drawn."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import numpy.typing as npt

from emu3_megatron.samples.definitions import (
    BACKGROUNDS,
    COLOURS,
    DIRECTIONS,
    POSITIONS,
    REACH,
    SHAPES,
    SIZES,
    FloatArray,
    coverage,
)

Pixels = npt.NDArray[np.uint8]
Combination = tuple[str, str, str]

SPLITS = ("train", "held-out")
MEDIA = ("image", "video")


@dataclass(frozen=True, kw_only=True)
class WorldConfig:
    """What a world may show. Raises `ValueError` where it cannot be drawn."""

    size: int = 64
    """Height and width of the pictures, in pixels."""
    frames: int = 8
    """Frames of a clip."""
    fps: int = 8
    """Frames per second of a clip."""
    radii: tuple[float, float, float] = (7.0, 10.0, 13.0)
    """Radius of the small, medium and large size, in pixels."""
    jitter: int = 2
    """Largest distance of an object from the centre its position names, in whole pixels, per axis."""
    speed: float = 2.0
    """Motion in clips, in pixels per frame. 2.0 moves by one 8-pixel vision token in four frames."""
    backgrounds: tuple[str, ...] = tuple(BACKGROUNDS)
    """Names of the backgrounds that occur."""
    held_out_seed: int = 7
    """Chooses the combinations that training never shows."""

    def __post_init__(self) -> None:
        """Check that every scene fits."""
        unknown = set(self.backgrounds) - set(BACKGROUNDS)
        if unknown or not self.backgrounds:
            raise ValueError(
                f"backgrounds={self.backgrounds}: must be one or more of {', '.join(BACKGROUNDS)}"
            )
        if len(self.radii) != len(SIZES) or any(a >= b for a, b in itertools.pairwise(self.radii)):
            raise ValueError(
                f"radii={self.radii}: must be {len(SIZES)} increasing values, for {', '.join(SIZES)}"
            )
        if self.frames < 2 or self.fps < 1:
            raise ValueError(
                f"frames={self.frames}, fps={self.fps}: a clip has at least 2 frames at 1 per second"
            )
        reach = REACH * self.radii[-1] + self.jitter + 0.5  # the edge's ramp
        if reach > self.size / 4:
            raise ValueError(
                f"size={self.size}: the largest radius and the jitter reach {reach:.1f} pixels, "
                "over a quarter of the picture; make them smaller or the picture larger"
            )
        if reach + self.speed * (self.frames - 1) / 2 > self.size / 2:
            raise ValueError(
                f"speed={self.speed}: an object moving for {self.frames} frames leaves the picture; "
                f"lower speed or frames"
            )

    @classmethod
    def preset(cls, name: str) -> WorldConfig:
        """``full`` (the default values) or ``quickstart`` (larger objects, two backgrounds, jitter 1)."""
        if name == "full":
            return cls()
        if name == "quickstart":
            return cls(radii=(9.0, 11.0, 13.0), jitter=1, backgrounds=("white", "black"))
        raise ValueError(f"unknown world {name!r}; known worlds: full, quickstart")

    def to_dict(self) -> dict[str, object]:
        """Plain fields, for manifests."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One object on a background: still at a position, or moving in a direction."""

    shape: str
    """A name in `SHAPES`."""
    colour: str
    """A name in `COLOURS`."""
    size: str
    """A name in `SIZES`."""
    background: str
    """A name in `BACKGROUNDS`."""
    position: str | None = None
    """A name in `POSITIONS`; None for a clip, whose path is centred in the picture."""
    direction: str | None = None
    """A name in `DIRECTIONS`; None for a still."""
    offset: tuple[int, int] = (0, 0)
    """Jitter (x, y) in pixels; no caption names it."""

    @property
    def medium(self) -> str:
        """``image`` or ``video``."""
        return "image" if self.direction is None else "video"

    @property
    def combination(self) -> Combination:
        """What is held out: (shape, colour, position) of a still, (shape, colour, direction) of a clip."""
        last = self.position if self.direction is None else self.direction
        return (self.shape, self.colour, str(last))

    def to_dict(self) -> dict[str, object]:
        """Attributes that apply, for manifests; without the jitter."""
        fields = asdict(replace(self))
        fields.pop("offset")
        return {key: value for key, value in fields.items() if value is not None}


def _balanced(values: Sequence[str], count: int, rng: np.random.Generator) -> list[str]:
    """`count` values in random order, each as often as the others, give or take one."""
    repeats = -(-count // len(values))
    order = [str(value) for _ in range(repeats) for value in rng.permutation(np.array(values))]
    return [order[i] for i in rng.permutation(count)]


class World:
    """Draws scenes of a configuration.

    Of stills, each (shape, colour) pair has one position that training never shows; of clips, every second
    pair has one direction. Every pair of attributes is seen in training, so that a held-out combination asks
    for composition and not for knowledge. The two media hold out separately.
    """

    def __init__(self, config: WorldConfig) -> None:
        self.config = config
        rng = np.random.default_rng([config.held_out_seed, 0xE3])
        pairs = list(itertools.product(SHAPES, COLOURS))
        positions = _balanced(list(POSITIONS), len(pairs), rng)
        some = [pairs[i] for i in rng.permutation(len(pairs))[: len(pairs) // 2]]
        directions = _balanced(list(DIRECTIONS), len(some), rng)
        held_images = {(s, c, p) for (s, c), p in zip(pairs, positions, strict=True)}
        held_videos = {(s, c, d) for (s, c), d in zip(some, directions, strict=True)}
        self._combinations: dict[tuple[str, str], list[Combination]] = {}
        for medium, held, last in (("image", held_images, POSITIONS), ("video", held_videos, DIRECTIONS)):
            every = list(itertools.product(SHAPES, COLOURS, last))
            self._combinations[medium, "held-out"] = [c for c in every if c in held]
            self._combinations[medium, "train"] = [c for c in every if c not in held]

    def combinations(self, medium: str, split: str) -> list[Combination]:
        """The combinations of ``image`` or ``video`` that ``train`` or ``held-out`` may show."""
        try:
            return list(self._combinations[medium, split])
        except KeyError:
            raise ValueError(
                f"medium={medium!r}, split={split!r}: must be one of {MEDIA} and one of {SPLITS}"
            ) from None

    def sample(self, rng: np.random.Generator, medium: str, split: str) -> Scene:
        """A random scene of a medium and split."""
        config = self.config
        choices = self.combinations(medium, split)
        shape, colour, last = choices[int(rng.integers(len(choices)))]
        dx, dy = rng.integers(-config.jitter, config.jitter + 1, size=2)
        return Scene(
            shape=shape,
            colour=colour,
            size=SIZES[int(rng.integers(len(SIZES)))],
            background=config.backgrounds[int(rng.integers(len(config.backgrounds)))],
            position=last if medium == "image" else None,
            direction=last if medium == "video" else None,
            offset=(int(dx), int(dy)),
        )

    def render(self, scene: Scene) -> Pixels:
        """Draw a still: uint8 ``[H, W, 3]`` (sRGB)."""
        if scene.position is None:
            raise ValueError(f"{scene}: a still needs a position; draw a clip with render_clip")
        x, y = POSITIONS[scene.position]
        centre = np.array([[x, y]], np.float32) * self.config.size + np.array(scene.offset, np.float32)
        return self._draw(scene, centre)[0]

    def render_clip(self, scene: Scene) -> Pixels:
        """Draw a clip: uint8 ``[T, H, W, 3]`` (sRGB); its path passes the picture's middle at half time."""
        if scene.direction is None:
            raise ValueError(f"{scene}: a clip needs a direction; draw a still with render")
        config = self.config
        times = np.arange(config.frames, dtype=np.float32) - np.float32((config.frames - 1) / 2)
        path = times[:, None] * np.float32(config.speed) * np.array(DIRECTIONS[scene.direction], np.float32)
        return self._draw(scene, path + np.float32(config.size / 2) + np.array(scene.offset, np.float32))

    def _draw(self, scene: Scene, centres_T2: FloatArray) -> Pixels:
        """One frame for each centre."""
        axis = np.arange(self.config.size, dtype=np.float32) + np.float32(0.5)
        x = axis[None, None, :] - centres_T2[:, 0, None, None]
        y = axis[None, :, None] - centres_T2[:, 1, None, None]
        radius = self.config.radii[SIZES.index(scene.size)]
        alpha = coverage(scene.shape, x, y, radius)[..., None]
        colour = np.array(COLOURS[scene.colour], np.float32)
        background = np.array(BACKGROUNDS[scene.background], np.float32)
        return np.rint(background + alpha * (colour - background)).astype(np.uint8)
