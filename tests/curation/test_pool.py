"""Worker processes: what ends or stops one, and signs of life from long steps."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from emu3_megatron.curation import progress
from emu3_megatron.curation.clips import ClipTask, ClipWriter
from emu3_megatron.curation.config import SceneConfig
from emu3_megatron.curation.pool import run_tasks
from emu3_megatron.curation.progress import listening, lively
from emu3_megatron.curation.scenes import SceneStage
from emu3_megatron.curation.units import Unit
from tests.curation.corpus import RATE, pan
from tests.media.clips import encode


class Troublemaker:
    """A handler that ends or stops its process at the step called so."""

    def __call__(self, task: str, announce: Callable[..., object], failures: dict[Any, Any]) -> str:
        for step in task.split():
            key = ("stage", step)
            announce(key)
            if key in failures:
                return f"{task}: {failures[key]['error']}"
            if step == "segfault":
                os.kill(os.getpid(), signal.SIGSEGV)
            if step == "hang":
                time.sleep(60)
            announce(None)
        return f"{task}: done"


@pytest.mark.parametrize("processes", [1, 2])
def test_a_file_that_ends_or_stops_its_process_is_set_aside(processes: int) -> None:
    tasks = ["a b", "c segfault d", "e", "f hang", "g h"]
    results = run_tasks(tasks, partial(Troublemaker), processes=processes, timeout=3.0)
    assert {task: results[task] for task in ("a b", "e", "g h")} == {
        t: f"{t}: done" for t in ("a b", "e", "g h")
    }
    assert "SIGSEGV" in results["c segfault d"]
    assert "no progress for 3 s" in results["f hang"]


class Slow:
    """A handler whose one step takes longer than the limit and gives signs of life, or stalls once."""

    def __call__(self, task: str, announce: Callable[..., object], failures: dict[Any, Any]) -> str:
        key = ("stage", task)
        announce(key)
        if key in failures:
            return "set aside"
        stalled = Path(task)
        if task != "long" and not stalled.exists():
            stalled.touch()
            time.sleep(60)
        with listening(lambda: announce(key)):
            for _ in lively(range(14 if task == "long" else 1)):
                time.sleep(1.0)
        return "done"


def test_a_long_step_that_goes_on_is_not_given_up_and_a_stall_is_tried_again(tmp_path: Path) -> None:
    tasks = ["long", str(tmp_path / "stalled")]
    assert run_tasks(tasks, Slow, processes=2, timeout=6.0) == dict.fromkeys(tasks, "done")


def test_stages_give_signs_of_life(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One for each frame that is decoded to find the scenes or to write a clip."""
    monkeypatch.setattr(progress, "SIGN_SECONDS", 0.0)
    path = encode(
        tmp_path / "cuts.mp4", np.concatenate([pan("astronaut.png", 24), pan("coffee.png", 24)]), rate=RATE
    )
    unit = Unit(id="cuts", kind="video", record={"video": "cuts.mp4"}, path=path)
    signs: list[Any] = []
    with listening(lambda: signs.append(None)):
        SceneStage(SceneConfig()).score(unit)
        assert len(signs) == 48
        signs.clear()
        SceneStage(SceneConfig(detector="transnetv2")).score(unit)
        assert len(signs) > 48
    keys: list[Any] = []
    ClipWriter()(ClipTask("cuts@0-20", path, (0, 20), tmp_path / "clip.mp4"), keys.append, {})
    assert keys == [*[("clip", "cuts@0-20")] * 21, None]
