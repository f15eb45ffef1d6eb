"""What a generation engine relies on."""

import pickle

import numpy as np
import pytest

from emu3_megatron.grammar import Dialect, Document, GrammarError, Image, Phase, Text, Video
from emu3_megatron.text import ByteTokenizer
from emu3_megatron.vocabulary import Vocabulary


def characters(allowed, vocabulary):
    """The allowed ids of a meta text, as a string; ``|`` for IMG."""
    return "".join("|" if token == vocabulary.img else chr(token) for token in allowed.ids())


@pytest.mark.parametrize(
    ("name", "meta", "expected"),
    [
        ("emu3", "", "123456789"),
        ("emu3", "9", "*0123456789"),
        ("emu3", "9999", "*"),
        ("emu3", "90*", "123456789"),
        ("emu3", "90*90", "*0123456789|"),
        ("emu3", "90*9000", "*|"),
        ("emu3", "2*3*4", "*0123456789"),
        ("emu3", "2*3*4*", "0123456789"),
        ("emu3", "2*3*4*0", "."),
        ("emu3", "2*3*4*0.00", "123456789"),
        ("emu3", "2*3*4*24", "*.0123456789"),
        ("emu3", "2*3*4*24.", "0123456789"),
        ("emu3", "2*3*4*24.5", "*0123456789"),
        ("emu3", "2*3*4*24.50", "123456789"),
        ("emu3", "2*3*4*24.505", "*"),
        ("emu3", "2*3*4*24*5", ".0123456789|"),
        ("emu3", "2*3*4*24*5.125", "|"),
        ("emu3-frames", "2*3*4", "0123456789|"),
        ("emu3.5", "90*90", "0123456789|"),
        ("emu3.5", "90*9000", "|"),
    ],
)
def test_meta_text_allows_only_what_can_become_a_size(dialects, name, meta, expected):
    vocabulary, automaton = dialects[name].vocabulary, dialects[name].automaton()
    allowed = automaton.allowed(automaton.start([vocabulary.bos, vocabulary.boi, *meta.encode()]))
    assert characters(allowed, vocabulary) == "".join(sorted(expected))
    assert allowed.kind == ("forced" if len(expected) == 1 else "set")


@pytest.mark.parametrize("seed", range(20))
def test_whatever_the_automaton_lets_through_parses(dialect, seed):
    """A random walk; sizes are kept small by ending every number as soon as it may end."""
    rng = np.random.default_rng(seed)
    automaton = dialect.automaton()
    state, ids = automaton.start(), []
    while not automaton.is_complete(state):
        allowed = automaton.allowed(state).ids().tolist()
        endings = [token for token in allowed if token in (ord("*"), dialect.vocabulary.img)]
        if automaton.allowed(state).kind == "text" and len(ids) > 30:
            endings = [dialect.vocabulary.eos]
        elif automaton.allowed(state).kind == "text" and rng.random() < 0.3:
            endings = [dialect.vocabulary.boi]
        ids.append(int(rng.choice(endings or allowed)))
        state = automaton.advance(state, ids[-1])
    assert dialect.encode(dialect.parse(ids)).ids.tolist() == ids


def test_forced_runs_are_known_ahead(dialects):
    vocabulary, automaton = dialects["emu3"].vocabulary, dialects["emu3"].automaton()
    ids = dialects["emu3"].encode_span(Image(np.zeros((2, 3), dtype=np.int64))).tolist()
    assert automaton.forced_run(automaton.start()) == [vocabulary.bos]
    last = automaton.start([vocabulary.bos, *ids[:-3]])
    assert automaton.forced_run(last) == [vocabulary.eol, vocabulary.eof, vocabulary.eoi]
    after = automaton.run(last, automaton.forced_run(last))
    assert automaton.allowed(after).kind == "text"
    assert automaton.forced_run(after) == []
    assert automaton.forced_run(automaton.start([vocabulary.bos, *ids, vocabulary.eos])) == []


def test_starting_anywhere_equals_walking_there(dialects):
    """Continuation: a prompt may end in a text, in the meta text, or among the frames of a video."""
    dialect = dialects["emu3"]
    video = Video(np.arange(24).reshape(4, 2, 3) % 4, fps=24, seconds=0.7)
    ids = dialect.encode(Document((Text("hi"), video, Text("ho")))).ids
    automaton = dialect.automaton()
    whole = automaton.start(ids)
    for cut in range(len(ids) + 1):
        assert automaton.run(automaton.start(ids[:cut]), ids[cut:]) == whole


def test_open_span_is_the_beginning_of_the_whole_span(dialects):
    codes = np.arange(24).reshape(4, 2, 3) % 4
    for name, stated in (("emu3", {"fps": 24, "seconds": 0.7}), ("emu3-frames", {})):
        whole = dialects[name].encode_span(Video(codes, **stated))
        for frames in range(5):
            opened = dialects[name].open_span(2, 3, frames=4, **stated, codes=codes[:frames])
            assert np.array_equal(opened, whole[: len(opened)])
        assert len(opened) == len(whole) - 1
    with pytest.raises(ValueError, match="first frames"):
        dialects["emu3-frames"].open_span(2, 3, frames=3, codes=codes)


def test_states_are_small_and_hashable_and_sets_are_shared(dialects):
    dialect = dialects["emu3"]
    automaton = dialect.automaton()
    video = Video(np.zeros((3, 4, 5), dtype=np.int64), fps=24, seconds=0.5)
    ids = dialect.encode(Document((Text("hi"), video, Image(video.codes[0])))).ids.tolist()
    state, seen, sets = automaton.start(), set(), set()
    for token in ids:
        seen.add(state)
        sets.add(id(automaton.allowed(state)))
        state = automaton.advance(state, token)
    assert len(seen) > 70
    assert len(sets) <= 15
    assert len(pickle.dumps(state)) < 200
    assert pickle.loads(pickle.dumps(automaton)).start(ids) == state


def test_mask_matches_ids_and_leaves_padding_out(dialects):
    dialect = dialects["emu3"]
    vocabulary, automaton = dialect.vocabulary, dialect.automaton()
    for prefix in ([], [vocabulary.bos], [vocabulary.bos, *dialect.open_span(1, 1)]):
        allowed = automaton.allowed(automaton.start(prefix))
        mask = allowed.mask(vocabulary.padded_size)
        assert mask.shape == (vocabulary.padded_size,)
        assert np.flatnonzero(mask).tolist() == allowed.ids().tolist()
        assert mask is allowed.mask(vocabulary.padded_size)
        assert not mask.flags.writeable
        assert len(allowed) == mask.sum()


def test_text_ids_end_where_the_tokenizer_ends():
    """A vocabulary may have more room for text than its tokenizer has ids."""
    vocabulary = Vocabulary.build("roomy", text_size=300, codebook_size=4)
    dialect = Dialect.preset("emu3", vocabulary, ByteTokenizer())
    automaton = dialect.automaton()
    assert automaton.allowed(automaton.start([vocabulary.bos])).stop == 256
    with pytest.raises(GrammarError) as caught:
        dialect.parse([vocabulary.bos, 256, vocabulary.eos])
    assert caught.value.position == 1


def test_errors_say_what_stands_where_and_what_was_expected(dialects):
    dialect = dialects["emu3"]
    vocabulary = dialect.vocabulary
    ids = dialect.encode(Document((Image(np.zeros((2, 2), dtype=np.int64)),))).ids.tolist()
    with pytest.raises(GrammarError, match=r"EOI \(466\) at position 8 cannot follow: expected EOL"):
        dialect.parse([*ids[:8], vocabulary.eoi])
    with pytest.raises(GrammarError, match="ends after 8 ids, where EOL"):
        dialect.parse(ids[:8])
    with pytest.raises(GrammarError, match="expected nothing more"):
        dialect.parse([*ids, vocabulary.pad])
    with pytest.raises(GrammarError, match=r"vision code 0 .* expected text, BOI or EOS"):
        dialect.parse([vocabulary.bos, vocabulary.vision_offset])
    error = pickle.loads(pickle.dumps(GrammarError("here", position=3, incomplete=True)))
    assert (str(error), error.position, error.incomplete) == ("here", 3, True)


def test_a_hostile_size_costs_nothing(dialects):
    """9999*9999 states a hundred million ids; only those that are there are looked at."""
    dialect = dialects["emu3"]
    prefix = [dialect.vocabulary.bos, dialect.vocabulary.boi, *b"9999*9999", dialect.vocabulary.img]
    automaton = dialect.automaton()
    state = automaton.start([*prefix, *[dialect.vocabulary.vision_offset] * 100])
    assert state.phase is Phase.BODY
    with pytest.raises(GrammarError) as caught:
        dialect.parse([*prefix, dialect.vocabulary.eol])
    assert caught.value.position == len(prefix)
