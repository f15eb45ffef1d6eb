"""The laws of the grammar, for every dialect, against the slow reference."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from emu3_megatron.grammar import Document, GrammarError, Image, Modality, Text, Video
from tests.grammar import reference
from tests.grammar.conftest import NAMES
from tests.grammar.reference import recognise

PROBES = (
    *(
        reference.BOS,
        reference.EOS,
        reference.BOI,
        reference.EOI,
        reference.IMG,
        reference.EOL,
        reference.EOF,
    ),
    *(ord(character) for character in "012349*.a"),
    *(reference.FIRST_CODE, reference.FIRST_CODE + reference.CODES - 1),
    *(256, 461, -1, reference.FIRST_CODE + reference.CODES),  # pad, an unused control id, outside
)


def codes(*dimensions):
    shapes = st.tuples(*(st.integers(1, limit) for limit in dimensions))
    return shapes.flatmap(
        lambda shape: hnp.arrays(np.int64, shape, elements=st.integers(0, reference.CODES - 1))
    )


def decimals():
    return st.integers(1, 9_999_999).map(lambda thousandths: thousandths / 1000)


def documents(name):
    """Canonical documents of a dialect."""
    segments = [
        st.text(st.characters(exclude_categories=["Cs"])).map(Text),
        codes(4, 4).map(Image),
        codes(1, 12).map(Image),
    ]
    if name == "emu3":
        segments.append(st.builds(Video, codes(3, 3, 3), fps=decimals(), seconds=decimals()))
    if name == "emu3-frames":
        segments.append(st.builds(Video, codes(3, 3, 3)))
    return st.lists(st.one_of(segments), max_size=5).map(lambda chosen: Document(tuple(chosen)))


named_documents = st.sampled_from(NAMES).flatmap(lambda name: st.tuples(st.just(name), documents(name)))


def outcome(check, ids):
    """("valid", length), ("malformed", position) or ("incomplete", length), as the reference says it."""
    try:
        check(ids)
    except GrammarError as error:
        return "incomplete" if error.incomplete else "malformed", error.position
    return "valid", len(ids)


def follow(dialect):
    """A check by the automaton alone, id by id."""

    def check(ids):
        automaton = dialect.automaton()
        state = automaton.start()
        for position, token in enumerate(ids):
            if token not in automaton.allowed(state):
                raise GrammarError("", position=position)
            state = automaton.advance(state, token)
        if not automaton.is_complete(state):
            raise automaton.incomplete(state, len(ids))

    return check


@given(named_documents)
def test_parsing_inverts_encoding(dialects, named):
    name, document = named
    encoded = dialects[name].encode(document)
    assert recognise(name, encoded.ids.tolist())[0] == ("valid", len(encoded.ids))
    parsed = dialects[name].parse(encoded.ids)
    assert parsed == document
    assert hash(parsed) == hash(document)
    assert np.array_equal(dialects[name].encode(parsed).ids, encoded.ids)


@given(st.sampled_from(NAMES), st.data())
def test_encoding_inverts_parsing_for_any_accepted_sequence(dialects, name, data):
    """Any text ids are accepted, also those that no text encodes to: broken UTF-8 here."""
    dialect = dialects[name]
    pieces = data.draw(
        st.lists(st.one_of(st.lists(st.integers(0, 255), min_size=1), codes(3, 3).map(Image)), max_size=5)
    )
    ids = [reference.BOS]
    for piece in pieces:
        ids += dialect.encode_span(piece).tolist() if isinstance(piece, Image) else piece
    ids.append(reference.EOS)
    assert dialect.encode(dialect.parse(ids)).ids.tolist() == ids


@settings(max_examples=50)
@given(named_documents)
def test_every_proper_prefix_is_incomplete_with_its_position(dialects, named):
    name, document = named
    ids = dialects[name].encode(document).ids
    for length in range(len(ids)):
        assert outcome(dialects[name].parse, ids[:length]) == ("incomplete", length)


@settings(max_examples=50)
@given(named_documents)
def test_the_automaton_allows_exactly_what_the_ebnf_lets_follow(dialects, named):
    name, document = named
    automaton = dialects[name].automaton()
    ids = dialects[name].encode(document).ids.tolist()
    state = automaton.start()
    for length in range(len(ids) + 1):
        expected = recognise(name, ids[:length])[1]
        assert automaton.allowed(state).ids().tolist() == sorted(expected)
        assert automaton.start(ids[:length]) == state
        if length < len(ids):
            state = automaton.advance(state, ids[length])
    assert automaton.is_complete(state)


@settings(max_examples=300)
@given(named_documents, st.data())
def test_random_mutations_are_judged_as_the_reference_judges_them(dialects, named, data):
    name, document = named
    ids = dialects[name].encode(document).ids.tolist()
    for _ in range(data.draw(st.integers(1, 3))):
        position = data.draw(st.integers(0, len(ids)))
        inserted = data.draw(st.lists(st.sampled_from(PROBES), max_size=2))
        ids[position : position + data.draw(st.integers(0, 2))] = inserted
    verdict = recognise(name, ids)[0]
    assert outcome(dialects[name].parse, ids) == verdict
    assert outcome(follow(dialects[name]), ids) == verdict
    if verdict[0] == "valid":
        assert dialects[name].encode(dialects[name].parse(ids)).ids.tolist() == ids


def mutations(ids):
    for position in range(len(ids) + 1):
        for probe in PROBES:
            yield [*ids[:position], probe, *ids[position:]]
            if position < len(ids):
                yield [*ids[:position], probe, *ids[position + 1 :]]
        yield ids[:position] + ids[position + 1 :]


def specimen(name):
    image = Image(np.arange(4).reshape(2, 2))
    codes_THW = np.arange(4).reshape(2, 2, 1)
    videos = {"emu3": (Video(codes_THW, fps=29.97, seconds=0.5),), "emu3-frames": (Video(codes_THW),)}
    return Document((Text("1*"), image, *videos.get(name, ()), Text("b")))


def test_every_single_change_is_judged_as_the_reference_judges_it(dialect):
    ids = dialect.encode(specimen(dialect.name)).ids.tolist()
    for mutant in mutations(ids):
        verdict = recognise(dialect.name, mutant)[0]
        assert outcome(dialect.parse, mutant) == verdict
        assert outcome(follow(dialect), mutant) == verdict


def test_every_single_change_of_a_span_is_judged_as_the_reference_judges_it(dialect):
    def lone_span(name):
        yield frozenset([reference.BOI])
        yield from reference.span(name)

    for segment in specimen(dialect.name).segments:
        if isinstance(segment, Text):
            continue
        ids = dialect.encode_span(segment).tolist()
        assert dialect.parse_span(ids) == segment
        for mutant in [*mutations(ids), *(ids[:length] for length in range(len(ids)))]:
            assert outcome(dialect.parse_span, mutant) == recognise(dialect.name, mutant, lone_span)[0]


@given(named_documents)
def test_modality_follows_the_place_of_an_id(dialects, named):
    name, document = named
    encoded = dialects[name].encode(document)
    in_meta = False
    for token, modality in zip(encoded.ids.tolist(), encoded.modality.tolist(), strict=True):
        in_meta = token != reference.IMG and (in_meta or token == reference.BOI)
        if token in reference.VISION:
            expected = Modality.VISION
        elif token in reference.TEXT:
            expected = Modality.META if in_meta else Modality.TEXT
        else:
            expected = Modality.BREAK if token in (reference.EOL, reference.EOF) else Modality.CONTROL
        assert modality == expected


@given(st.floats(0.001, 9999), st.floats(0.001, 9999))
def test_rates_and_durations_round_to_three_decimals(dialects, fps, seconds):
    document = Document((Video(np.zeros((1, 1, 1), dtype=np.int64), fps=fps, seconds=seconds),))
    (video,) = dialects["emu3"].canonical(document).segments
    assert video.fps == pytest.approx(fps, abs=0.0005001)
    assert video.seconds == pytest.approx(seconds, abs=0.0005001)
    assert dialects["emu3"].canonical(Document((video,))) == Document((video,))
