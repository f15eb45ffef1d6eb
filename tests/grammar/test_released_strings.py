"""Ids and strings of the released models, with Qwen's real tokenizer."""

import itertools

import numpy as np
import pytest

from emu3_megatron.grammar import DIALECTS, Dialect, Document, Image, Modality, Text, Video, span_modality
from emu3_megatron.text import CHAT_TEMPLATES, QwenTokenizer
from emu3_megatron.vocabulary import Vocabulary
from tests.text.qwen_file import qwen_ranks_file

EOL, EOF, BOS, EOS, IMG, BOI, EOI, CODE = 151846, 151847, 151849, 151850, 151851, 151852, 151853, 151854


@pytest.fixture(scope="module")
def qwen():
    return QwenTokenizer(qwen_ranks_file())


@pytest.fixture(scope="module")
def emu3(qwen):
    return Dialect.preset("emu3", Vocabulary.preset("emu3"), qwen)


def random_codes(*shape):
    return np.random.default_rng(0).integers(0, 32768, shape)


def rows(codes_HW, end):
    return [[CODE + int(code) for code in row] + end for row in codes_HW]


def test_image_is_written_as_released(emu3):
    codes = random_codes(90, 90)
    ids = emu3.encode_span(Image(codes)).tolist()
    body = list(itertools.chain.from_iterable(rows(codes, [EOL])))
    assert ids == [BOI, 24, 15, 9, 24, 15, IMG, *body, EOF, EOI]
    assert len(body) == 90 * 91
    assert len(ids) == emu3.span_length(90, 90) == 7 + 90 * 91 + 2


@pytest.mark.parametrize(("height", "width", "generated"), [(90, 90, 8193), (120, 68, 8283), (64, 64, 4163)])
def test_ids_after_img(emu3, height, width, generated):
    """(W+1)*H rows with their EOL, then EOF, EOI, EOS."""
    assert emu3.span_length(height, width) - len(emu3.open_span(height, width)) + 1 == generated


def test_automaton_is_the_released_state_machine(emu3):
    """processing_emu3.py: by the offset from IMG, EOL, EOF, EOI, or else vision ids only."""
    height, width = 3, 5
    automaton = emu3.automaton()
    state = automaton.start([BOS, *emu3.open_span(height, width)])
    for offset in range(1, (width + 1) * height + 3):
        allowed = automaton.allowed(state)
        if offset == (width + 1) * height + 1:
            expected = [EOF]
        elif offset == (width + 1) * height + 2:
            expected = [EOI]
        elif offset % (width + 1) == 0:
            expected = [EOL]
        else:
            expected = list(range(CODE, CODE + 32768))
        assert allowed.ids().tolist() == expected
        state = automaton.advance(state, expected[0])
    assert EOS in automaton.allowed(state)


def test_prompt_of_mode_g(emu3, qwen):
    """BOS, text, BOI, "H*W", IMG."""
    prompt = np.concatenate([emu3.encode(Document((Text("a cat"),))).ids[:-1], emu3.open_span(64, 64)])
    assert prompt.tolist() == [BOS, *qwen.encode("a cat"), BOI, *qwen.encode("64*64"), IMG]


def test_chat_prompt_of_mode_u(emu3, qwen):
    image = Image(random_codes(4, 4))
    document = CHAT_TEMPLATES["emu3-chat"].render("What is it?", [image])
    expected = [
        *[BOS, *qwen.encode("You are a helpful assistant. USER: ")],
        *emu3.encode_span(image).tolist(),
        *[*qwen.encode("What is it?. ASSISTANT:"), EOS],
    ]
    assert emu3.encode(document).ids.tolist() == expected


def test_emu35_image(qwen):
    dialect = Dialect.preset("emu3.5", Vocabulary.preset("emu3.5"), qwen)
    codes = random_codes(3, 2) + 100_000
    first, second, third = rows(codes, [])
    expected = [BOI, *qwen.encode("3*2"), IMG, *first, EOL, *second, EOL, *third, EOI]
    assert dialect.encode_span(Image(codes)).tolist() == expected
    with pytest.raises(ValueError, match=r"'emu3\.5' has no videos"):
        dialect.encode_span(Video(codes[None]))


def test_video_of_frames_only(qwen):
    """UniVLA: BOI "T*H*W" IMG, each frame and EOF, EOI."""
    dialect = Dialect.preset("emu3-frames", Vocabulary.preset("emu3"), qwen)
    codes = random_codes(2, 3, 4)
    first, second = (list(itertools.chain.from_iterable(rows(frame, []))) for frame in codes)
    expected = [BOI, *qwen.encode("2*3*4"), IMG, *first, EOF, *second, EOF, EOI]
    assert dialect.encode_span(Video(codes)).tolist() == expected
    assert dialect.encode_span(Video(codes, fps=24, seconds=0.3)).tolist() == expected
    image = Image(codes[0])
    assert (
        dialect.encode_span(image).tolist()
        == Dialect.preset("emu3", Vocabulary.preset("emu3"), qwen).encode_span(image).tolist()
    )


def test_video_of_the_paper(emu3, qwen):
    codes = random_codes(2, 3, 4)
    frames = [list(itertools.chain.from_iterable(rows(frame, [EOL]))) for frame in codes]
    video = Video(codes, fps=30000 / 1001, seconds=0.25)
    expected = [BOI, *qwen.encode("2*3*4*29.97*0.25"), IMG, *frames[0], EOF, *frames[1], EOF, EOI]
    assert emu3.encode_span(video).tolist() == expected


def test_five_seconds_fit_the_context_of_the_paper(emu3):
    """30 latent frames of 64x64 are 124,830 ids with EOL and EOF, below 131,072."""
    length = emu3.span_length(64, 64, frames=30, fps=24, seconds=5)
    head = emu3.open_span(64, 64, frames=30, fps=24, seconds=5)
    assert length - len(head) - 1 == 124_830
    assert length < 131_072


@pytest.mark.parametrize("meta", ["90*90", "1*9999", "30*64*64", "30*64*64*24*5", "7*90*72*29.97*0.125"])
def test_meta_text_is_spelled_as_the_tokenizer_spells_the_whole_string(qwen, meta):
    assert qwen.encode(meta) == list(itertools.chain.from_iterable(qwen.encode(c) for c in meta))


@pytest.mark.parametrize("name", list(DIALECTS))
def test_any_text_ids_survive_parsing(qwen, name):
    """A model need not spell as the tokenizer would; the document keeps its spelling."""
    dialect = Dialect.preset(name, Vocabulary.preset("emu3"), qwen)
    ids = np.random.default_rng(1).integers(0, qwen.size, 500).tolist()
    for count in (1, 2, 500):
        sequence = [BOS, *ids[:count], EOS]
        assert dialect.encode(dialect.parse(sequence)).ids.tolist() == sequence
    (text,) = dialect.parse([BOS, *(qwen.encode(letter)[0] for letter in "hello"), EOS]).segments
    assert text.text == "hello"
    assert len(text.ids) == 5
    assert dialect.parse([BOS, *qwen.encode("hello"), EOS]) == Document((Text("hello"),))


@pytest.mark.parametrize("spelling", ["<|extra_203|>", "<|image start|>", "<|visual token 000000|>", "<s>"])
def test_spelled_control_tokens_stay_text(emu3, spelling):
    encoded = emu3.encode(Document((Text(f"a {spelling} b"),)))
    assert set(encoded.modality[1:-1].tolist()) == {Modality.TEXT}
    assert emu3.parse(encoded.ids) == Document((Text(f"a {spelling} b"),))


def test_span_modality_counts(emu3):
    video = Video(random_codes(2, 3, 4), fps=24, seconds=0.5)
    ids = emu3.encode_span(video)
    counts = np.bincount(span_modality(ids, emu3.vocabulary), minlength=len(Modality))
    expected = {
        Modality.VISION: 2 * 3 * 4,
        Modality.META: len("2*3*4*24*0.5"),
        Modality.BREAK: 2 * 3 + 2,
        Modality.CONTROL: 3,
    }
    assert counts.tolist() == [expected.get(modality, 0) for modality in Modality]
    with pytest.raises(ValueError, match="184622"):
        span_modality(np.array([184622]), emu3.vocabulary)
