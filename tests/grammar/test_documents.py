"""What may be written, and what is refused."""

import numpy as np
import pytest

from emu3_megatron.grammar import (
    DIALECTS,
    Dialect,
    DialectRules,
    Document,
    Field,
    Image,
    RowBreak,
    SpanRule,
    Text,
    Video,
)
from emu3_megatron.text import ByteTokenizer
from emu3_megatron.vocabulary import Vocabulary

IMAGE = Image(np.zeros((1, 2), dtype=np.int64))


def test_a_document_has_one_form():
    parts = (Text(""), Text("a "), Text(""), Text("b"), IMAGE, Text(""), IMAGE, Text("c"), Text("d"))
    assert Document(parts) == Document((Text("a b"), IMAGE, IMAGE, Text("cd")))
    assert Document((Text(""),)) == Document(())


def test_texts_with_ids_are_not_joined():
    with pytest.raises(ValueError, match="cannot stand beside another text"):
        Document((Text("a"), Text("b", (98,))))
    assert Document((Text("", (255,)), IMAGE)).segments[0] == Text("", (255,))


@pytest.mark.parametrize("segment", ["a", np.zeros((2, 2)), None])
def test_other_segments_are_refused(segment):
    with pytest.raises(ValueError, match="Text, Image or Video"):
        Document((segment,))


def test_text_ids_cannot_smuggle_control_tokens(dialects):
    with pytest.raises(ValueError, match=r"text ids must lie in \[0, 256\)"):
        dialects["emu3"].encode(Document((Text("x", (dialects["emu3"].vocabulary.boi,)),)))


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (np.zeros((2, 2, 2), dtype=np.int64), r"\[H, W\].*\(2, 2, 2\)"),
        (np.zeros((0, 2), dtype=np.int64), r"none empty.*\(0, 2\)"),
        (np.zeros((2, 2)), "float64"),
        (np.array([[4]]), r"\[0, 4\).*4 to 4"),
        (np.array([[-1, 3]]), r"\[0, 4\).*-1 to 3"),
        (np.zeros((1, 10_000), dtype=np.int64), "width=10000"),
    ],
)
def test_codes_that_cannot_be_written_are_refused(dialect, codes, message):
    with pytest.raises(ValueError, match=message):
        dialect.encode_span(Image(codes))


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.uint64])
def test_codes_of_any_integer_type(dialects, dtype):
    codes = np.array([[0, 3], [2, 1]], dtype=dtype)
    for view in (codes, np.asfortranarray(codes), np.repeat(codes, 2, axis=1)[:, ::2]):
        assert dialects["emu3"].parse_span(dialects["emu3"].encode_span(Image(view))) == Image(codes)


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({}, "fps, which is missing"),
        ({"fps": 24.0}, "seconds, which is missing"),
        ({"fps": 0.0004, "seconds": 1.0}, "fps=0.0004"),
        ({"fps": 24.0, "seconds": -1.0}, "seconds=-1.0"),
        ({"fps": float("nan"), "seconds": 1.0}, "fps=nan"),
        ({"fps": 24.0, "seconds": float("inf")}, "seconds=inf"),
        ({"fps": 24.0, "seconds": 9999.9996}, "seconds=9999.9996"),
    ],
)
def test_rates_and_durations_that_cannot_be_written_are_refused(dialects, stated, message):
    with pytest.raises(ValueError, match=message):
        dialects["emu3"].encode_span(Video(np.zeros((1, 1, 1), dtype=np.int64), **stated))


def test_span_length_is_the_length_of_the_span(dialects):
    for height, width in ((1, 1), (3, 7), (12, 5)):
        codes = np.zeros((2, height, width), dtype=np.int64)
        for dialect in dialects.values():
            assert dialect.span_length(height, width) == len(dialect.encode_span(Image(codes[0])))
        for name in ("emu3", "emu3-frames"):
            stated = {"fps": 23.976, "seconds": 1.5}
            length = dialects[name].span_length(height, width, frames=2, **stated)
            assert length == len(dialects[name].encode_span(Video(codes, **stated)))


def test_dialects_are_data(small_vocabulary):
    """Another dialect is another table entry: here videos joined like Emu3.5's images, rate first."""
    video = SpanRule(
        fields=(Field.FPS, Field.FRAMES, Field.HEIGHT, Field.WIDTH),
        row_break=RowBreak.BETWEEN,
        frame_break=True,
    )
    rules = DialectRules(image=DIALECTS["emu3.5"].image, video=video)
    dialect = Dialect("mine", rules, small_vocabulary, ByteTokenizer())
    document = Document((Video(np.arange(12).reshape(2, 2, 3) % 4, fps=0.5), IMAGE))
    assert dialect.parse(dialect.encode(document).ids) == document


def test_ambiguous_dialects_are_refused():
    image = DIALECTS["emu3"].image
    fields = (Field.FPS, Field.HEIGHT, Field.WIDTH)
    as_many = SpanRule(fields=fields, row_break=RowBreak.NEVER, frame_break=False)
    with pytest.raises(ValueError, match="number of fields"):
        DialectRules(image=as_many, video=DIALECTS["emu3-frames"].video)
    with pytest.raises(ValueError, match="must state its number of frames"):
        DialectRules(image=image, video=image)
    with pytest.raises(ValueError, match="height and width"):
        SpanRule(fields=(Field.HEIGHT,), row_break=RowBreak.NEVER, frame_break=False)


def test_fingerprints_tell_dialects_vocabularies_and_tokenizers_apart(dialects):
    class Other(ByteTokenizer):
        fingerprint = "another"

    other_vocabulary = Vocabulary.build("other", text_size=256, codebook_size=5)
    fingerprints = [dialect.fingerprint for dialect in dialects.values()]
    fingerprints.append(Dialect.preset("emu3", other_vocabulary, ByteTokenizer()).fingerprint)
    fingerprints.append(Dialect.preset("emu3", dialects["emu3"].vocabulary, Other()).fingerprint)
    assert len(set(fingerprints)) == 5
    same = Dialect.preset("emu3", dialects["emu3"].vocabulary, ByteTokenizer())
    assert same.fingerprint == dialects["emu3"].fingerprint


def test_unfit_tokenizers_are_refused(small_vocabulary):
    class TooLarge(ByteTokenizer):
        size = 257

    class WithoutStar(ByteTokenizer):
        def encode(self, text):
            return [0 if byte == ord("*") else byte for byte in super().encode(text)]

    with pytest.raises(ValueError, match="257 ids"):
        Dialect.preset("emu3", small_vocabulary, TooLarge())
    with pytest.raises(ValueError, match=r"no token for '\*' alone"):
        Dialect.preset("emu3", small_vocabulary, WithoutStar())
    with pytest.raises(ValueError, match=r"'emu9'.*emu3, emu3-frames, emu3\.5"):
        Dialect.preset("emu9", small_vocabulary, ByteTokenizer())


@pytest.mark.parametrize("ids", [np.zeros((2, 2), dtype=np.int64), np.zeros(3), ["a"], [True]])
def test_sequences_must_be_flat_integers(dialects, ids):
    with pytest.raises(ValueError, match="ids must be a sequence of integers"):
        dialects["emu3"].parse(ids)
