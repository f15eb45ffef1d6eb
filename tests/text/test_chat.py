"""The released prompts."""

import numpy as np
import pytest

from emu3_megatron.grammar import Document, Image, Text
from emu3_megatron.text import CHAT_TEMPLATES, ChatTemplate

IMAGE = Image(np.zeros((2, 2), dtype=np.int64))
CHAT = CHAT_TEMPLATES["emu3-chat"]


def test_without_media_the_turn_is_one_string():
    text = "You are a helpful assistant. USER: Hello. ASSISTANT:"
    assert CHAT.render("Hello") == Document((Text(text),))


def test_media_cut_the_string_where_they_stand():
    assert CHAT.render("What?", [IMAGE, IMAGE], answer="A cat") == Document(
        (
            Text("You are a helpful assistant. USER: "),
            IMAGE,
            IMAGE,
            Text("What?. ASSISTANT: A cat"),
        )
    )


def test_first_stage_is_media_and_text():
    assert CHAT_TEMPLATES["emu3-stage1"].render("a cat", [IMAGE]) == Document((IMAGE, Text("a cat")))


@pytest.mark.parametrize("question", ["{media}", "{question} {0}", "<|image start|>2*2<|image token|>", "{"])
def test_a_question_is_only_text(question):
    (_, _, text) = CHAT.render(question, [IMAGE]).segments
    assert text == Text(f"{question}. ASSISTANT:")


def test_the_prompt_is_a_prefix_of_the_answered_turn(qwen):
    """So that a loss on the answer alone can be cut at the prompt's length."""
    for answer in ("A cat.", "是一只猫", "42", "'quoted'", "(no)", "\u00e9t\u00e9"):
        prompt = qwen.encode(CHAT.render("What?").segments[0].text)
        whole = qwen.encode(CHAT.render("What?", answer=answer).segments[0].text)
        assert whole[: len(prompt)] == prompt


@pytest.mark.parametrize("pattern", ["{media}", "{question}", "{media}{question}{media}", ""])
def test_templates_hold_each_place_once(pattern):
    with pytest.raises(ValueError, match="exactly once"):
        ChatTemplate(pattern)
