"""What a benchmark asks for and where it expects the results: prompts in, named files out."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from emu3_megatron.errors import UserError
from emu3_megatron.files import atomic_write, json_lines

TASKS = "tasks.jsonl"
"""File in an evaluation's folder: what was generated, one `Task` a line."""

LONGEST_NAME = 255
"""Bytes of a file name."""


@dataclass(frozen=True)
class Task:
    """One prompt and the files of its samples."""

    prompt: str
    paths: tuple[str, ...]
    """Relative to the evaluation's folder: one per sample, or one sheet of all of them (`grid`)."""
    samples: int
    grid: bool = False
    """Whether the samples of the prompt stand in one picture, two a row."""
    video: bool = False
    about: Mapping[str, Any] = field(default_factory=dict)
    """What else the benchmark says of the prompt."""


Reader = Callable[[Path, int | None], list[Task]]
"""From a benchmark's own prompt file or folder and a number of samples (None: its own) to tasks."""


def read_prompts(path: Path, samples: int | None) -> list[Task]:
    """Any prompts: a text file with one a line, or JSON Lines with ``prompt`` (or ``caption``).

    Samples are ``images/00000-0.png``: the number of the prompt, that of the sample.
    """
    count = samples or 1
    return [
        Task(str(row["prompt"]), _numbered("images", index, count, ".png"), count, about=row)
        for index, row in enumerate(_rows(path))
    ]


def read_sample_world(path: Path, samples: int | None) -> list[Task]:
    """A manifest of the sample world: ``caption``, ``attributes``, and ``image`` or ``video``."""
    count = samples or 1
    tasks = []
    for index, row in enumerate(_rows(path)):
        if not isinstance(row.get("attributes"), dict):
            raise UserError(f"{path}, record {index + 1}: no attributes; give a manifest of the sample world")
        video = "video" in row
        paths = _numbered("clips" if video else "images", index, count, ".mp4" if video else ".png")
        tasks.append(Task(str(row["prompt"]), paths, count, video=video, about=row))
    return tasks


def read_geneval(path: Path, samples: int | None) -> list[Task]:
    """GenEval's ``evaluation_metadata.jsonl``: ``00000/samples/0000.png``, four per prompt.

    Format: github.com/djghosh13/geneval, README and evaluation/evaluate_images.py; its evaluator also wants
    each line as ``00000/metadata.jsonl``.
    """
    count = samples or 4
    tasks = []
    for index, row in enumerate(_rows(path)):
        if not {"tag", "include"} <= row.keys():
            raise UserError(f"{path}, record {index + 1}: no tag or include; give evaluation_metadata.jsonl")
        paths = tuple(f"{index:05d}/samples/{number:04d}.png" for number in range(count))
        tasks.append(Task(str(row["prompt"]), paths, count, about=row))
    return tasks


def read_dpg(path: Path, samples: int | None) -> list[Task]:
    """DPG-Bench's folder of ``NAME.txt``: one sheet ``images/NAME.png`` of two by two samples.

    Format: github.com/TencentQQGYLab/ELLA, dpg_bench/compute_dpg_bench.py (``--pic-num 4``,
    ``--resolution``: the side of one sample).
    """
    count = samples or 4
    if count not in (1, 4):
        raise UserError(f"--samples={count}: DPG-Bench reads 1 or 4 samples of a sheet")
    files = sorted(path.glob("*.txt")) if path.is_dir() else []
    if not files:
        raise UserError(f"{path} is no folder with DPG-Bench's prompts, NAME.txt")
    return [
        Task(file.read_text("utf-8").strip(), (f"images/{file.stem}.png",), count, grid=True)
        for file in files
    ]


def read_vbench(path: Path, samples: int | None) -> list[Task]:
    """VBench's ``VBench_full_info.json``: ``videos/PROMPT-0.mp4``, five each, or 25 (temporal flickering).

    Format: github.com/Vchitect/VBench, prompts/README.md. Of the 25 its filter drops static ones.
    """
    try:
        entries = json.loads(path.read_text("utf-8"))
        wanted = {str(entry["prompt_en"]): set(entry["dimension"]) for entry in entries}
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is not VBench_full_info.json ({error})") from error
    if not wanted:
        raise UserError(f"{path} holds no prompts")
    for entry in entries:
        wanted[str(entry["prompt_en"])] |= set(entry["dimension"])
    tasks = []
    for prompt, dimensions in wanted.items():
        count = samples or (25 if "temporal_flickering" in dimensions else 5)
        names = tuple(f"{prompt}-{number}.mp4" for number in range(count))
        if "/" in prompt or len(names[-1].encode()) > LONGEST_NAME:
            raise UserError(f"prompt {prompt[:60]!r} cannot be a file name, which VBench's layout needs")
        paths = tuple(f"videos/{name}" for name in names)
        tasks.append(Task(prompt, paths, count, video=True, about={"dimension": sorted(dimensions)}))
    return tasks


READERS: Mapping[str, Reader] = {
    "prompts": read_prompts,
    "sample-world": read_sample_world,
    "geneval": read_geneval,
    "dpg": read_dpg,
    "vbench": read_vbench,
}
"""Suites by name."""


def write_tasks(folder: Path, tasks: Sequence[Task]) -> None:
    """Leave the tasks in the evaluation's folder."""
    with atomic_write(folder / TASKS) as stream:
        for task in tasks:
            stream.write((json.dumps(asdict(task), ensure_ascii=False) + "\n").encode())


def load_tasks(folder: Path) -> list[Task]:
    """The tasks that `write_tasks` left. Raises `UserError` where there are none."""
    path = folder / TASKS
    if not path.is_file():
        raise UserError(f"{path} is missing; run `tools/evaluate.py generate` into {folder} first")
    return [Task(**{**row, "paths": tuple(row["paths"])}) for row in json_lines(path)]


def _numbered(folder: str, index: int, count: int, suffix: str) -> tuple[str, ...]:
    return tuple(f"{folder}/{index:05d}-{number}{suffix}" for number in range(count))


def _rows(path: Path) -> list[dict[str, Any]]:
    """Records of a prompt file, each with ``prompt``. Raises `UserError` where one has none."""
    if path.suffix == ".txt":
        rows: list[dict[str, Any]] = [
            {"prompt": line.strip()} for line in path.read_text("utf-8").splitlines() if line.strip()
        ]
    else:
        rows = [{**row, "prompt": row.get("prompt", row.get("caption"))} for row in json_lines(path)]
    if not rows:
        raise UserError(f"{path} holds no prompts")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row["prompt"], str) or not row["prompt"].strip():
            raise UserError(f"{path}, record {number}: no prompt; each needs a text `prompt` or `caption`")
    return rows
