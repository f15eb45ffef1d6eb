"""What the generation program is to make: known before a model is opened, shared by workers, resumed."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from emu3_megatron.errors import UserError
from emu3_megatron.files import write_json_atomic
from emu3_megatron.training.checkpoint_files import COMMIT, resolve

RECORDS = "results"
"""Folder, beside the results, of a record of each: ``00007.json``."""

NOT_IN_RESULTS = frozenset(
    "prompt prompts samples seed output sheet max_rows worker num_workers resume platform".split()  # noqa: SIM905
)
"""Arguments that a result does not depend on, or that its record states by themselves."""


@dataclass(frozen=True)
class Planned:
    """Results to make, in order."""

    prompts: list[str]
    """Of each result; empty where results follow from files alone."""
    seeds: list[int] = field(default_factory=list)
    """Of each prompt."""
    outputs: list[Path] = field(default_factory=list)
    """Where each result goes; empty where results are lines alone."""
    numbers: list[int] = field(default_factory=list)
    """Of each prompt among those of all workers."""

    def made(self) -> list[Path]:
        """The outputs, in folders that are there."""
        for output in self.outputs:
            output.parent.mkdir(parents=True, exist_ok=True)
        return self.outputs

    def chosen(self, places: Sequence[int]) -> Planned:
        """The results at some places."""
        return Planned(
            prompts=[self.prompts[place] for place in places],
            seeds=[self.seeds[place] for place in places],
            outputs=[self.outputs[place] for place in places],
            numbers=[self.numbers[place] for place in places],
        )

    def groups(self, size: int) -> Iterator[Planned]:
        """The same, up to `size` at a time."""
        for first in range(0, len(self.prompts), size):
            yield self.chosen(range(first, min(first + size, len(self.prompts))))


def plan_results(arguments: argparse.Namespace) -> Planned:
    """What one command is to make.

    Raises:
        UserError: the arguments cannot be used; nothing was written.
    """
    fps = getattr(arguments, "fps", None)
    if fps is not None and not 0 < fps < math.inf:
        raise UserError(f"--fps={fps} must be positive")
    prompts = _prompts(arguments) if hasattr(arguments, "prompts") else []
    count = len(arguments.video) if arguments.task == "continue" else len(prompts)
    planned = Planned(
        prompts,
        [arguments.seed + number for number in range(len(prompts))],
        _outputs(arguments, count),
        list(range(len(prompts))),
    )
    if not hasattr(arguments, "worker"):
        return planned
    if not 0 <= arguments.worker < arguments.num_workers:
        raise UserError(
            f"--worker={arguments.worker} must lie in 0..{arguments.num_workers - 1} (--num-workers less 1)"
        )
    if arguments.resume and planned.outputs == [arguments.output] and arguments.task != "interleave":
        raise UserError(
            f"--resume keeps its records beside the results: name a folder, not {planned.outputs[0]}"
        )
    if arguments.resume and getattr(arguments, "sheet", None) is not None:
        raise UserError("--sheet shows the results of one start, --resume those of several; leave one out")
    return planned.chosen(range(arguments.worker, len(prompts), arguments.num_workers))


class Records:
    """Records of finished results: what is there with the same prompt, seed and settings is not made again.

    Args:
        arguments: Of the program.

    Raises:
        ValueError: there is no such checkpoint.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._folder = Path(arguments.output) / RECORDS
        settings = {name: value for name, value in vars(arguments).items() if name not in NOT_IN_RESULTS}
        checkpoint = Path(arguments.checkpoint)
        if checkpoint.exists() and not (checkpoint / "config.json").is_file():
            # A run that was trained on draws other results.
            settings["committed"] = (resolve(checkpoint) / COMMIT).read_text()
        self._settings: dict[str, Any] = json.loads(json.dumps(settings, default=str))

    def split(self, planned: Planned) -> tuple[Planned, list[dict[str, Any]]]:
        """What is missing, and the lines of what is there."""
        lines = [self._find(planned, place) for place in range(len(planned.prompts))]
        missing = [place for place, line in enumerate(lines) if line is None]
        return planned.chosen(missing), [line for line in lines if line is not None]

    def keep(self, number: int, line: Mapping[str, Any]) -> None:
        """Note a result that is written."""
        path = self._folder / f"{number:05d}.json"
        write_json_atomic(path, {"settings": self._settings, "line": line})

    def _find(self, planned: Planned, place: int) -> dict[str, Any] | None:
        try:
            record = json.loads((self._folder / f"{planned.numbers[place]:05d}.json").read_text("utf-8"))
            line: dict[str, Any] = record["line"]
            same = record["settings"] == self._settings and (
                line["prompt"],
                line["seed"],
                line["output"],
            ) == (
                planned.prompts[place],
                planned.seeds[place],
                str(planned.outputs[place]),
            )
        except (OSError, ValueError, KeyError, TypeError):
            return None  # none, or not one of ours: the result is made again
        return line if same and planned.outputs[place].exists() else None


def _prompts(arguments: argparse.Namespace) -> list[str]:
    """All prompts, each as often as samples are wanted."""
    prompts: list[str] = list(arguments.prompt)
    if arguments.prompts is not None:
        try:
            text = sys.stdin.read() if str(arguments.prompts) == "-" else arguments.prompts.read_text("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{arguments.prompts} is not UTF-8 text: {error}") from error
        prompts += [line for line in text.splitlines() if line.strip()]
    if not prompts:
        raise UserError("no prompt: give --prompt TEXT or --prompts FILE")
    return [prompt for prompt in prompts for _ in range(arguments.samples)]


def _outputs(arguments: argparse.Namespace, count: int) -> list[Path]:
    """Where `count` results go."""
    if not hasattr(arguments, "output"):
        return []
    if arguments.task == "interleave":
        return _folders(arguments.output, count)
    if arguments.sheet is not None:
        _check_file(arguments.sheet)
    return _files(arguments.output, count, ".png" if arguments.task == "image" else ".mp4")


def _files(output: Path, count: int, suffix: str) -> list[Path]:
    """One path per result: the file named, or numbered files in the folder named."""
    if output.suffix and not output.is_dir():
        if output.suffix != suffix:
            raise UserError(
                f"{output}: results are {suffix} files; name one, or a folder (one with a dot in its name "
                "must exist)"
            )
        if count > 1:
            raise UserError(f"{count} results do not fit in one file {output}; name a folder")
        _check_file(output)
        return [output]
    outputs = [output / f"{index:05d}{suffix}" for index in range(count)]
    for path in outputs:
        _check_file(path)
    return outputs


def _folders(output: Path, count: int) -> list[Path]:
    """One folder per result: the one named, or numbered ones in it."""
    folders = [output / f"{index:05d}" for index in range(count)] if count > 1 else [output]
    for folder in folders:
        _check_file(folder / "document.md")
    return folders


def _check_file(path: Path) -> None:
    """Refuse a path that no file can have."""
    if path.is_dir():
        raise UserError(f"{path} is a folder, where a file is to be written; name another")
    for folder in path.parents:
        if folder.exists():
            if not folder.is_dir():
                raise UserError(f"{folder} is a file, where a folder is needed for {path}; name another")
            return
