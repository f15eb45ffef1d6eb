"""Stages that run once: a finished one is skipped unless its commands or a stage before it changed."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from emu3_megatron.errors import UserError
from emu3_megatron.files import write_json_atomic


class StageRunner:
    """Runs named stages in order below one folder.

    A stage's marker (``stages/NAME.json``) holds a fingerprint of its description chained with the
    fingerprint of the stage before it, and once it is done the seconds it took. The description is whatever
    determines the stage's result: its commands and the text of its config files. A stage that was interrupted
    goes on from what it left; one that changed starts from nothing, so that it resumes no run of other
    settings.
    """

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder = folder
        self.seconds: dict[str, float] = {}
        """Seconds of every stage, those done before included."""
        self.fresh: dict[str, float] = {}
        """Seconds of the stages that ran now."""
        self._environment = {**os.environ, **environment}
        self._chain = ""
        (folder / "stages").mkdir(parents=True, exist_ok=True)

    def run(
        self, name: str, description: str, action: Callable[[], None], outputs: Sequence[Path] = ()
    ) -> None:
        """Run `action` unless the stage is already done with this description.

        Args:
            name: the stage.
            description: what determines its result.
            action: the stage.
            outputs: files and folders that it makes; removed first where they are of another description.
        """
        self._chain = hashlib.sha256(f"{self._chain}\n{name}\n{description}".encode()).hexdigest()
        marker = self.folder / "stages" / f"{name}.json"
        done = json.loads(marker.read_text()) if marker.exists() else {}
        if done.get("fingerprint") == self._chain and done["seconds"] is not None:
            self.seconds[name] = float(done["seconds"])
            print(f"== {name}: done before in {self.seconds[name]:.0f} s", flush=True)
            return
        print(f"== {name}", flush=True)
        if done and done["fingerprint"] != self._chain:
            for output in outputs:
                _remove(output)
        write_json_atomic(marker, {"fingerprint": self._chain, "seconds": None})
        begin = time.monotonic()
        action()
        self.seconds[name] = self.fresh[name] = round(time.monotonic() - begin, 1)
        write_json_atomic(marker, {"fingerprint": self._chain, "seconds": self.seconds[name]})
        print(f"== {name}: {self.seconds[name]:.0f} s", flush=True)

    def run_commands(
        self,
        name: str,
        commands: Sequence[Sequence[str]],
        configs: Sequence[Path] = (),
        outputs: Sequence[Path] = (),
    ) -> None:
        """Run a stage made of commands, side by side when there are several.

        Args:
            name: the stage.
            commands: argument lists; ``python`` and ``torchrun`` stand for this environment's own.
            configs: files whose text is part of the stage's description.
            outputs: see `run`.

        Raises:
            UserError: a command failed; its own message is above.
        """
        description = "\n".join(shlex.join(command) for command in commands)
        description += "".join(path.read_text() for path in configs)
        self.run(name, description, lambda: self._execute(name, commands), outputs)

    def _execute(self, name: str, commands: Sequence[Sequence[str]]) -> None:
        running = []
        for command in commands:
            print(f"+ {shlex.join(command)}", flush=True)
            running.append(subprocess.Popen(self._resolve(command), env=self._environment))
        codes = [process.wait() for process in running]
        for command, code in zip(commands, codes, strict=True):
            if code:
                raise UserError(
                    f"stage {name!r} failed with exit code {code}: {shlex.join(command)}; "
                    "see its message above"
                )

    @staticmethod
    def _resolve(command: Sequence[str]) -> list[str]:
        program, *rest = command
        if program == "python":
            return [sys.executable, *rest]
        if program == "torchrun":
            return [sys.executable, "-m", "torch.distributed.run", "--standalone", *rest]
        return [program, *rest]


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
