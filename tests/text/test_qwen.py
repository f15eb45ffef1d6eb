"""Real ids of Qwen's tokenizer, which is Emu3's."""

import unicodedata

import pytest


def test_size(qwen):
    assert qwen.size == 151643


def test_digits_are_single_tokens(qwen):
    assert [qwen.encode(digit) for digit in "0123456789"] == [[token] for token in range(15, 25)]
    assert qwen.encode("*") == [9]
    assert qwen.encode("90*90") == [24, 15, 9, 24, 15]
    assert qwen.encode("2024") == [17, 15, 17, 19]


def test_real_ids(qwen):
    """Known from Qwen's published examples."""
    assert qwen.encode("Hello world") == [9707, 1879]
    assert qwen.encode("你好") == [108386]


def test_text_is_brought_to_nfc(qwen):
    decomposed = unicodedata.normalize("NFD", "Café 가나다")
    assert decomposed != "Café 가나다"
    assert qwen.encode(decomposed) == qwen.encode("Café 가나다")
    assert qwen.normalize(decomposed) == "Café 가나다"


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("I'LL go", ["I", "'", "LL", " go"]),
        ("snake_case", ["snake", "_case"]),
        ("a\n\n b", ["a", "\n\n", " b"]),
        ("x  y", ["x", " ", " y"]),
        ("C++20", ["C", "++", "2", "0"]),
        ("ASSISTANT: yes", ["ASS", "IST", "ANT", ":", " yes"]),
    ],
)
def test_text_is_cut_by_qwens_pattern(qwen, text, pieces):
    """The cases where GPT-2's pattern, which the transformers port uses, gives other ids."""
    assert [qwen.decode([token]) for token in qwen.encode(text)] == pieces


@pytest.mark.parametrize("text", [" " * 200_000, "\n" * 50_000, "红" * 50_000, "a" * 50_000, "^" * 50_000])
def test_long_runs_are_no_trouble(qwen, text):
    assert qwen.decode(qwen.encode(text)) == text


def test_lone_surrogates_are_replaced(qwen):
    assert qwen.decode(qwen.encode("a\ud800b")) == "a\ufffdb"
    assert qwen.decode(qwen.encode("\ud83d\ude00")) == "😀"


def test_broken_utf8_decodes_with_replacement(qwen):
    (first, *_) = qwen.encode("𠀀")
    assert qwen.decode([first, *qwen.encode("a")]) == "\ufffda"
