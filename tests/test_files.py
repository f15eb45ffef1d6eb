"""JSON Lines as every manifest is read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from emu3_megatron.errors import UserError
from emu3_megatron.files import MAX_DEPTH, json_lines, parse_json


def test_a_line_ends_at_a_newline_and_nowhere_else(tmp_path: Path) -> None:
    # JSON may hold U+2028 and U+0085 as they are; str.splitlines would cut there.
    rows = [{"caption": "one\u2028two\x85three"}, {"caption": "four"}]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", "utf-8")
    assert list(json_lines(path)) == rows


@pytest.mark.parametrize(("line", "reason"), [("{", "not JSON"), ("[1]", "a JSON list"), ("3", "a JSON int")])
def test_a_bad_line_is_named(tmp_path: Path, line: str, reason: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n\n' + line + "\n")
    with pytest.raises(UserError, match=f"rows.jsonl, line 3: {reason}"):
        list(json_lines(path))


def test_json_of_any_depth_is_parsed_or_refused_without_reaching_the_end_of_the_stack() -> None:
    # At the stack's end whatever is collected meanwhile fails too, and pytest calls that a failure.
    whole = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    assert parse_json(whole) == parse_json(whole.encode()) == json.loads(whole)
    wide = json.dumps([{"]": '\\"[[{', "a": [[]]}] * MAX_DEPTH + ["[" * 9 * MAX_DEPTH])
    assert parse_json(wide) == json.loads(wide)
    for deep in ("[" * 100_000, "[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), '{"a":' * 300):
        with pytest.raises(ValueError, match="nested deeper than 200"):
            parse_json(deep)
