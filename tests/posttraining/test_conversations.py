"""Conversation files: what is sound is read as it stands, what is not is named by file and line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from emu3_megatron.errors import UserError
from emu3_megatron.posttraining.conversation_files import ConversationInputs
from emu3_megatron.posttraining.conversations import Conversation, Turn, parse_conversation
from emu3_megatron.tokenization.entries import BadEntry

FOLDER = Path("media")


def talk(*values: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[n % 2], "value": value} for n, value in enumerate(values)]


GOOD: dict[str, Any] = {"id": "a", "image": "a.png", "conversations": talk("<image>\nWhat?", "A cup.")}


def parsed(**changes: Any) -> Conversation:
    result = parse_conversation({**GOOD, **changes}, place="x.json:1", folder=FOLDER)
    assert isinstance(result, Conversation), result
    return result


def questions(**changes: Any) -> list[tuple[str | int, ...]]:
    return [turn.question for turn in parsed(**changes).turns]


def refusal(record: Any) -> str:
    result = parse_conversation(record, place="x.json:7", folder=FOLDER)
    assert isinstance(result, BadEntry), result
    assert result.reason.startswith("x.json:7: ")
    return result.reason.removeprefix("x.json:7: ")


def test_a_llava_record() -> None:
    conversation = parsed()
    assert conversation.id == "a"
    assert conversation.turns == (Turn((0, "What?"), "A cup."),)
    (image,) = conversation.media
    assert (image.kind, str(image.media)) == ("image", "media/a.png")


def test_a_record_of_messages() -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
    ]
    conversation = parsed(image=None, conversations=None, messages=messages)
    assert (conversation.system, conversation.media) == ("Be brief.", ())
    assert conversation.turns == (Turn(("Hello",), "Hi"),)
    assert parsed(system="Be kind.").system == "Be kind."


def test_several_images_and_turns_keep_their_places() -> None:
    turns = talk("<image><image>\nCompare.", "Alike.", "And this: <image> ?", "Other.", "Why?", "Red.")
    assert questions(image=["a", "b", "c"], conversations=turns) == [
        (0, 1, "Compare."),
        ("And this: ", 2, " ?"),
        ("Why?",),
    ]


def test_images_and_videos_are_counted_apart() -> None:
    turns = talk("<video> or <image>?", "Both.")
    conversation = parsed(images=["a"], image=None, videos=["v"], conversations=turns)
    assert [entry.kind for entry in conversation.media] == ["image", "video"]
    assert conversation.turns[0].question == (1, "or ", 0, "?")


def test_media_without_tokens_precede_the_first_question() -> None:
    assert questions(image=["a", "b"], conversations=talk("What?", "Cups.")) == [(0, 1, "What?")]


def test_a_question_may_be_an_image_alone() -> None:
    assert questions(conversations=talk(" <image> \n", "A cup.")) == [(0,)]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"conversations": talk("<image>", "A", "B")}, "has no answer to its last question"),
        ({"conversations": talk("<image>")}, "has no answer"),
        ({"conversations": [{"from": "system", "value": "x"}]}, "has no answer"),
        ({"conversations": talk("<image>", "  ")}, "turn 2 is an answer without text"),
        ({"conversations": talk("<image>", "see <image>")}, "turn 2 is an answer with an image"),
        ({"conversations": talk("", "A"), "image": None}, "question 1 is empty"),
        ({"conversations": talk("<image><image>", "A")}, "has 2 tokens <image> but 1 images"),
        ({"conversations": talk("<image>", "A"), "image": None}, "has 1 tokens <image> but 0 images"),
        ({"image": ["a", "b"]}, "has 2 images but 1 tokens <image>"),
        ({"video": "v"}, "has 1 videos but 0 tokens <video>"),
        ({"image": ""}, "no path"),
        ({"image": 3}, "no path"),
        ({"image": "\ud800.png"}, "no path"),
        ({"image": "a", "images": ["b"]}, "both of the keys image, images"),
        ({"conversations": [{"from": "gpt", "value": "A"}]}, "turn 1 is a answer where a question is due"),
        ({"conversations": talk("<image>", "A") + talk("B", "C")[1:]}, "turn 3 is a answer where a question"),
        ({"conversations": [{"from": "cat", "value": "miaow"}]}, "turn 1 has \"from\": 'cat'"),
        ({"conversations": [{"from": "human", "value": 3}]}, 'turn 1 has "value": 3'),
        ({"conversations": ["hello"]}, "turn 1 is a JSON str"),
        ({"conversations": []}, "not a list of turns"),
        ({"conversations": None}, "must have one of the keys"),
        ({"messages": []}, "must have one of the keys"),
        ({"system": 3}, 'has a "system"'),
        ({"system": "You see <image>."}, "has a system message with an image"),
        (
            {"conversations": [{"from": "system", "value": "<video>"}, *talk("<image>", "A")]},
            "has a system message with an image or video token",
        ),
    ],
)
def test_a_record_that_cannot_be_used_says_why(changes: dict[str, Any], reason: str) -> None:
    assert reason in refusal({**GOOD, **changes})


def test_a_record_is_an_object() -> None:
    assert refusal([1]) == "is a JSON list; a conversation is an object"


def read(*paths: Path) -> list[Conversation | BadEntry]:
    inputs = ConversationInputs(paths, None)
    return list(inputs.entries(0, len(inputs)))


def summary(entries: list[Conversation | BadEntry]) -> list[str]:
    return [entry.place if isinstance(entry, Conversation) else f"! {entry.reason}" for entry in entries]


def test_json_lines_report_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "talk.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n\n{{broken\n{json.dumps(GOOD)}\n[]")
    first, second, third, fourth = summary(read(path))
    assert [first, third] == ["talk.jsonl:1", "talk.jsonl:4"]
    assert second.startswith("! talk.jsonl:3: is not valid JSON")
    assert fourth.startswith("! talk.jsonl:5: is a JSON list")


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("prefix", ["", "\ufeff"])
def test_a_list_is_read_as_lines_are(tmp_path: Path, indent: int | None, prefix: str) -> None:
    records = [{**GOOD, "id": f"sample é {n}"} for n in range(5)]
    path = tmp_path / "talk.json"
    path.write_text(prefix + json.dumps(records, indent=indent, ensure_ascii=False), encoding="utf-8")
    lines = tmp_path / "talk.jsonl"
    lines.write_text(prefix + "".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    ours, theirs = ([each.id for each in read(file)] for file in (path, lines))
    assert ours == theirs == [record["id"] for record in records]


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (lambda text: text.replace('"from": "gpt"', '"from": "gpt', 1), 11),
        (lambda text: text.replace('"id": "sample 0",', '"id": "sample 0"', 1), 4),
        (lambda text: text.replace("]\n  },", "\n  },", 1), 14),
    ],
    ids=["an open string", "a comma less", "a bracket less"],
)
def test_a_broken_record_of_a_list_costs_itself(tmp_path: Path, damage: Any, line: int) -> None:
    records = [{**GOOD, "id": f"sample {n}"} for n in range(3)]
    path = tmp_path / "talk.json"
    path.write_text(damage(json.dumps(records, indent=2)))
    first, *rest = read(path)
    assert isinstance(first, BadEntry)
    assert first.reason.startswith("talk.json:")
    assert "is not valid JSON" in first.reason
    assert abs(int(first.reason.split(":")[1]) - line) <= 1
    assert [entry.id for entry in rest] == ["sample 1", "sample 2"]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (json.dumps(GOOD).replace("cup", "caf\xe9").encode("latin-1"), "is not UTF-8: it has the byte 0xe9"),
        (json.dumps({**GOOD, "n": 0}).encode().replace(b" 0}", b" " + b"1" * 5000 + b"}"), "digits"),
        (b'{"id": "\xed\xa0\x80", "conversations": []}', "is not UTF-8: it has the byte 0xed"),
    ],
    ids=["Latin-1", "a long integer", "a surrogate"],
)
@pytest.mark.parametrize("is_list", [False, True])
def test_bytes_and_numbers_that_cannot_be_read_cost_their_record(
    tmp_path: Path, record: bytes, reason: str, is_list: bool
) -> None:
    records = [json.dumps({**GOOD, "id": f"sample é {n}"}, ensure_ascii=False).encode() for n in range(4)]
    records[2] = record
    path = tmp_path / "talk"
    path.write_bytes(b"[" + b",\n".join(records) + b"]" if is_list else b"\n".join(records))
    entries = read(path)
    assert [entry.id for entry in entries] == ["sample é 0", "sample é 1", "talk:3", "sample é 3"]
    assert isinstance(entries[2], BadEntry)
    assert entries[2].reason.startswith("talk:3: ")
    assert reason in entries[2].reason


def test_a_comma_missing_between_records_costs_nothing(tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    path.write_text(json.dumps([{**GOOD, "id": n} for n in range(3)], indent=2).replace("\n  },", "\n  }", 1))
    assert [entry.id for entry in read(path)] == ["0", "1", "2"]


def test_a_list_that_is_cut_off_reports_its_last_record(tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    path.write_text(json.dumps([GOOD, GOOD], indent=2)[:-30])
    first, second = read(path)
    assert isinstance(first, Conversation)
    assert isinstance(second, BadEntry)


def test_files_are_one_list(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text(json.dumps({**GOOD, "id": name}) + "\n")
    inputs = ConversationInputs([tmp_path / "a.jsonl", tmp_path / "b.jsonl"], tmp_path / "pictures")
    assert [entry.id for entry in inputs.entries(1, 2)] == ["b.jsonl"]
    (entry,) = inputs.entries(0, 1)
    assert isinstance(entry, Conversation)
    assert str(entry.media[0].media) == str(tmp_path / "pictures" / "a.png")


def test_a_file_that_cannot_be_read_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "wide.json").write_text(json.dumps([GOOD]), encoding="utf-16")
    with pytest.raises(UserError, match="convert it to UTF-8"):
        ConversationInputs([tmp_path / "wide.json"], None)
    with pytest.raises(UserError, match="cannot read"):
        ConversationInputs([tmp_path / "absent.json"], None)
