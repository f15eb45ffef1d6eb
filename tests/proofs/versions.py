"""The proof that a checkpoint does not know the version of megatron-core that wrote it.

``make prove NAME=versions ARGS="--versions 0.17.0 0.19.0 --pythons OTHER_ENVIRONMENT/bin/python"``: a small
model is trained for 20 steps with tensor parallelism under every installation: the one of this environment,
those of other environments, and the versions named, which pip installs into folders of their own (they have
to have a wheel for this Python). Then every run's checkpoint of step 10 is resumed, in one process, under
every other installation. Curves are within 1e-6 (relative) of the first installation's, and resumed ones
within 1e-5 of what they go on from. Exit code 0 only if all hold.

``ARGS="--folder FOLDER ..."`` keeps everything there; finished runs are not run again.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.training import runs

SAME_LAYOUT, OTHER_LAYOUT = 1e-6, 1e-5
SAVED, PROCESSES = 10, 2
LAYOUT = ["--parallel.tensor_model_parallel_size", "2", "--parallel.sequence_parallel", "true"]
ASK = "import sys, megatron.core as m; print(f'{m.__version__} on Python {sys.version.split()[0]}')"


@dataclass(frozen=True)
class Installation:
    """A Python, and a folder that stands before what is installed in it."""

    python: Path
    folder: Path | None = None

    def run(self, *arguments: str) -> str:
        """Run the Python; what it printed.

        Raises:
            RuntimeError: it failed.
        """
        places = [str(place) for place in (self.folder, ROOT) if place]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(places)}
        ended = subprocess.run(
            [str(self.python), *arguments], env=environment, capture_output=True, text=True, check=False
        )
        if ended.returncode:
            raise RuntimeError(f"{self.python} {' '.join(arguments)}: {ended.stderr[-4000:]}")
        return ended.stdout

    @property
    def name(self) -> str:
        """Versions of megatron-core and Python."""
        return self.run("-c", ASK).splitlines()[-1]

    def train(self, config: Path, run: Path, *, processes: int = 1) -> None:
        """Train to the end; with more than one process, under `LAYOUT`."""
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--standalone"]
        start = launcher if processes > 1 else []
        options = LAYOUT if processes > 1 else []
        given = ["--config", str(config), "--run_folder", str(run), *options]
        self.run(*start, "-m", runs.TRAINING, *given)


def install(version: str, folder: Path) -> Installation:
    """megatron-core alone, in a folder of its own."""
    target = folder / f"megatron-core-{version}"
    if not target.exists():
        wanted = f"megatron-core=={version}"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target)]
        subprocess.run([*command, wanted], check=True)
    return Installation(Path(sys.executable), target)


def finished(run: Path) -> bool:
    """Whether a run came to its end."""
    return (run / "metrics.jsonl").exists() and len(runs.metrics(run)) == runs.STEPS


def as_it_was(run: Path, copy: Path) -> None:
    """Copy a finished run without what came after its checkpoint of step `SAVED`."""
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(run, copy)
    for folder in (copy / "checkpoints").glob("step-*"):
        if folder.name != f"step-{SAVED:08d}":
            shutil.rmtree(folder)
    lines = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
    (copy / "metrics.jsonl").write_text("".join(lines[:SAVED]))


def verdict(what: str, run: Path, reference: Path, tolerance: float) -> bool:
    """Say whether a run's curve is within `tolerance` of another one's."""
    lines, expected = runs.metrics(run), runs.metrics(reference)
    whole = [line["step"] for line in lines] == list(range(1, runs.STEPS + 1))
    worst = max(runs.largest_difference(lines, expected, key) for key in ("loss", "grad_norm"))
    holds = whole and worst <= tolerance
    print(f"{'pass' if holds else 'FAIL'} {what}: largest difference {worst:.1e}", flush=True)
    return holds


def prove(installations: list[Installation], folder: Path) -> list[bool]:
    """Train under every installation, resume under every other one; whether each holds."""
    from emu3_megatron.samples.tiny import PARTS, prepare

    for part in PARTS:
        if not (folder / "data" / part / "manifest.json").exists():
            prepare(folder / "data" / part)
    config = runs.write_configuration(folder, folder / "data")
    trained: dict[str, tuple[Installation, Path]] = {}
    good = []
    for number, installation in enumerate(installations):
        name, run = installation.name, folder / f"run-{number}"
        if not finished(run):
            shutil.rmtree(run, ignore_errors=True)
            installation.train(config, run, processes=PROCESSES)
        trained[name] = (installation, run)
        good.append(verdict(name, run, folder / "run-0", SAME_LAYOUT))
    for saved, (_, run) in trained.items():
        for number, (name, (installation, _)) in enumerate(trained.items()):
            if name == saved:
                continue
            resumed = folder / f"{run.name}-resumed-{number}"
            if not finished(resumed):
                as_it_was(run, resumed)
                installation.train(config, resumed)
            good.append(verdict(f"{saved}, resumed under {name}", resumed, run, OTHER_LAYOUT))
    return good


def main() -> int:
    """Run the proof and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--versions", nargs="*", default=[], help="of megatron-core, installed by pip")
    parser.add_argument("--pythons", nargs="*", default=[], type=Path, help="of other environments")
    parser.add_argument("--folder", type=Path, help="keep everything here, to go on later")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.folder or Path(temporary)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        installations = [Installation(Path(sys.executable))]
        installations += [Installation(python.absolute()) for python in arguments.pythons]
        installations += [install(version, folder) for version in arguments.versions]
        good = prove(installations, folder)
    print(f"{sum(good)} of {len(good)} hold")
    return int(not all(good))


if __name__ == "__main__":
    sys.exit(main())
