"""The smallest real dataset: made in seconds on a CPU, for `examples/configs/tiny.yaml` and for tests.

It goes the way of every dataset, in memory: scenes of the sample world are drawn, encoded by a vision
tokenizer, captioned, written as shards with a manifest. Its vision tokenizer is not trained: a seeded one
whose codebook is taken from latents, so that codes follow the pictures, but nothing can be decoded into
something to look at. The quickstart trains one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from emu3_megatron.data import ShardWriter, write_manifest
from emu3_megatron.data.format import SPAN_MODE, TEXT_MODE
from emu3_megatron.data.writer import Segment
from emu3_megatron.errors import UserError
from emu3_megatron.grammar import Dialect, Document, Image, Text, Video
from emu3_megatron.posttraining.preferences.pairs import PAIR_TASK
from emu3_megatron.samples.captions import LANGUAGES, WORDINGS, caption, text_document
from emu3_megatron.samples.world import Scene, World, WorldConfig
from emu3_megatron.text import CHAT_TEMPLATES, TextTokenizer, train_sentencepiece
from emu3_megatron.vision import VisionTokenizer, VisionTokenizerConfig
from emu3_megatron.vocabulary import Vocabulary

SEED = 20240927
TEXT_PIECES = 512
CODEBOOK = 512
CAPTIONS_FOR_TOKENIZER = 400
ENCODE_BATCH = 32


@dataclass(frozen=True)
class _Part:
    """One of the datasets."""

    medium: str
    split: str
    count: int


PARTS = {
    "stills": _Part("image", "train", 192),
    "clips": _Part("video", "train", 48),
    "texts": _Part("text", "train", 96),
    "held-out": _Part("image", "held-out", 32),
    "talks": _Part("talk", "train", 64),
    "held-out-talks": _Part("talk", "held-out", 16),
    "pairs": _Part("pair", "train", 96),
    "held-out-pairs": _Part("pair", "held-out", 16),
}
"""Datasets by the name of their folder."""


def prepare(folder: str | Path) -> None:
    """Make the dataset that the last part of `folder` names: ``stills``, ``clips``, ``texts``, ``held-out``,
    ``talks`` (questions about pictures), ``held-out-talks``, or preference pairs: ``pairs`` and
    ``held-out-pairs``, of a caption's own picture and another one's.

    The same bytes every time. All have one vocabulary of 512 text pieces and 512 codes.

    Raises:
        UserError: for another name.
    """
    folder = Path(folder)
    if folder.name not in PARTS:
        raise UserError(
            f"{folder}: the tiny samples are called {', '.join(PARTS)}; name the folder one of them"
        )
    part = PARTS[folder.name]
    world = World(WorldConfig.preset("quickstart"))
    text = _text_tokenizer(world, folder.parent / "tokenizer.model")
    vision = _vision_tokenizer(world)
    vocabulary = Vocabulary.build("tiny-samples", text_size=text.size, codebook_size=CODEBOOK)
    dialect = Dialect.preset("emu3", vocabulary, text)
    with ShardWriter(folder, folder.name, vocabulary=vocabulary) as writer:
        task = PAIR_TASK if part.medium == "pair" else None
        for number, segments in enumerate(_segments(part, world, vision, dialect)):
            writer.add_document(segments, f"{folder.name}-{number:04d}", task)
    write_manifest(
        folder,
        folder.name,
        1,
        vocabulary=vocabulary,
        dialect_name="emu3",
        dialect_fingerprint=dialect.fingerprint,
        text_tokenizer_fingerprint=text.fingerprint,
        vision_tokenizer_fingerprint=vision.fingerprint,
        provenance={"maker": "emu3_megatron.samples.tiny", "seed": SEED},
    )


def _text_tokenizer(world: World, path: Path) -> TextTokenizer:
    """A SentencePiece model of training captions, kept beside the datasets."""
    rng = np.random.default_rng([SEED, 1])
    mediums = ("image", "video") * (CAPTIONS_FOR_TOKENIZER // 2)
    texts = [_caption(world.sample(rng, medium, "train"), rng) for medium in mediums]
    return train_sentencepiece(texts, path, TEXT_PIECES)


def _caption(scene: Scene, rng: np.random.Generator) -> str:
    language = LANGUAGES[int(rng.integers(len(LANGUAGES)))]
    return caption(scene, language=language, wording=int(rng.integers(len(WORDINGS[language]))))


def _vision_tokenizer(world: World) -> VisionTokenizer:
    """Random weights; the codebook is a choice of latents of training pictures."""
    config = VisionTokenizerConfig(
        channels=32,
        channel_multiplier=(1, 1, 1, 1),
        num_res_blocks=0,
        attention_resolutions=(),
        codebook_size=CODEBOOK,
    )
    with torch.random.fork_rng(devices=()), torch.no_grad():
        torch.manual_seed(SEED)
        vision = VisionTokenizer(config)
        rng = np.random.default_rng([SEED, 2])
        pictures = [world.render(world.sample(rng, "image", "train")) for _ in range(ENCODE_BATCH)]
        latents_RD = vision.encode_latents(_pixels(pictures)).movedim(1, -1).flatten(0, -2).unique(dim=0)
        # With fewer distinct latents than codes, some stand in the codebook twice; the first of them is used.
        chosen = torch.randint(len(latents_RD), (CODEBOOK,))
        if len(latents_RD) >= CODEBOOK:
            chosen = torch.randperm(len(latents_RD))[:CODEBOOK]
        vision.codebook.copy_(latents_RD[chosen])
    return vision


def _pixels(pictures: list[npt.NDArray[np.uint8]]) -> torch.Tensor:
    """uint8 ``[..., H, W, 3]`` pictures or clips to float ``[B, ..., 3, H, W]`` in [-1, 1]."""
    return torch.from_numpy(np.stack(pictures)).float().div(127.5).sub(1.0).movedim(-1, -3)


def _segments(
    part: _Part, world: World, vision: VisionTokenizer, dialect: Dialect
) -> Iterator[list[Segment]]:
    """The documents of a part as stored."""
    if part.medium == "talk":
        yield from _talks(part, world, vision, dialect)
        return
    for document in _documents(part, world, vision):
        yield [
            (dialect.encode_text(segment), TEXT_MODE)
            if isinstance(segment, Text)
            else (dialect.encode_span(segment), SPAN_MODE)
            for segment in document.segments
        ]


def _talks(part: _Part, world: World, vision: VisionTokenizer, dialect: Dialect) -> Iterator[list[Segment]]:
    """Conversations of one or two turns; those that count show several pictures."""
    # Conversations bring along what decodes media, which the other parts do without.
    from emu3_megatron.posttraining.conversation_writer import ConversationWriter
    from emu3_megatron.posttraining.conversations import Conversation
    from emu3_megatron.samples.questions import KINDS, as_turns, pose

    rng = np.random.default_rng([SEED, 4, *part.split.encode()])
    writer = ConversationWriter(dialect, CHAT_TEMPLATES["emu3-chat"])
    for number in range(part.count):
        kinds = [KINDS[number % len(KINDS)]] if number % 3 else ["colour", "yes or no"]
        questions = [pose(kind, world, part.split, rng) for kind in kinds]
        pictures = [world.render(scene) for question in questions for scene in question.scenes]
        codes = vision.encode(_pixels(pictures)).numpy()
        name = f"talk {number}"
        talk = Conversation(id=name, place=name, system=None, turns=as_turns(questions), media=())
        yield writer.segments(talk, [Image(each) for each in codes])


def _documents(part: _Part, world: World, vision: VisionTokenizer) -> Iterator[Document]:
    rng = np.random.default_rng([SEED, 3, *part.medium.encode(), *part.split.encode()])
    if part.medium == "text":
        for _ in range(part.count):
            yield Document((Text(text_document(rng, language=LANGUAGES[int(rng.integers(len(LANGUAGES)))])),))
        return
    medium = "video" if part.medium == "video" else "image"
    scenes = [world.sample(rng, medium, part.split) for _ in range(part.count)]
    if part.medium == "pair":
        yield from _pairs(scenes, rng, world, vision)
        return
    draw = world.render if medium == "image" else world.render_clip
    batch = ENCODE_BATCH if medium == "image" else ENCODE_BATCH // 8
    for first in range(0, len(scenes), batch):
        group = scenes[first : first + batch]
        for scene, codes in zip(
            group, vision.encode(_pixels([draw(each) for each in group])).numpy(), strict=True
        ):
            yield Document((Text(_caption(scene, rng)), _span(codes, world.config)))


def _pairs(
    scenes: list[Scene], rng: np.random.Generator, world: World, vision: VisionTokenizer
) -> Iterator[Document]:
    """Caption, its picture, the caption again, the picture of the scene before it."""
    before = vision.encode(_pixels([world.render(scenes[-1])])).numpy()[0]
    for first in range(0, len(scenes), ENCODE_BATCH):
        group = scenes[first : first + ENCODE_BATCH]
        codes = vision.encode(_pixels([world.render(scene) for scene in group])).numpy()
        for scene, own in zip(group, codes, strict=True):
            text = Text(_caption(scene, rng))
            yield Document((text, Image(own), text, Image(before)))
            before = own


def _span(codes: npt.NDArray[np.int64], config: WorldConfig) -> Image | Video:
    if codes.ndim == 2:
        return Image(codes)
    return Video(codes, fps=config.fps, seconds=config.frames / config.fps)
