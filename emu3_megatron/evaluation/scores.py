"""Scores of what was drawn, by models of one's own or from the results that a benchmark's tool wrote."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from emu3_megatron.errors import UserError
from emu3_megatron.evaluation.models import Clip, Detector, crop
from emu3_megatron.evaluation.objects import Found, check, objects_by_class, summary
from emu3_megatron.evaluation.tasks import Task
from emu3_megatron.files import atomic_write, json_lines
from emu3_megatron.media import OpenVideo, decode_image, frame_source
from emu3_megatron.samples import Checker
from emu3_megatron.samples.world import WorldConfig

Scores = dict[str, float]

SCORES = "scores.json"
"""File in an evaluation's folder: ``{"suite", "name", "scores", "counts"}``."""

_CLIP_BATCH = 32

VBENCH_RANGES: Mapping[str, tuple[float, float]] = {
    "subject_consistency": (0.1462, 1.0), "background_consistency": (0.2615, 1.0),
    "temporal_flickering": (0.6293, 1.0), "motion_smoothness": (0.706, 0.9975), "dynamic_degree": (0.0, 1.0),
    "aesthetic_quality": (0.0, 1.0), "imaging_quality": (0.0, 1.0), "object_class": (0.0, 1.0),
    "multiple_objects": (0.0, 1.0), "human_action": (0.0, 1.0), "color": (0.0, 1.0),
    "spatial_relationship": (0.0, 1.0), "scene": (0.0, 0.8222), "appearance_style": (0.0009, 0.2855),
    "temporal_style": (0.0, 0.364), "overall_consistency": (0.0, 0.364),
}  # fmt: skip
"""VBench's dimensions, and the values that become 0 and 1 (scripts/constant.py); seven are its quality."""

_VBENCH_QUALITY = 7
_VBENCH_WEIGHTS = {"dynamic_degree": 0.5}
_VBENCH_QUALITY_WEIGHT, _VBENCH_SEMANTIC_WEIGHT = 4, 1


def files_of(folder: Path, tasks: Sequence[Task]) -> list[tuple[Task, Path]]:
    """Every sample with its task. Raises `UserError` where some are missing."""
    found = [(task, folder / name) for task in tasks for name in task.paths]
    missing = [path for _, path in found if not path.is_file()]
    if missing:
        raise UserError(f"{missing[0]} and {len(missing) - 1} more are missing; let `generate` finish first")
    return found


def clip_score(folder: Path, tasks: Sequence[Task], clip: Clip) -> Scores:
    """CLIP-T: the mean cosine of each picture with its prompt. Raises `UserError` for clips and sheets."""
    if any(task.video or task.grid for task in tasks):
        raise UserError("the CLIP score is of single pictures; clips and sheets have none")
    found = files_of(folder, tasks)
    cosines: list[float] = []
    for first in tqdm(range(0, len(found), _CLIP_BATCH), desc="CLIP score", disable=None):
        part = found[first : first + _CLIP_BATCH]
        pictures = [decode_image(path) for _, path in part]
        cosines += clip.similarity(pictures, [task.prompt for task, _ in part]).tolist()
    return {"clip_t": float(np.mean(cosines))}


def sample_world(folder: Path, tasks: Sequence[Task], world: str) -> Scores:
    """Shares of the attributes that the checker reads from the pixels as the caption states them.

    Keys are ``colour``, ``shape``, ... of stills, ``clip_colour``, ``clip_direction``, ... of clips.
    """
    checker = Checker(WorldConfig.preset(world))
    marks: dict[str, list[bool]] = {}
    for task, path in tqdm(files_of(folder, tasks), desc="checker", disable=None):
        if task.video:
            with OpenVideo(path) as video:
                frames = frame_source().frames(video, range(video.info.frame_count))
            reading = checker.read_clip(frames)
        else:
            reading = checker.read_image(decode_image(path))
        for name, wanted in task.about["attributes"].items():
            if hasattr(reading, name):
                key = f"clip_{name}" if task.video else name
                marks.setdefault(key, []).append(getattr(reading, name) == wanted)
    return {name: float(np.mean(own)) for name, own in marks.items()}


def geneval(folder: Path, tasks: Sequence[Task], detector: Detector, clip: Clip) -> Scores:
    """GenEval's scores by a detector and CLIP; a picture is a line of ``results.jsonl``, in its format."""
    rows = []
    for task, path in tqdm(files_of(folder, tasks), desc="objects", disable=None):
        picture = decode_image(path)
        objects = objects_by_class(detector.find(picture), counting=task.about["tag"] == "counting")

        def colours(own: Sequence[Found], name: str, picture: Any = picture) -> list[str]:
            return clip.colours([crop(picture, each) for each in own], name)

        correct, reason = check(task.about, objects, colours)
        rows.append({
            "filename": str(path), "tag": task.about["tag"], "prompt": task.prompt, "correct": correct,
            "reason": reason, "metadata": json.dumps(task.about),
            "details": json.dumps(
                {name: [[*each.box, each.score] for each in own] for name, own in objects.items()}
            ),
        })  # fmt: skip
    with atomic_write(folder / "results.jsonl") as stream:
        stream.writelines((json.dumps(row, ensure_ascii=False) + "\n").encode() for row in rows)
    return summary(rows)


def read_geneval(paths: Sequence[Path]) -> Scores:
    """Scores from GenEval's ``results.jsonl``. Raises `UserError` for another kind of file."""
    rows = [row for path in paths for row in json_lines(path)]
    if not rows or not all({"tag", "correct"} <= row.keys() for row in rows):
        raise UserError(f"{paths[0]}: not GenEval's results, which have tag and correct in every line")
    return summary(rows)


def read_dpg(paths: Sequence[Path]) -> Scores:
    """Scores from DPG-Bench's ``dpg-bench_*_results.txt``, percent: ``overall`` and the first level.

    Raises `UserError` for a file without them.
    """
    (path, *more) = paths
    text = path.read_text("utf-8")
    overall = re.search(r"^DPG-Bench score: ([0-9.]+)", text, re.MULTILINE)
    if more or overall is None:
        raise UserError(f"{path}: give one dpg-bench_*_results.txt that ends in `DPG-Bench score`")
    first = text.partition("L1 category scores:")[2].partition("L2 category scores:")[0]
    categories = re.findall(r"^\t(.+): ([0-9.]+)", first, re.MULTILINE)
    return {"overall": float(overall[1]), **{name: float(value) for name, value in categories}}


def read_vbench(paths: Sequence[Path]) -> Scores:
    """Scores from VBench's ``*_eval_results.json``, percent; with all dimensions also its three totals.

    Each dimension is ``[score, clips]``. Raises `UserError` for another kind of file.
    """
    raw: Scores = {}
    for path in paths:
        try:
            values = json.loads(path.read_text("utf-8"))
            raw |= {name: float(value[0]) for name, value in values.items() if name in VBENCH_RANGES}
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise UserError(f"{path}: not VBench's *_eval_results.json ({error})") from error
    if not raw:
        raise UserError(f"{paths[0]}: none of VBench's dimensions in it")
    scores = {name: 100 * value for name, value in raw.items()}
    if len(raw) == len(VBENCH_RANGES):
        names = list(VBENCH_RANGES)
        quality, semantic = (
            _weighted(raw, part) for part in (names[:_VBENCH_QUALITY], names[_VBENCH_QUALITY:])
        )
        weights = _VBENCH_QUALITY_WEIGHT, _VBENCH_SEMANTIC_WEIGHT
        total = (quality * weights[0] + semantic * weights[1]) / sum(weights)
        scores |= {"quality": 100 * quality, "semantic": 100 * semantic, "total": 100 * total}
    return scores


def _weighted(raw: Mapping[str, float], names: Sequence[str]) -> float:
    """Mean of normalized dimensions by VBench's weights."""
    weights = [_VBENCH_WEIGHTS.get(name, 1.0) for name in names]
    lows, highs = zip(*(VBENCH_RANGES[name] for name in names), strict=True)
    normal = [(raw[name] - low) / (high - low) for name, low, high in zip(names, lows, highs, strict=True)]
    return float(np.average(normal, weights=weights))


def write_scores(folder: Path, suite: str, name: str, scores: Scores, tasks: Sequence[Task]) -> None:
    """Leave the scores in the evaluation's folder, those of earlier calls kept."""
    path = folder / SCORES
    before = json.loads(path.read_text("utf-8"))["scores"] if path.is_file() else {}
    record = {
        "suite": suite, "name": name, "scores": {**before, **scores}, "prompts": len(tasks),
        "samples": sum(task.samples for task in tasks),
        "shown": [asdict(task) for task in tasks[:12]],
    }  # fmt: skip
    with atomic_write(path) as stream:
        stream.write((json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode())
