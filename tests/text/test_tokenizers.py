"""What every text tokenizer promises, whatever its kind."""

import pickle
import unicodedata

import pytest
import sentencepiece
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from emu3_megatron.grammar import Dialect, Document, Image, Modality, Text
from emu3_megatron.text import ByteTokenizer, load_text_tokenizer, train_sentencepiece
from emu3_megatron.vocabulary import Vocabulary
from tests.text.conftest import SPELLINGS
from tests.text.qwen_file import qwen_ranks_file

SPECIAL = ["<unk>", "<s>", "</s>", "<|endoftext|>", "<|image start|>"]


def byte_level_file(folder, captions):
    """GPT-2's kind, as Emu3's export to transformers uses it."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.normalizer = tokenizers.normalizers.NFC()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(captions, trainer)
    tokenizer.add_tokens(["<image>"])
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    tokenizer.enable_truncation(5)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def unigram_file(folder, captions):
    """SentencePiece's kind in a tokenizer.json: control tokens are pieces of the model."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tokenizer.decoder = tokenizers.decoders.Metaspace()
    trainer = tokenizers.trainers.UnigramTrainer(
        vocab_size=300, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator([*captions, "0123456789 . * <|>/"], trainer)
    tokenizer.save(str(folder / "unigram.json"))
    return folder / "unigram.json"


def foreign_sentencepiece_file(folder, captions):
    """SentencePiece with its defaults: control pieces, no byte fallback, NFKC, an added space."""
    options = {"user_defined_symbols": ["*", ".", *"0123456789"], "hard_vocab_limit": False}
    with open(folder / "foreign.model", "wb") as stream:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(captions), model_writer=stream, vocab_size=300, minloglevel=2, **options
        )
    return folder / "foreign.model"


def own_sentencepiece_file(folder, captions):
    train_sentencepiece(captions, folder / "own.model", 600)
    return folder / "own.model"


MAKERS = {
    "byte-level": byte_level_file,
    "unigram": unigram_file,
    "foreign": foreign_sentencepiece_file,
    "own": own_sentencepiece_file,
}


@pytest.fixture(scope="session")
def all_tokenizers(tmp_path_factory, captions, qwen):
    folder = tmp_path_factory.mktemp("tokenizers")
    made = {name: load_text_tokenizer(maker(folder, captions)) for name, maker in MAKERS.items()}
    return {"bytes": ByteTokenizer(), "qwen": qwen, **made}


NAMES = ("bytes", "qwen", *MAKERS)
LOSSLESS = ("bytes", "qwen", "byte-level", "own")


@pytest.fixture(params=NAMES)
def tokenizer(request, all_tokenizers):
    return all_tokenizers[request.param]


any_text = st.text(
    st.one_of(st.characters(), st.sampled_from("ab 红色0123*.<|>\n\t\u0301\ud83d\ude00\u2581"))
)


@given(st.sampled_from(NAMES), any_text)
def test_ids_are_in_range_and_the_canonical_form_is_stable(all_tokenizers, name, text):
    tokenizer = all_tokenizers[name]
    ids = tokenizer.encode(text)
    assert all(0 <= token < tokenizer.size for token in ids)
    canonical = tokenizer.normalize(text)
    assert tokenizer.normalize(canonical) == canonical
    assert tokenizer.decode(tokenizer.encode(canonical)) == canonical


@given(st.sampled_from(NAMES), st.lists(any_text, max_size=4))
def test_a_batch_is_its_texts_one_by_one(all_tokenizers, name, texts):
    batch = all_tokenizers[name].encode_batch(texts)
    assert [ids.tolist() for ids in batch] == [all_tokenizers[name].encode(text) for text in texts]
    assert all(ids.dtype.kind in "iu" for ids in batch)


@given(st.sampled_from(LOSSLESS), any_text)
def test_nothing_is_lost_but_the_form_of_characters(all_tokenizers, name, text):
    tokenizer = all_tokenizers[name]
    joined = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    expected = {
        "bytes": joined,
        "qwen": unicodedata.normalize("NFC", joined),
        "byte-level": unicodedata.normalize("NFC", joined),
        "own": joined.replace("\u2581", " "),
    }
    assert tokenizer.decode(tokenizer.encode(text)) == expected[name]


@given(st.sampled_from(NAMES), st.data())
def test_every_document_the_parser_accepts_is_written_back_as_it_was(all_tokenizers, name, data):
    tokenizer = all_tokenizers[name]
    vocabulary = Vocabulary.build("test", text_size=tokenizer.size, codebook_size=4)
    dialect = Dialect.preset("emu3", vocabulary, tokenizer)
    texts = st.lists(st.integers(0, tokenizer.size - 1), max_size=8)
    image = dialect.encode_span(Image([[1, 2], [3, 0]]))
    ids = [vocabulary.bos, *data.draw(texts), *image, *data.draw(texts), vocabulary.eos]
    assert dialect.encode(dialect.parse(ids)).ids.tolist() == ids


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_the_spelling_of_a_control_token_is_ordinary_text(tokenizer, spelling):
    vocabulary = Vocabulary.build("test", text_size=tokenizer.size, codebook_size=4)
    dialect = Dialect.preset("emu3", vocabulary, tokenizer)
    for text in (spelling, f"a{spelling}b", f"红 {spelling} 1"):
        encoded = dialect.encode(Document((Text(text),)))
        assert set(encoded.modality[1:-1].tolist()) == {Modality.TEXT}
        assert len(encoded.ids) > 3  # several ids: the spelling is not one token


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spelled_control_tokens_survive(all_tokenizers, spelling):
    for name in LOSSLESS:
        assert all_tokenizers[name].decode(all_tokenizers[name].encode(f"a {spelling}b")) == f"a {spelling}b"


def test_ids_that_are_no_text_have_no_text(tokenizer):
    for token in (-1, tokenizer.size, tokenizer.size + 211):
        with pytest.raises(ValueError, match="is not a text id"):
            tokenizer.decode([token])


def test_the_empty_text(tokenizer):
    assert tokenizer.encode("") == []
    assert tokenizer.decode([]) == ""


def test_tokenizers_cross_process_borders(tokenizer):
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.encode("a 红色 90*90") == tokenizer.encode("a 红色 90*90")
    assert copy.fingerprint == tokenizer.fingerprint


def test_fingerprints_differ(all_tokenizers):
    assert len({tokenizer.fingerprint for tokenizer in all_tokenizers.values()}) == len(NAMES)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tiktoken", b"not base64\n", "line 1 is not 'BASE64 RANK'"),
        ("a.tiktoken", b"IQ== 0\n", "255 of the 256 bytes missing"),
        ("a.tiktoken", b"", "not a whole tiktoken ranks file"),
        ("a.model", b"not a model", "not a SentencePiece model"),
        ("a.model", b"", "not a SentencePiece model"),
        ("tokenizer.json", b"{", "not a tokenizer.json"),
        ("tokenizer.json", b"[]", "not a tokenizer.json"),
        ("tokenizer.json", b'{"model": {}}', "not a tokenizer.json"),
        ("a.txt", b"", "unknown kind of text tokenizer"),
    ],
)
def test_files_that_are_no_tokenizers_are_refused_in_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_text_tokenizer(tmp_path / name)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"b\.model: there is no such file"):
        load_text_tokenizer(tmp_path / "b.model")


def test_loading_by_name(tmp_path):
    assert load_text_tokenizer(qwen_ranks_file()).size == 151643
