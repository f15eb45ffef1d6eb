"""Commands that the documentation tells people to type are parsed by the programs they name."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def commands(program: str) -> list[list[str]]:
    """Words of every command line of the pages that calls `program`, comments left out."""
    found = []
    for page in PAGES:
        for language, block in BLOCK.findall(page.read_text()):
            if language not in ("", "bash"):
                continue
            for line in block.replace("\\\n", " ").splitlines():
                if program in line and line.count("'") % 2 == line.count('"') % 2 == 0:
                    words = shlex.split(line, comments=True)
                    found += [words] if program in words else []
    return found


def test_training_commands_are_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    from emu3_megatron.training import command_line

    monkeypatch.chdir(ROOT)
    parsed = 0
    for words in commands("emu3_megatron.training"):
        arguments = words[words.index("emu3_megatron.training") + 1 :]
        processes = words[words.index("--nproc-per-node") + 1] if "--nproc-per-node" in words else "1"
        if "--config" not in arguments or not (ROOT / arguments[arguments.index("--config") + 1]).is_file():
            continue  # a placeholder, or a report that needs no configuration
        asked = command_line.parse([*arguments, "--world-size", processes])
        assert asked.world_size == int(processes)
        parsed += 1
    assert parsed >= 5


def test_generation_commands_are_valid() -> None:
    from emu3_megatron.inference.command_line import build_parser

    lines = commands("tools/generate.py")
    assert len(lines) >= 3
    for words in lines:
        arguments = words[words.index("tools/generate.py") + 1 :]
        assert build_parser().parse_args(arguments).task == arguments[0]
