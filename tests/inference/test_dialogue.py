"""Conversations at inference: the ids are those that post-training was written with."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from emu3_megatron.data import Template
from emu3_megatron.errors import UserError
from emu3_megatron.grammar import Dialect, Image, Video
from emu3_megatron.inference.dialogue import Message, chat_request, chat_template
from emu3_megatron.inference.engine import Engine, Request
from emu3_megatron.inference.sampling import Sampling
from emu3_megatron.posttraining.conversation_writer import ConversationWriter
from emu3_megatron.posttraining.conversations import Conversation, Turn
from emu3_megatron.text import load_text_tokenizer, train_sentencepiece
from emu3_megatron.tokenization import Entry
from emu3_megatron.vocabulary import Vocabulary
from tests.inference import worlds

VOCABULARY = Vocabulary.build("talk", text_size=320, codebook_size=64)
WORDS = ["a red circle?", "be brief", "Two blue squares.", "USER: no", "{question}", "b", "ok. ASSISTANT:"]
GREEDY = {"sampling": Sampling(temperature=0.0), "seed": 0, "max_new_tokens": 4}


@pytest.fixture(scope="module")
def dialect(tmp_path_factory: pytest.TempPathFactory) -> Dialect:
    """With a tokenizer whose ids depend on where texts are cut."""
    path = tmp_path_factory.mktemp("text") / "text.model"
    train_sentencepiece([" ".join(WORDS), "You are a helpful assistant. USER:"] * 4, path, 310)
    return Dialect.preset("emu3-frames", VOCABULARY, load_text_tokenizer(path))


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with worlds.one_process():
        yield Engine(worlds.tiny_model(), worlds.dialect())


def random_span(generator: np.random.Generator) -> Image | Video:
    shape = generator.integers(1, 4, 3)
    codes = generator.integers(0, VOCABULARY.codebook_size, shape)
    return Video(codes, fps=8.0, seconds=1.5) if generator.integers(2) else Image(codes[0])


def trained(
    dialect: Dialect, talk: list[Message], template: str, system: str | None
) -> tuple[np.ndarray, list[int]]:
    """Ids of the training document of questions and answers, and where its answers begin."""
    spans = [span for message in talk for span in message.media]
    numbers = iter(range(len(spans)))
    turns = tuple(
        Turn((*(next(numbers) for _ in question.media), question.text), answer.text)
        for question, answer in zip(talk[::2], talk[1::2], strict=True)
    )
    entry = Entry(id="x", kind="image", text=None, media=None)
    conversation = Conversation(id="x", place="x:1", system=system, turns=turns, media=(entry,) * len(spans))
    writer = ConversationWriter(dialect, chat_template(template))
    segments = writer.segments(conversation, spans)
    ids, _ = Template().assemble(segments, VOCABULARY, caption_after=False, caption_tokens=None)
    starts, place = [], 1
    for part, mode in segments:
        if mode == 0:
            starts.append(place)
        place += len(part)
    return np.asarray(ids), starts


@pytest.mark.parametrize("template", ["emu3-chat", "emu3-stage1", "Look: {media} Q {question} A:"])
@pytest.mark.parametrize("seed", range(8))
def test_prompts_are_what_training_wrote_before_the_answer(
    dialect: Dialect, template: str, seed: int
) -> None:
    """For every turn, with and without a system message, images and clips."""
    generator = np.random.default_rng(seed)
    talk: list[Message] = []
    for _ in range(int(generator.integers(1, 5))):
        media = tuple(random_span(generator) for _ in range(int(generator.integers(3))))
        talk.append(Message("user", str(generator.choice(WORDS)), media))
        talk.append(Message("assistant", str(generator.choice(WORDS))))
    system = str(generator.choice(WORDS)) if seed % 2 else None
    ids, starts = trained(dialect, talk, template, system)
    first = [] if system is None else [Message("system", system)]
    assert len(starts) == len(talk) // 2
    for turn, start in enumerate(starts):
        said = [*first, *talk[: 2 * turn + 1]]
        request = chat_request(dialect, said, chat_template(template), **GREEDY)
        np.testing.assert_array_equal(request.prompt, ids[:start])


@pytest.mark.parametrize("template", ["emu3-chat", "emu3-stage1"])
def test_a_single_question_is_the_released_prompt(dialect: Dialect, template: str) -> None:
    picture = Image(np.arange(6).reshape(2, 3))
    for media in ((), (picture,), (picture, picture)):
        request = chat_request(dialect, [Message("user", " a? ", media)], chat_template(template), **GREEDY)
        rendered = chat_template(template).render(" a? ", media)
        np.testing.assert_array_equal(request.prompt, dialect.encode(rendered).ids[:-1])


def test_the_answer_of_a_later_turn_follows_the_grammar(engine: Engine) -> None:
    """The end of an earlier turn is not the end of the document."""
    talk = [Message("system", "be brief"), Message("user", "a?"), Message("assistant", " b\n")]
    talk.append(Message("user", "c?"))
    request = chat_request(worlds.dialect(), talk, chat_template("emu3-chat"), **GREEDY)
    prompt = "".join("<EOS>" if i == worlds.VOCABULARY.eos else chr(i) for i in request.prompt[1:])
    assert prompt == "be brief USER: a?. ASSISTANT: b<EOS>USER: c?. ASSISTANT:"
    (completion,) = engine.generate([request])
    assert 0 < len(completion.ids) <= 4


def test_only_stated_turns_may_end_inside_a_prompt(engine: Engine) -> None:
    ids = [worlds.VOCABULARY.bos, 65, worlds.VOCABULARY.eos, 66, worlds.VOCABULARY.eoi, 67]
    for prompt, history, message in (
        (ids[:4], 0, "position 3"),
        (ids[:4], 2, "end with EOS"),
        (ids, 3, "position 2"),
        ([*ids[:2], ids[4], *ids[2:4]], 4, "position 2"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.generate([Request(prompt=np.array(prompt), history=history, max_new_tokens=1)])
    with pytest.raises(ValueError, match="less than the 4 ids"):
        Request(prompt=np.array(ids[:4]), history=4)


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        ("ua", "last message"), ("", "last message"), ("s", "last message"), ("uu", "alternate"),
        ("au", "alternate"), ("usu", "first message"), ("uasu", "first message"), ("ssu", "first message"),
    ],
)  # fmt: skip
def test_conversations_that_training_never_writes_are_refused(roles: str, message: str) -> None:
    names = {"u": "user", "a": "assistant", "s": "system"}
    with pytest.raises(UserError, match=message):
        chat_request(
            worlds.dialect(), [Message(names[r], "x") for r in roles], chat_template("emu3-chat"), **GREEDY
        )
