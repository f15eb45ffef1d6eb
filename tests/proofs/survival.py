"""The survival proof: kill -9 in the middle of asynchronous saves, again and again, loses nothing.

``make prove NAME=survival``: a run that saves after every step is killed 20 times, each at a random moment of
a save, and started again. After every kill all committed checkpoints are sound and `latest` names one; the
curve in the end is bit-equal to that of an undisturbed run. Then one byte is flipped in each file of the
newest checkpoint in turn: it is refused by name, and the one before it is used. Exit code 0 only if all hold.

``ARGS="--folder FOLDER --minutes 5"`` runs it in pieces; while kills are left the exit code is 3.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from emu3_megatron.parallel import platform

platform.install("cpu")

from emu3_megatron.training import checkpoint_files as files
from emu3_megatron.training.checkpoint_choice import newest_valid
from tests.training import forked, runs

MODEL = ["--model.hidden_size", "256", "--model.ffn_hidden_size", "768", "--trainer.global_batch_size", "1"]
"""Large enough that a save takes longer than looking at a folder, with short steps."""


def arguments_of(config: Path, run: Path, steps: int) -> list[str]:
    """The command line of a run that saves after every step."""
    arguments = ["--config", str(config), "--run", str(run), "--trainer.steps", str(steps)]
    return [*arguments, "--checkpoint.interval", "1", *MODEL]


def uncommitted(checkpoints: Path) -> bool:
    """Whether a save is under way, or was cut off."""
    folders = checkpoints.glob("step-*")
    return any(not (folder / files.COMMIT).exists() for folder in folders)


def kill_in_a_save(config: Path, run: Path, steps: int, moment: float) -> bool:
    """Start the run, let it save once, and kill it in the next save; False if it came to its end.

    Args:
        config: The run's configuration.
        run: Its folder.
        steps: Its length.
        moment: When, as a share of the time that the save before took.
    """
    checkpoints = run / "checkpoints"
    for folder in checkpoints.glob("step-*"):
        if not (folder / files.COMMIT).exists():
            files.remove(folder)  # or the rest of the last save would pass for a new one
    (process,) = forked.start(arguments_of(config, run, steps))

    def wait(for_a_save: bool) -> float:
        while process.is_alive() and uncommitted(checkpoints) != for_a_save:
            time.sleep(0.001)
        return time.monotonic()

    took = -wait(True) + wait(False)
    wait(True)
    time.sleep(moment * took)
    alive = process.is_alive()
    forked.kill([process])
    return alive


def faults(checkpoints: Path, before: int) -> list[str]:
    """What is wrong after a kill: damage, a `latest` that names nothing, a checkpoint lost."""
    committed = files.committed_folders(checkpoints)
    found = [problem for folder in committed for problem in files.damage(folder, checksums=True)]
    latest = checkpoints / files.LATEST
    if latest.exists() and not (checkpoints / latest.read_text().strip() / files.COMMIT).exists():
        found.append(f"{latest} names {latest.read_text().strip()!r}")
    newest = step_of(checkpoints)
    if newest < before:
        found.append(f"the newest checkpoint went back from step {before} to {newest}")
    return found


def step_of(checkpoints: Path) -> int:
    """Step of the newest committed checkpoint, 0 without any."""
    committed = files.committed_folders(checkpoints)
    return int(committed[-1].name.removeprefix("step-")) if committed else 0


def refused_by_name(checkpoints: Path, rng: random.Random) -> list[str]:
    """Flip a byte of each file of the newest checkpoint in turn; lines about what was not noticed."""
    from emu3_megatron.parallel.config import ParallelConfig
    from emu3_megatron.parallel.groups import destroy_parallel, initialize_parallel

    initialize_parallel(ParallelConfig(), platform.install("cpu"), seed=0)
    before, newest = files.committed_folders(checkpoints)[-2:]
    missed = []
    for path in files.payload(newest):
        content = path.read_bytes()
        changed = bytearray(content)
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        path.write_bytes(changed)
        named = any(str(path) in problem for problem in files.damage(newest, checksums=True))
        if not named or newest_valid(checkpoints, checksums=True) != before:
            missed.append(f"a changed byte of {path} was not noticed")
        path.write_bytes(content)
    if newest_valid(checkpoints, checksums=True) != newest:
        missed.append(f"{newest} is refused although it was put back")
    destroy_parallel()
    return missed


class Unfinished(Exception):
    """The time is up."""


class Drill:
    """The kills of one run, in a folder that remembers them.

    Args:
        folder: Where everything lies.
        kills: How many there are to be.
        seed: Of the moments.
        minutes: Time after which no further kill is begun, or None.
    """

    def __init__(self, folder: Path, kills: int, seed: int, minutes: float | None) -> None:
        self.run, self.reference = folder / "run", folder / "reference"
        self._data, self._journal = folder / "data", folder / "kills.jsonl"
        self._kills, self._seed, self.steps = kills, seed, 3 * kills + 5
        self._deadline = None if minutes is None else time.monotonic() + 60 * minutes
        self.config = folder / "config.yaml"

    def prepare(self) -> None:
        """Write the data, and train the run that nobody disturbs."""
        from emu3_megatron.samples.tiny import PARTS, prepare

        for name in PARTS:
            if not (self._data / name / "manifest.json").exists():
                prepare(self._data / name)
        runs.write_configuration(self._data.parent, self._data)
        if (self.reference / "checkpoints" / "latest").exists():
            return
        shutil.rmtree(self.reference, ignore_errors=True)
        arguments = [*arguments_of(self.config, self.reference, self.steps), "--checkpoint.interval", "1000"]
        if not forked.finish(forked.start(arguments)):
            raise RuntimeError("the undisturbed run failed")

    def disturb(self) -> list[str]:
        """All kills that are left; lines about what does not hold.

        Raises:
            Unfinished: the time is up.
        """
        wrong: list[str] = []
        journal = self.journal()
        for number in range(len(journal) + 1, self._kills + 1):
            if self._deadline is not None and time.monotonic() > self._deadline:
                raise Unfinished
            moment = random.Random(f"{self._seed}/{number}").random()
            before = step_of(self.run / "checkpoints")
            if not kill_in_a_save(self.config, self.run, self.steps, moment):
                return [f"the run ended before kill {number}: too few steps"]
            inside = uncommitted(self.run / "checkpoints")
            found = faults(self.run / "checkpoints", before)
            wrong += found
            entry = {"inside": inside, "step": step_of(self.run / "checkpoints"), "wrong": found}
            with open(self._journal, "a") as stream:
                stream.write(json.dumps(entry) + "\n")
            where = "in a save" if inside else "between saves"
            print(
                f"kill {number}: at {moment:.0%} of a save, {where}; newest is step {entry['step']}",
                flush=True,
            )
        return [line for entry in journal for line in entry["wrong"]] + wrong

    def journal(self) -> list[dict[str, Any]]:
        """Entries of the kills so far."""
        if not self._journal.exists():
            return []
        return [json.loads(line) for line in self._journal.read_text().splitlines()]

    def compare(self) -> list[str]:
        """Let the run come to its end; lines about what differs from the undisturbed one."""
        forked.finish(forked.start(arguments_of(self.config, self.run, self.steps)))
        lines, expected, wrong = runs.metrics(self.run), runs.metrics(self.reference), []
        if [line["step"] for line in lines] != list(range(1, self.steps + 1)):
            wrong.append("the curve has holes or repeats")
        for key in ("loss", "grad_norm", "windows"):
            if worst := runs.largest_difference(lines, expected, key):
                wrong.append(f"{key} differs from the undisturbed run by {worst:.1e}")
        inside = sum(entry["inside"] for entry in self.journal())
        print(f"{self._kills} kills, {inside} of them in a save; {self.steps} steps compared", flush=True)
        return wrong


def main() -> int:
    """Run the drill and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--folder", type=Path, help="keep everything here, to go on later")
    parser.add_argument("--minutes", type=float, help="begin no kill after as many")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        drill = Drill(folder, arguments.kills, arguments.seed, arguments.minutes)
        drill.prepare()
        try:
            wrong = drill.disturb() or drill.compare()
        except Unfinished:
            print("kills are left; start this again with the same folder")
            return 3
        wrong += refused_by_name(drill.run / "checkpoints", random.Random(arguments.seed))
    print("\n".join(f"FAIL {line}" for line in wrong) or "pass: nothing lost, nothing damaged trusted")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
