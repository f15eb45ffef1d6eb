"""The command-line programs as a user starts them: anew, or forked from a process whose imports are done.

As a program: a server that reads ``{"arguments": [...], "folder": ...}`` lines on stdin, forks for each, and
answers the exit code; what the child wrote is in ``FOLDER/out`` and ``FOLDER/err``.
"""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
TRAINING = ("-m", "emu3_megatron.training")
IMPORTED_ONCE = (
    "emu3_megatron.inference.command_line",
    "emu3_megatron.tokenization",
    "emu3_megatron.training.command_line",
    "emu3_megatron.vision.training",
)


@dataclass(frozen=True)
class Ended:
    """A program's end."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """Its one ``error:`` line, where it ended as a user's mistake should."""
        assert self.code not in (0, 1), (self.code, self.out[-2000:], self.err[-2000:])
        assert "Traceback" not in self.err, self.err[-4000:]
        (line,) = [line for line in self.err.splitlines() if "error: " in line]
        assert self.err.splitlines()[-1] == line
        return line


def environment() -> dict[str, str]:
    """One thread for each process, and this checkout first."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "EMU3_TRACEBACK": ""}


def start(*arguments: object, timeout: float = 400, folder: Path = ROOT) -> Ended:
    """Run ``python ARGUMENTS`` in a new process, in the repository or another folder."""
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(
        command, env=environment(), cwd=folder, capture_output=True, text=True, timeout=timeout, check=False
    )
    return Ended(done.returncode, done.stdout, done.stderr)


class Programs:
    """Starts programs by forking the server."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0
        self._server = subprocess.Popen(
            [sys.executable, __file__], env=environment(), cwd=ROOT, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def __call__(self, *arguments: object) -> Ended:
        """Run ``python ARGUMENTS``: a path, or ``-m`` and a module, then the program's own arguments."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._count += 1
        folder = self._folder / str(self._count)
        folder.mkdir()
        request = {"arguments": [str(argument) for argument in arguments], "folder": str(folder)}
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        code = int(self._server.stdout.readline())
        return Ended(code, (folder / "out").read_text(), (folder / "err").read_text())

    def close(self) -> None:
        """End the server."""
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait(timeout=60)


def _serve(requests: Iterator[str]) -> None:
    for module in IMPORTED_ONCE:
        __import__(module)
    answers = os.fdopen(os.dup(1), "w")
    for line in requests:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            _run(request["arguments"], Path(request["folder"]))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), file=answers, flush=True)


def _run(arguments: list[str], folder: Path) -> None:
    """Be the program, and end."""
    for name, descriptor in (("out", 1), ("err", 2)):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT), descriptor)
    code: object = 0
    try:
        if arguments[0] == "-m":
            sys.argv = arguments[1:]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = arguments
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 0 if code is None else 1)


if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # as `python -m` has it
    _serve(iter(sys.stdin.readline, ""))
