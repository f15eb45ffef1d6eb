"""The layouts proof: every parallel layout of two and four processes trains as one process does.

``make prove NAME=layouts``: 20 steps in fp32 over packed windows, with the distributed optimizer on and off.
Losses and gradient norms agree within 1e-5 (relative) at the first step and within 1e-4 at every step. With
dropout, two runs of the same layout and seed are equal to the last bit. Exit code 0 only if all hold.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.training import layouts, runs

LAYERS = ["--model.num_layers", "8"]
"""Four interleaved stages of two groups need eight layers."""
AT_ONCE = 10
"""Layouts of one launch; each leaves process groups behind until its processes end."""
WITH_DROPOUT = {2: ["tp2-sp", "pp2-interleaved", "cp2"], 4: ["tp2-cp2-sp", "tp2-pp2", "cp2-dp2"]}
DROPOUT = [
    part
    for place in ("embedding_dropout", "attention_dropout", "hidden_dropout")
    for part in (f"--model.{place}", "0.1")
]


def launch(folder: Path, config: Path, jobs: dict[str, list[str]], processes: int) -> None:
    """Train every job into ``folder/NAME``, a few at a time."""
    names = list(jobs)
    for begin in range(0, len(names), AT_ONCE):
        part = {name: [*LAYERS, *jobs[name]] for name in names[begin : begin + AT_ONCE]}
        print(f"{processes} processes: {', '.join(part)}", file=sys.stderr, flush=True)
        runs.launch_layouts(folder, config, part, processes=processes, save=False, timeout=3600)


def compare(folder: Path, reference: Path, jobs: dict[str, list[str]], processes: int) -> list[str]:
    """Lines of the verdict on layouts without dropout."""
    lines = []
    for name in jobs:
        first, every = layouts.differences(folder / name, reference)
        good = first <= layouts.FIRST_STEP and every <= layouts.ALL_STEPS
        mark = "pass" if good else "FAIL"
        lines.append(f"{mark} {processes} processes {name:34s} first step {first:.1e}  20 steps {every:.1e}")
    return lines


def repeat(folder: Path, names: list[str], processes: int) -> list[str]:
    """Lines of the verdict on pairs of runs with dropout."""
    lines = []
    for name in names:
        one, two = (runs.metrics(folder / f"{name}-dropout-{number}") for number in (1, 2))
        worst = max(runs.largest_difference(one, two, key) for key in ("loss", "grad_norm"))
        mark = "pass" if worst == 0 else "FAIL"
        lines.append(f"{mark} {processes} processes {name:34s} with dropout, twice: {worst:.1e}")
    return lines


def main() -> int:
    """Run, print the verdict, and return the exit code."""
    from emu3_megatron.samples.tiny import PARTS, prepare

    argparse.ArgumentParser(description=__doc__).parse_args()
    verdict = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name in PARTS:
            prepare(folder / "data" / name)
        config = runs.write_configuration(folder, folder / "data")
        reference = folder / "reference"
        done = runs.train(config, reference, *LAYERS)
        if done.returncode:
            print(done.stderr, file=sys.stderr)
            return 1
        for processes, table in ((2, layouts.TWO), (4, layouts.FOUR)):
            jobs = {
                f"{name}-{'distributed' if distributed else 'plain'}": layouts.options(
                    layout, distributed_optimizer=distributed
                )
                for name, layout in table.items()
                for distributed in (False, True)
                if distributed or "gather" not in layout
            }
            launch(folder, config, jobs, processes)
            verdict += compare(folder, reference, jobs, processes)
            print("\n".join(verdict[-len(jobs) :]), flush=True)
            names = WITH_DROPOUT[processes]
            again = {
                f"{name}-dropout-{number}": [
                    *layouts.options(table[name], distributed_optimizer=True),
                    *DROPOUT,
                ]
                for name in names
                for number in (1, 2)
            }
            launch(folder, config, again, processes)
            verdict += repeat(folder, names, processes)
            print("\n".join(verdict[-len(names) :]), flush=True)
    failed = sum(line.startswith("FAIL") for line in verdict)
    print(f"{len(verdict) - failed} of {len(verdict)} hold")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
