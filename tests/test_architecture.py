"""Imports point one way, packages form no cycle, files stay short.

The order and its reasons are in docs/development/architecture.md.
"""

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "emu3_megatron"

ORDER = (
    "errors",
    "files",
    "settings",
    "processes",
    "vocabulary",
    "_kernels",
    "grammar",
    "text",
    "muon",
    "vision",
    "media",
    "curation",
    "data",
    "tokenization",
    "parallel",
    "model",
    "training",
    "posttraining",
    "conversion",
    "inference",
    "samples",
    "evaluation",
)
"""Every part imports only what stands before it."""

ALLOWED_IMPORTS: Mapping[tuple[str, str], str] = {}
"""Arrows against the order: ``(file, imported part)`` and the reason."""

LONGEST_FILE = 500
ALLOWED_LONG_FILES: Mapping[str, str] = {}
"""Longer files and the reason."""

SOURCES = sorted((ROOT / PACKAGE).rglob("*.py"))


def part_of(path: Path) -> str:
    """The first name below the package: a folder, or a module beside the folders."""
    return path.relative_to(ROOT / PACKAGE).parts[0].removesuffix(".py")


def imported_names(source: str, package: tuple[str, ...]) -> Iterator[tuple[int, str]]:
    """Line and dotted name of every import, those inside functions and relative ones included.

    Args:
        source: text of a module.
        package: the package that holds the module, for relative imports.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else ()
            stem = ".".join([*base, *([node.module] if node.module else [])])
            # ``from emu3_megatron import data`` names the part only in the alias.
            yield from ((node.lineno, f"{stem}.{alias.name}") for alias in node.names)


def arrows(paths: list[Path]) -> Iterator[tuple[str, int, str, str]]:
    """File, line, importing part and imported part of every import from another part."""
    for path in paths:
        inside = path.relative_to(ROOT).parent.parts
        for line, name in imported_names(path.read_text(encoding="utf-8"), inside):
            names = name.split(".")
            if names[0] == PACKAGE and len(names) > 1 and names[1] != part_of(path):
                yield str(path.relative_to(ROOT)), line, part_of(path), names[1]


ARROWS = list(arrows(SOURCES))


def test_every_part_has_a_place_in_the_order() -> None:
    parts = {part_of(path) for path in SOURCES} - {"__init__"}
    assert parts <= set(ORDER), f"give {sorted(parts - set(ORDER))} a place in ORDER and in architecture.md"
    assert {imported for *_, imported in ARROWS} <= set(ORDER)


def test_imports_point_down_the_order() -> None:
    place = {part: number for number, part in enumerate(ORDER)}
    wrong = [
        f"{file}:{line}: {part} imports {imported}, which stands after it"
        for file, line, part, imported in ARROWS
        if place[imported] > place[part] and (file, imported) not in ALLOWED_IMPORTS
    ]
    assert not wrong, "\n".join(wrong)


def test_parts_form_no_cycle() -> None:
    """Holds without exceptions: an import that is allowed against the order must not close a circle."""
    needed: dict[str, set[str]] = {part: set() for part in ORDER}
    for _, _, part, imported in ARROWS:
        needed[part].add(imported)
    while free := [part for part, imports in needed.items() if not imports & needed.keys()]:
        for part in free:
            del needed[part]
    assert not needed, f"a cycle among {sorted(needed)}"


def test_exceptions_are_still_needed() -> None:
    present = {(file, imported) for file, _, _, imported in ARROWS}
    assert set(ALLOWED_IMPORTS) <= present
    assert all((ROOT / file).is_file() for file in ALLOWED_LONG_FILES)


def test_the_package_knows_neither_its_tools_nor_its_tests() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in SOURCES
        for line, name in imported_names(
            path.read_text(encoding="utf-8"), path.relative_to(ROOT).parent.parts
        )
        if name.split(".")[0] in ("tests", "tools", "benchmarks", "examples")
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("folder", [PACKAGE, "csrc", "tools", "tests", "benchmarks"])
def test_files_are_short_enough_to_read(folder: str) -> None:
    files = [path for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".cpp", ".hpp")]
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in files
    }
    long = [
        f"{name}: {lines} lines"
        for name, lines in sorted(lengths.items())
        if lines > LONGEST_FILE and name not in ALLOWED_LONG_FILES
    ]
    assert not long, f"more than {LONGEST_FILE} lines: " + "; ".join(long)


def test_imports_are_found_wherever_they_stand() -> None:
    source = (
        "import emu3_megatron.data.plan\nfrom emu3_megatron import model\n"
        "def f():\n    from ..text import chat\n    from . import rules\n"
    )
    found = [name for _, name in imported_names(source, (PACKAGE, "grammar"))]
    assert sorted(found) == [
        "emu3_megatron.data.plan",
        "emu3_megatron.grammar.rules",
        "emu3_megatron.model",
        "emu3_megatron.text.chat",
    ]
