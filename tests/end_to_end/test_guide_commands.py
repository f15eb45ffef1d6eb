"""Every command that a page shows names a program that exists and options that it has.

`test_start.py` runs those of the start page and the README; `tests/examples/test_commands.py` parses those of
training and generation with their values.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.programs import ROOT, Programs

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^ *```(\w*)[^\n]*\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
WITHOUT_HELP = ("benchmarks/gpu/", "tests.slurm.cluster")
PASSED_ON = {"tools.plan": "emu3_megatron.training"}
"""Programs that take the options of another one beside their own."""


def lines(page: Path) -> Iterator[str]:
    """Lines of the page's shell blocks, continued ones joined; brackets of what may be left out are gone."""
    for language, block in BLOCK.findall(page.read_text()):
        for line in block.replace("\\\n", " ").splitlines() if language in ("", "bash") else ():
            yield re.sub(r"(?<!\S)\[|\](?!\S)", " ", line)


def split(line: str) -> list[str]:
    try:
        return shlex.split(line, comments=True)
    except ValueError:
        return []  # a quotation that goes on in the next line


def commands(page: Path) -> Iterator[tuple[list[str], list[str]]]:
    """Programs as `python` is told to run them, and their arguments."""
    for line in lines(page):
        words = split(line)
        while words and re.match(r"[A-Z_]+=", words[0]):
            words = words[1:]
        if not words or words[0] not in ("python", "torchrun"):
            continue
        if words[1] == "--nproc-per-node":
            words = [words[0], *words[3:]]
        program = words[1:3] if words[1] == "-m" else words[1:2]
        yield program, words[1 + len(program) :]


@pytest.fixture(scope="module")
def explain(program: Programs):  # type: ignore[no-untyped-def]
    """The help of a program, or of a part of it; asked for once."""

    @cache
    def ask(*words: str) -> str:
        ended = program(*words, "--help")
        assert ended.code == 0, ended.err
        return ended.out

    return ask


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_options_on_a_page_exist(page: Path, explain) -> None:  # type: ignore[no-untyped-def]
    for words, arguments in commands(page):
        assert words[0] == "-m" or (ROOT / words[0]).is_file(), words
        if words[-1].startswith(WITHOUT_HELP):
            continue
        known = explain(*words)
        part = arguments[:1] if arguments and re.search(rf"[{{,]{arguments[0]}[,}}]", known) else []
        known = explain(*words, *part)
        if words[-1] in PASSED_ON:
            known += explain("-m", PASSED_ON[words[-1]])
        for option in (word.partition("=")[0] for word in arguments if word.startswith("--")):
            assert re.search(rf"(?<![\w-]){option}(?![\w-])", known), f"{page.name}: {words} has no {option}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_targets_and_scripts_on_a_page_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for words in map(split, lines(page)):
        if words[:1] == ["make"]:
            assert {word for word in words[1:] if "=" not in word} <= targets, words
        elif words and words[0].startswith("examples/"):
            assert (ROOT / words[0]).is_file(), words
