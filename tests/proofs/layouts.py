"""The layouts proof: every parallel layout of two and four processes trains as one process does.

``make prove NAME=layouts``: 20 steps in fp32 over packed windows, with the distributed optimizer on and off.
Losses and gradient norms agree within 1e-5 (relative) at the first step and within 1e-4 at every step. With
dropout in all places they do so too, and two runs of one layout and seed are equal to the last bit. Exit code
0 only if all hold.

``ARGS="--folder FOLDER --minutes 9"`` runs it in pieces: what the folder holds is not run again, and while
runs are left the exit code is 3.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from emu3_megatron.parallel import platform

platform.install("cpu")

from tests.training import forked, layouts, runs

LAYERS = ["--model.num_layers", "8"]
"""Four interleaved stages of two groups need eight layers."""
WITH_DROPOUT = {
    2: ["dp2", "tp2", "tp2-sp", "pp2-interleaved", "cp2", "cp2-a2a"],
    4: ["tp2-cp2-sp", "tp2-cp2-a2a-sp", "tp2-pp2", "cp2-dp2"],
}
DROPOUT = [
    part
    for place in ("embedding_dropout", "attention_dropout", "hidden_dropout")
    for part in (f"--model.{place}", "0.1")
]


class Unfinished(Exception):
    """The time is up."""


class Proof:
    """Runs of all layouts in one folder; those that are there are not run again.

    Args:
        folder: Where the runs are.
        minutes: Time after which no further run is started, or None.
        only: Layouts by name, or None for all.
    """

    def __init__(self, folder: Path, minutes: float | None, only: list[str] | None) -> None:
        self.folder, self.only = folder, only
        self.deadline = None if minutes is None else time.monotonic() + 60 * minutes
        self.reference = folder / "reference"
        self.dropping_reference = folder / "reference-dropout"
        self.config = folder / "config.yaml"

    def prepare(self) -> None:
        """Write the data and train the references, without and with dropout: one process, no parallelism."""
        from emu3_megatron.samples.tiny import PARTS, prepare

        for name in PARTS:
            if not (self.folder / "data" / name / "manifest.json").exists():
                prepare(self.folder / "data" / name)
        runs.write_configuration(self.folder, self.folder / "data")
        self.launch({self.reference.name: [], self.dropping_reference.name: DROPOUT}, 1)

    def launch(self, jobs: dict[str, list[str]], processes: int) -> None:
        """Train every job into `folder/NAME`.

        Raises:
            Unfinished: the time is up.
            RuntimeError: a run failed.
        """
        for name, arguments in jobs.items():
            run = self.folder / name
            if finished(run):
                continue
            if self.deadline is not None and time.monotonic() > self.deadline:
                raise Unfinished
            shutil.rmtree(run, ignore_errors=True)
            common = ["--config", str(self.config), "--run", str(run), "--checkpoint.interval", "1000"]
            if not forked.finish(forked.start([*common, *LAYERS, *arguments], processes)):
                raise RuntimeError(f"{name} failed")

    def equality(self, table: dict[str, dict[str, object]], processes: int) -> list[str]:
        """Lines of the verdict on layouts without dropout, with both kinds of optimizer."""
        jobs = {
            f"{name}-{'distributed' if distributed else 'plain'}": layouts.options(
                layout, distributed_optimizer=distributed
            )
            for name, layout in table.items()
            if self.only is None or name in self.only
            for distributed in (False, True)
            if distributed or "gather" not in layout
        }
        self.launch(jobs, processes)
        return [self._line(name, self.reference, processes) for name in jobs]

    def _line(self, name: str, reference: Path, processes: int) -> str:
        """The verdict on a run that a single process is to equal."""
        first, every = layouts.differences(self.folder / name, reference)
        mark = "pass" if first <= layouts.FIRST_STEP and every <= layouts.ALL_STEPS else "FAIL"
        return f"{mark} {processes} processes {name:34s} first step {first:.1e}  20 steps {every:.1e}"

    def with_dropout(self, table: dict[str, dict[str, object]], processes: int) -> list[str]:
        """Lines of the verdict on runs with dropout: against one process, and twice."""
        names = [name for name in WITH_DROPOUT[processes] if self.only is None or name in self.only]
        jobs = {
            f"{name}-dropout-{number}": [
                *layouts.options(table[name], distributed_optimizer=True),
                *DROPOUT,
            ]
            for name in names
            for number in (1, 2)
        }
        self.launch(jobs, processes)
        lines = [self._line(f"{name}-dropout-1", self.dropping_reference, processes) for name in names]
        for name in names:
            one, two = (runs.metrics(self.folder / f"{name}-dropout-{number}") for number in (1, 2))
            worst = max(runs.largest_difference(one, two, key) for key in ("loss", "grad_norm"))
            mark = "pass" if worst == 0 else "FAIL"
            lines.append(f"{mark} {processes} processes {name:34s} with dropout, twice: {worst:.1e}")
        return lines


def finished(run: Path) -> bool:
    """Whether a run came to its end."""
    return (run / "metrics.jsonl").exists() and len(runs.metrics(run)) == runs.STEPS


def verdict(folder: Path, minutes: float | None, only: list[str] | None) -> list[str]:
    """Run everything in `folder`; lines of the verdict, which are printed as they come."""
    proof = Proof(folder, minutes, only)
    proof.prepare()
    lines: list[str] = []
    for processes, table in ((2, layouts.TWO), (4, layouts.FOUR)):
        for part in (proof.equality, proof.with_dropout):
            found = part(table, processes)
            print("\n".join(found), flush=True)
            lines += found
    return lines


def main() -> int:
    """Run, print the verdict, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="keep the runs here")
    parser.add_argument("--minutes", type=float, help="start no run after as many, to go on later")
    parser.add_argument("--only", nargs="+", choices=[*layouts.TWO, *layouts.FOUR], help="these layouts")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lines = verdict(folder, arguments.minutes, arguments.only)
        except Unfinished:
            print("runs are left; start this again with the same folder")
            return 3
    failed = sum(line.startswith("FAIL") for line in lines)
    print(f"{len(lines) - failed} of {len(lines)} hold")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
