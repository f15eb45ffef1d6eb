"""The layouts proof: every parallel layout of two and four processes trains as one process does.

``make prove NAME=layouts``: 20 steps in fp32 over packed windows, with the distributed optimizer on and off.
Losses and gradient norms agree within 1e-5 (relative) at the first step and within 1e-4 at every step. With
dropout, two runs of the same layout and seed are equal to the last bit. Exit code 0 only if all hold.

``ARGS="--folder FOLDER --launches 1"`` runs it in pieces: what the folder holds is not run again, and while
runs are left the exit code is 3.
"""

from __future__ import annotations

import argparse
import shutil
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


class Unfinished(Exception):
    """The launches that were allowed are used up."""


class Proof:
    """Runs of all layouts in one folder, a few in one launch; those that are there are not run again.

    Args:
        folder: Where the runs are.
        launches: How many launches there may be, or None for all that it takes.
    """

    def __init__(self, folder: Path, launches: int | None) -> None:
        self.folder = folder
        self.left = launches
        self.reference = folder / "reference"
        self.config = folder / "config.yaml"

    def prepare(self) -> None:
        """Write the data and train the reference: one process, no parallelism."""
        from emu3_megatron.samples.tiny import PARTS, prepare

        for name in PARTS:
            if not (self.folder / "data" / name / "manifest.json").exists():
                prepare(self.folder / "data" / name)
        runs.write_configuration(self.folder, self.folder / "data")
        if not finished(self.reference):
            done = runs.train(self.config, self.reference, *LAYERS)
            if done.returncode:
                raise RuntimeError(done.stderr[-4000:])

    def launch(self, jobs: dict[str, list[str]], processes: int) -> None:
        """Train every job into `folder/NAME`.

        Raises:
            Unfinished: no further launch is allowed.
        """
        missing = [name for name in jobs if not finished(self.folder / name)]
        for begin in range(0, len(missing), AT_ONCE):
            if self.left == 0:
                raise Unfinished
            part = {name: [*LAYERS, *jobs[name]] for name in missing[begin : begin + AT_ONCE]}
            for name in part:
                shutil.rmtree(self.folder / name, ignore_errors=True)
            print(f"{processes} processes: {', '.join(part)}", file=sys.stderr, flush=True)
            runs.launch_layouts(self.folder, self.config, part, processes=processes, save=False, timeout=3600)
            self.left = None if self.left is None else self.left - 1

    def equality(self, table: dict[str, dict[str, object]], processes: int) -> list[str]:
        """Lines of the verdict on layouts without dropout, with both kinds of optimizer."""
        jobs = {
            f"{name}-{'distributed' if distributed else 'plain'}": layouts.options(
                layout, distributed_optimizer=distributed
            )
            for name, layout in table.items()
            for distributed in (False, True)
            if distributed or "gather" not in layout
        }
        self.launch(jobs, processes)
        lines = []
        for name in jobs:
            first, every = layouts.differences(self.folder / name, self.reference)
            good = first <= layouts.FIRST_STEP and every <= layouts.ALL_STEPS
            mark = "pass" if good else "FAIL"
            lines.append(
                f"{mark} {processes} processes {name:34s} first step {first:.1e}  20 steps {every:.1e}"
            )
        return lines

    def repetition(self, table: dict[str, dict[str, object]], processes: int) -> list[str]:
        """Lines of the verdict on pairs of runs with dropout."""
        names = WITH_DROPOUT[processes]
        jobs = {
            f"{name}-dropout-{number}": [
                *layouts.options(table[name], distributed_optimizer=True),
                *DROPOUT,
            ]
            for name in names
            for number in (1, 2)
        }
        self.launch(jobs, processes)
        lines = []
        for name in names:
            one, two = (runs.metrics(self.folder / f"{name}-dropout-{number}") for number in (1, 2))
            worst = max(runs.largest_difference(one, two, key) for key in ("loss", "grad_norm"))
            mark = "pass" if worst == 0 else "FAIL"
            lines.append(f"{mark} {processes} processes {name:34s} with dropout, twice: {worst:.1e}")
        return lines


def finished(run: Path) -> bool:
    """Whether a run came to its end."""
    return (run / "metrics.jsonl").exists() and len(runs.metrics(run)) == runs.STEPS


def verdict(folder: Path, launches: int | None) -> list[str]:
    """Run everything in `folder`; lines of the verdict, which are printed as they come."""
    proof = Proof(folder, launches)
    proof.prepare()
    lines: list[str] = []
    for processes, table in ((2, layouts.TWO), (4, layouts.FOUR)):
        for part in (proof.equality, proof.repetition):
            found = part(table, processes)
            print("\n".join(found), flush=True)
            lines += found
    return lines


def main() -> int:
    """Run, print the verdict, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="keep the runs here")
    parser.add_argument("--launches", type=int, help="stop after as many, to go on later")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lines = verdict(folder, arguments.launches)
        except Unfinished:
            print("runs are left; start this again with the same folder")
            return 3
    failed = sum(line.startswith("FAIL") for line in lines)
    print(f"{len(lines) - failed} of {len(lines)} hold")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
