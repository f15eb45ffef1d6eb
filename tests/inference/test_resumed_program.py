"""The generation program writes what is finished, goes on after a kill, and shares its prompts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from emu3_megatron import media
from emu3_megatron.errors import UserError
from emu3_megatron.inference.command_line import build_parser, generate
from emu3_megatron.inference.planned import RECORDS
from emu3_megatron.inference.tasks import Generator
from tests.inference.test_command_line import SIZE, _world, folder, run

__all__ = ["_world", "folder"]

PROMPTS = ["a red circle", "two blue squares", "a red square", "two circles", "a blue circle"]
TWO_AT_A_TIME = ["--max-rows", "4"]
"""A guided picture takes two rows."""


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Sequence[str]]:
    """Prompts of every call of the engine."""
    calls: list[Sequence[str]] = []
    original = Generator.text_to_image

    def counting(self: Generator, prompts: Sequence[str], **settings: Any) -> Any:
        calls.append(list(prompts))
        return original(self, prompts, **settings)

    monkeypatch.setattr(Generator, "text_to_image", counting)
    return calls


def command(tmp_path: Path, output: str, *more: object, prompts: Sequence[str] = PROMPTS) -> list[object]:
    (tmp_path / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in prompts))
    fixed = ["--prompts", tmp_path / "prompts.txt", *SIZE, *TWO_AT_A_TIME, "--seed", 7]
    return ["image", *fixed, "--output", tmp_path / output, *more]


def pictures(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.png")}


def test_what_is_finished_is_written_and_kept(
    capsys, folder: Path, tmp_path: Path, monkeypatch, drawn
) -> None:
    """A kill loses what was drawn together at that moment, and nothing else."""
    undisturbed = run(capsys, folder, *command(tmp_path, "whole"))
    drawn.clear()
    written: list[Path] = []
    original = media.write_png

    def killed(path: Path, pixels: Any) -> None:
        if len(written) == 3:
            raise KeyboardInterrupt
        original(path, pixels)
        written.append(path)

    monkeypatch.setattr(media, "write_png", killed)
    with pytest.raises(KeyboardInterrupt):
        run(capsys, folder, *command(tmp_path, "killed", "--resume"))
    assert len(capsys.readouterr().out.splitlines()) == len(pictures(tmp_path / "killed")) == 3
    monkeypatch.setattr(media, "write_png", original)
    drawn.clear()
    lines = run(capsys, folder, *command(tmp_path, "killed", "--resume"))
    assert drawn == [PROMPTS[3:]]
    assert pictures(tmp_path / "killed") == pictures(tmp_path / "whole")
    assert [(line["prompt"], line["seed"]) for line in lines] == [
        (line["prompt"], line["seed"]) for line in undisturbed
    ]
    drawn.clear()
    assert run(capsys, folder, *command(tmp_path, "killed", "--resume")) == lines
    assert not drawn


def test_only_results_of_the_same_prompt_seed_and_settings_are_kept(
    capsys, folder: Path, tmp_path: Path, drawn
) -> None:
    run(capsys, folder, *command(tmp_path, "out", "--resume"))
    drawn.clear()
    changed = [PROMPTS[0], "another", *PROMPTS[2:]]
    run(capsys, folder, *command(tmp_path, "out", "--resume", prompts=changed))
    assert drawn == [["another"]]
    (tmp_path / "out" / "00004.png").unlink()
    (tmp_path / "out" / RECORDS / "00000.json").write_text("{")
    drawn.clear()
    run(capsys, folder, *command(tmp_path, "out", "--resume", "--max-rows", 128, prompts=changed))
    assert drawn == [[PROMPTS[0], PROMPTS[4]]]
    drawn.clear()
    run(capsys, folder, *command(tmp_path, "out", "--resume", "--temperature", 2, prompts=changed))
    assert sum(map(len, drawn)) == len(PROMPTS)
    drawn.clear()
    commit = folder / "run" / "checkpoints" / "step-00000003" / "COMMIT"
    before = commit.read_text()
    commit.write_text(json.dumps({**json.loads(before), "step": 4}))  # the run was trained on
    try:
        run(capsys, folder, *command(tmp_path, "out", "--resume", "--temperature", 2, prompts=changed))
    finally:
        commit.write_text(before)
    assert sum(map(len, drawn)) == len(PROMPTS)


@pytest.mark.parametrize("workers", [2, 3, 8])
def test_workers_make_what_one_makes(capsys, folder: Path, tmp_path: Path, workers: int) -> None:
    """In whatever order and number they come; more workers than prompts are no mistake."""
    run(capsys, folder, *command(tmp_path, "one"))
    for worker in reversed(range(workers)):
        share = ["--resume", "--worker", worker, "--num-workers", workers]
        lines = run(capsys, folder, *command(tmp_path, "many", *share))
        assert [line["prompt"] for line in lines] == PROMPTS[worker::workers]
    assert pictures(tmp_path / "many") == pictures(tmp_path / "one")
    assert len(run(capsys, folder, *command(tmp_path, "many", "--resume"))) == len(PROMPTS)


def test_documents_go_on_too(capsys, folder: Path, tmp_path: Path, monkeypatch) -> None:
    asked = ["interleave", "--prompt", "a red circle", "--samples", 3, "--max-new-tokens", 20]
    first = run(capsys, folder, *asked, "--output", tmp_path / "out", "--resume")
    monkeypatch.setattr("emu3_megatron.inference.command_line.open_generator", None)
    assert run(capsys, folder, *asked, "--output", tmp_path / "out", "--resume") == first


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "a.png", "--resume"], "name a folder, not a.png"),
        (["--output", "a", "--resume", "--sheet", "b.png"], "leave one out"),
        (["--output", "a", "--worker", "2", "--num-workers", "2"], "--worker=2 must lie in 0..1"),
    ],
)
def test_what_cannot_be_resumed_or_shared_is_one_line(
    tmp_path: Path, monkeypatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        generate(
            build_parser().parse_args(["image", "--checkpoint", "no model", "--prompt", "a", *arguments])
        )
    assert not list(tmp_path.iterdir())
