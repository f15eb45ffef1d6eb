"""The proof of exact resume: runs that are killed -9 at random steps end as undisturbed ones do.

``make prove NAME=resume``: for each of some layouts, a run of 20 steps is killed at 5 random steps and begun
again: its curve is bit-equal to the undisturbed one of that layout. Then runs whose layout changes at every
start, over one, two and four processes: within 1e-4 (relative) of an undisturbed single process. A checkpoint
is saved every 2 steps, so most kills lose a step that is taken again. Exit code 0 only if all hold.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from emu3_megatron.parallel import platform  # noqa: E402

platform.install("cpu")

from tests.training import forked, layouts, runs  # noqa: E402

SAVE = ["--checkpoint.interval", "2"]
SAME: dict[str, tuple[int, dict[str, object]]] = {
    "one process": (1, {}),
    "dp2": (2, layouts.TWO["dp2"]),
    "tp2-sp": (2, layouts.TWO["tp2-sp"]),
    "pp2-interleaved": (2, layouts.TWO["pp2-interleaved"]),
    "cp2": (2, layouts.TWO["cp2"]),
    "tp2-dp2-sp": (4, layouts.FOUR["tp2-dp2-sp"]),
}
"""Layouts that are kept over the kills, with their processes."""
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


def disturbed(config: Path, run: Path, starts: list[tuple[str, bool]], rng: random.Random) -> list[int]:
    """Train in `run`, killed at as many random steps as there are starts but one.

    Returns:
        The steps.

    Raises:
        RuntimeError: the run ended before a kill, or failed.
    """
    steps = sorted(rng.sample(range(2, runs.STEPS), len(starts) - 1))
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


def verdict(run: Path, reference: Path, tolerance: float) -> tuple[bool, float]:
    """Whether a run has every step once and agrees with another, and their largest difference."""
    lines, expected = runs.metrics(run), runs.metrics(reference)
    whole = [line["step"] for line in lines] == list(range(1, runs.STEPS + 1))
    windows = runs.largest_difference(lines, expected, "windows") == 0
    worst = max(runs.largest_difference(lines, expected, key) for key in ("loss", "grad_norm"))
    return whole and windows and worst <= tolerance, worst


def same_layout(config: Path, folder: Path, kills: int, rng: random.Random) -> list[bool]:
    """Every layout of `SAME`, killed and compared with itself."""
    good = []
    for name, (processes, _) in SAME.items():
        reference, run = folder / f"{name}-undisturbed", folder / name
        arguments, _ = options(name)
        begun = forked.start(["--config", str(config), "--run", str(reference), *arguments], processes)
        if not forked.finish(begun):
            raise RuntimeError(f"the undisturbed run of {name} failed")
        steps = disturbed(config, run, [(name, True)] * (kills + 1), rng)
        holds, worst = verdict(run, reference, 0.0)
        good.append(holds)
        mark = "pass" if holds else "FAIL"
        print(f"{mark} {name}, killed at steps {steps}: largest difference {worst:.1e}", flush=True)
    return good


def other_layouts(config: Path, folder: Path, rng: random.Random) -> list[bool]:
    """Runs whose layout changes at every start."""
    good = []
    for number, starts in enumerate(CHANGING):
        run = folder / f"changing-{number}"
        steps = disturbed(config, run, starts, rng)
        holds, worst = verdict(run, folder / "one process-undisturbed", layouts.ALL_STEPS)
        good.append(holds)
        names = " > ".join(name for name, _ in starts)
        mark = "pass" if holds else "FAIL"
        print(f"{mark} {names}, killed at steps {steps}: largest difference {worst:.1e}", flush=True)
    return good


def main() -> int:
    """Run the drill and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=5, help="of each run that keeps its layout")
    parser.add_argument("--seed", type=int, default=0, help="of the steps")
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    from emu3_megatron.samples.tiny import PARTS, prepare

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name in PARTS:
            prepare(folder / "data" / name)
        config = runs.write_configuration(folder, folder / "data")
        good = same_layout(config, folder, arguments.kills, rng) + other_layouts(config, folder, rng)
    print(f"{sum(good)} of {len(good)} hold")
    return int(not all(good))


if __name__ == "__main__":
    sys.exit(main())
