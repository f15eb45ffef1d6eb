"""The proof of exact resume: runs that are killed -9 at random steps end as undisturbed ones do.

``make prove NAME=resume``: for each of some layouts, a run of 20 steps is killed at 5 random steps and begun
again: its curve is bit-equal to the undisturbed one of that layout. Then runs whose layout changes at every
start, over one, two and four processes: within 1e-4 (relative) of an undisturbed single process. A checkpoint
is saved every 2 steps, so most kills lose a step that is taken again. Exit code 0 only if all hold.

``ARGS="--folder FOLDER --minutes 5"`` runs it in pieces: finished runs are not run again, and while runs are
left the exit code is 3.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from emu3_megatron.parallel import platform

platform.install("cpu")

from tests.training import forked, layouts, runs

SAVE = ["--checkpoint.interval", "2"]
SAME = ("one process", "dp2", "tp2-sp", "pp2-interleaved", "cp2", "tp2-dp2-sp")
"""Layouts that are kept over the kills."""
CHANGING: list[list[tuple[str, bool]]] = [
    [("dp2", True), ("tp2-sp", True), ("pp2", False), ("cp2", True), ("one process", True), ("tp2", False)],
    [
        ("tp2-pp2-sp", True),
        ("cp2-dp2", True),
        ("pp2-interleaved", True),
        ("tp4", False),
        ("pp2-cp2", True),
        ("dp4", True),
    ],
]
"""Layouts of one start after another, and whether their optimizer is distributed."""


def options(name: str, distributed: bool = True) -> tuple[list[str], int]:
    """Command-line arguments of a layout, and its number of processes."""
    processes = 1 if name == "one process" else 2 if name in layouts.TWO else 4
    layout: dict[str, object] = {**layouts.TWO, **layouts.FOUR}.get(name, {})
    return layouts.options(layout, distributed_optimizer=distributed), processes


def disturbed(config: Path, run: Path, starts: list[tuple[str, bool]], seed: int) -> list[int]:
    """Train in `run`, killed at as many random steps as there are starts but one.

    Args:
        config: The run's configuration.
        run: Its folder; where it holds a finished run, nothing is done.
        starts: Layouts of the starts.
        seed: Of the steps, with the name of the run.

    Returns:
        The steps.

    Raises:
        RuntimeError: the run ended before a kill, or failed.
    """
    steps = sorted(random.Random(f"{seed}/{run.name}").sample(range(2, runs.STEPS), len(starts) - 1))
    if finished(run):
        return steps
    shutil.rmtree(run, ignore_errors=True)
    for number, start in enumerate(starts):
        arguments, processes = options(*start)
        ranks = forked.start(
            ["--config", str(config), "--run", str(run), *SAVE, *arguments], processes=processes
        )
        if number < len(steps):
            if not forked.wait_for_step(run, steps[number], ranks):
                forked.kill(ranks)
                raise RuntimeError(f"the run ended before the kill at step {steps[number]}")
            forked.kill(ranks)
        elif not forked.finish(ranks):
            raise RuntimeError("the last start did not end well")
    return steps


def finished(run: Path) -> bool:
    """Whether a run came to its end."""
    return (run / "metrics.jsonl").exists() and len(runs.metrics(run)) == runs.STEPS


def verdict(run: Path, reference: Path, tolerance: float) -> tuple[bool, float]:
    """Whether a run has every step once and agrees with another, and their largest difference."""
    lines, expected = runs.metrics(run), runs.metrics(reference)
    whole = [line["step"] for line in lines] == list(range(1, runs.STEPS + 1))
    windows = runs.largest_difference(lines, expected, "windows") == 0
    worst = max(runs.largest_difference(lines, expected, key) for key in ("loss", "grad_norm"))
    return whole and windows and worst <= tolerance, worst


class Proof:
    """All runs, in one folder.

    Args:
        folder: Where they are.
        kills: Of each run that keeps its layout.
        seed: Of the steps.
        minutes: Time after which no further run is begun, or None.
    """

    def __init__(self, folder: Path, kills: int, seed: int, minutes: float | None) -> None:
        self._folder, self._kills, self._seed = folder, kills, seed
        self._deadline = None if minutes is None else time.monotonic() + 60 * minutes
        self._config = folder / "config.yaml"

    def prepare(self) -> None:
        """Write the data."""
        from emu3_megatron.samples.tiny import PARTS, prepare

        for name in PARTS:
            if not (self._folder / "data" / name / "manifest.json").exists():
                prepare(self._folder / "data" / name)
        runs.write_configuration(self._folder, self._folder / "data")

    def same_layout(self, name: str) -> bool:
        """A layout, killed and compared with itself."""
        reference, run = self._folder / f"{name}-undisturbed", self._folder / name
        arguments, processes = options(name)
        if not finished(reference):
            self._check_time()
            shutil.rmtree(reference, ignore_errors=True)
            given = ["--config", str(self._config), "--run", str(reference), *arguments]
            if not forked.finish(forked.start(given, processes)):
                raise RuntimeError(f"the undisturbed run of {name} failed")
        return self._disturb(run, [(name, True)] * (self._kills + 1), reference, 0.0)

    def other_layouts(self, starts: list[tuple[str, bool]], number: int) -> bool:
        """A run whose layout changes at every start, compared with a single process."""
        run, reference = self._folder / f"changing-{number}", self._folder / "one process-undisturbed"
        return self._disturb(run, starts, reference, layouts.ALL_STEPS)

    def _disturb(self, run: Path, starts: list[tuple[str, bool]], reference: Path, tolerance: float) -> bool:
        if not finished(run):
            self._check_time()
        steps = disturbed(self._config, run, starts, self._seed)
        holds, worst = verdict(run, reference, tolerance)
        names = " > ".join(dict.fromkeys(name for name, _ in starts))
        mark = "pass" if holds else "FAIL"
        print(f"{mark} {names}, killed at steps {steps}: largest difference {worst:.1e}", flush=True)
        return holds

    def _check_time(self) -> None:
        if self._deadline is not None and time.monotonic() > self._deadline:
            raise Unfinished


class Unfinished(Exception):
    """The time is up."""


def main() -> int:
    """Run the drill and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kills", type=int, default=5, help="of each run that keeps its layout")
    parser.add_argument("--seed", type=int, default=0, help="of the steps")
    parser.add_argument("--folder", type=Path, help="keep everything here, to go on later")
    parser.add_argument("--minutes", type=float, help="begin no run after as many")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        proof = Proof(folder, arguments.kills, arguments.seed, arguments.minutes)
        proof.prepare()
        try:
            good = [proof.same_layout(name) for name in SAME]
            good += [proof.other_layouts(starts, number) for number, starts in enumerate(CHANGING)]
        except Unfinished:
            print("runs are left; start this again with the same folder")
            return 3
    print(f"{sum(good)} of {len(good)} hold")
    return int(not all(good))


if __name__ == "__main__":
    sys.exit(main())
