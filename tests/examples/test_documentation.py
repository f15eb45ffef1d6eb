"""The documentation names what exists: modules, files, links, messages, options, commands."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from urllib.parse import unquote

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
TEXTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES]
LINK = re.compile(r"(?<!`)\[[^\]\n]*\]\(([^)\s]+)\)")
COMMANDS = re.compile(r"^```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def public_modules() -> list[str]:
    """Dotted names of the package's modules without a leading underscore, packages left out."""
    files = [path.relative_to(ROOT).with_suffix("") for path in (ROOT / "emu3_megatron").rglob("*.py")]
    return sorted(
        ".".join(path.parts) for path in files if not any(part.startswith("_") for part in path.parts)
    )


def test_every_public_module_is_in_the_reference() -> None:
    text = "\n".join(page.read_text() for page in PAGES)
    named = set(re.findall(r"^::: (\S+)$", text, re.MULTILINE))
    # By itself, or by what is taken from it one by one.
    shown = named | {entry.rpartition(".")[0] for entry in named}
    missing = [f"::: {module}" for module in public_modules() if module not in shown]
    assert not missing, "add to docs/reference:\n" + "\n\n".join(missing)


def test_the_reference_names_only_what_exists() -> None:
    known = set(public_modules())
    for page in PAGES:
        for entry in re.findall(r"^::: (emu3_megatron\S*)$", page.read_text(), re.MULTILINE):
            path = ROOT / entry.replace(".", "/")
            assert entry in known or path.is_dir() or entry.rpartition(".")[0] in known, (page, entry)


def headings(page: Path) -> set[str]:
    """Anchors of a page's own headings."""
    found = re.findall(
        r"^#+ (.+)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE
    )
    plain = [re.sub(r"[^\w\s-]", "", heading.replace("`", "")).strip().lower() for heading in found]
    return {re.sub(r"[\s]+", "-", heading) for heading in plain}


@pytest.mark.parametrize("text", TEXTS, ids=name)
def test_links_lead_somewhere(text: Path) -> None:
    content = re.sub(r"```.*?```", "", text.read_text(), flags=re.DOTALL)
    for link in LINK.findall(content):
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        file, _, anchor = unquote(link).partition("#")
        target = (text.parent / file).resolve() if file else text
        assert target.exists(), f"{name(text)}: {link}"
        if anchor and target.suffix == ".md":
            assert anchor in headings(target), f"{name(text)}: {link} is no heading there"


def test_every_page_is_in_the_navigation() -> None:
    def leaves(entry: object) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        values = entry.values() if isinstance(entry, dict) else entry
        return [leaf for value in values for leaf in leaves(value)]  # type: ignore[attr-defined]

    navigation = leaves(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert sorted(navigation) == sorted(str(page.relative_to(DOCS)) for page in PAGES)


@pytest.mark.parametrize("text", TEXTS, ids=name)
def test_files_that_are_named_exist(text: Path) -> None:
    content = text.read_text()
    pattern = r"(?<![\w/.-])((?:tools|examples|benchmarks|tests|csrc|docker)/[\w./-]+\.\w+)"
    for path in set(re.findall(pattern, content)):
        assert (ROOT / path).exists(), f"{name(text)}: {path}"
    for path in set(re.findall(r'^--8<-- "([^":]+)', content, re.MULTILINE)):
        assert (ROOT / path).is_file(), f"{name(text)}: {path}"
    for module in set(re.findall(r"-m ((?:emu3_megatron|tests)(?:\.\w+)*)", content)):
        path = ROOT / module.replace(".", "/")
        assert (path / "__main__.py").is_file() or path.with_suffix(".py").is_file(), (
            f"{name(text)}: {module}"
        )


def sources() -> str:
    """All that can write a message, with string literals that stand on several lines joined."""
    files = [*(ROOT / "emu3_megatron").rglob("*.py"), *(ROOT / "examples/slurm").glob("*.sh")]
    text = "\n".join(path.read_text() for path in files)
    return re.sub(r'"\s*\n\s*f?"', "", text)


def test_messages_of_the_troubleshooting_page_are_messages_of_the_code() -> None:
    page = (DOCS / "troubleshooting.md").read_text()
    first_columns = [row.split("|")[1] for row in page.splitlines() if row.startswith("| ")]
    quoted = [
        message.strip("` ") for cell in first_columns for message in re.findall(r"``.+?``|`[^`]+`", cell)
    ]
    foreign = ("CUDA out of memory", "ambiguous option", "BeginTime")
    messages = [message for message in quoted if " " in message and not message.startswith(foreign)]
    assert len(messages) >= 12
    code = sources()
    for message in messages:
        assert message in code, message


@pytest.mark.parametrize("page", ["start.md", "slurm.md"])
def test_commands_are_whole_and_their_options_exist(page: str) -> None:
    """Shell that parses; every configuration, tool and target that it names is there."""
    blocks = COMMANDS.findall((DOCS / page).read_text())
    assert blocks
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for block in blocks:
        assert subprocess.run(["bash", "-n"], input=block, text=True, check=False).returncode == 0, block
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True) if line.count("'") % 2 == 0 else line.split()
            if words[:1] == ["make"]:
                assert set(words[1:]) <= targets, line
