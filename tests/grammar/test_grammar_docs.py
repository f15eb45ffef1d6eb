"""The examples of docs/grammar.md run as they stand."""

import re
from pathlib import Path

from emu3_megatron.vocabulary import Vocabulary
from tests.text.qwen_file import qwen_ranks_file

PAGE = Path(__file__).parents[2] / "docs" / "grammar.md"


def test_examples_run(tmp_path, monkeypatch):
    (tmp_path / "qwen.tiktoken").symlink_to(qwen_ranks_file())
    monkeypatch.chdir(tmp_path)
    examples = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(examples) == 3
    names: dict[str, object] = {}
    for example in examples:
        exec(compile(example, str(PAGE), "exec"), names)
    assert names["automaton"].forced_run(names["state"]) == []
    assert names["allowed"].kind == "vision"


def test_stated_ids_are_the_vocabularys():
    vocabulary = Vocabulary.preset("emu3")
    rows = re.findall(r"^\| `([A-Z]+)` \|.*\| (\d+) \| (\d+) \|$", PAGE.read_text(), re.MULTILINE)
    assert {name.lower(): int(token) for name, token, _ in rows} == vocabulary.control_ids
    assert all(int(token) - int(distance) == vocabulary.text_size for _, token, distance in rows)
