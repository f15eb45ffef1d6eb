"""The command-line programs as a user starts them: anew, or forked from a process whose imports are done.

As a program: a server that reads requests on stdin, one `Request` as JSON a line, and forks for each. It
answers the number of the process group at once and the exit code at the end.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).parents[1]
TRAINING = ("-m", "emu3_megatron.training")
IMPORTED_ONCE = (
    "emu3_megatron.inference.command_line",
    "emu3_megatron.tokenization",
    "emu3_megatron.training.command_line",
    "emu3_megatron.vision.training",
)


PORT_DIGITS = 5


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


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the server is asked for."""

    arguments: list[str]
    folder: str
    """Where they are typed."""
    output: str
    """What the processes write comes into ``OUTPUT/out`` and ``OUTPUT/err``."""
    processes: int
    environment: dict[str, str]


class Programs:
    """Starts programs by forking the server."""

    def __init__(self, outputs: Path) -> None:
        self._outputs = outputs
        self._count = 0
        self._server: subprocess.Popen[bytes] | None = None

    def __call__(
        self, *arguments: object, processes: int = 1, timeout: float = 500, folder: Path = ROOT
    ) -> Ended:
        """Run ``python ARGUMENTS``: a path, or ``-m`` and a module, then the program's own arguments.

        Several processes find one another as those of a torchrun do; the first that fails ends all.
        """
        self._count += 1
        output = self._outputs / str(self._count)
        output.mkdir()
        request = Request(
            arguments=[str(argument) for argument in arguments],
            folder=str(folder),
            output=str(output),
            processes=processes,
            environment=environment(),
        )
        try:
            code = self._ask(request, timeout)
        except BaseException:  # the next request finds no answer to this one
            self.close()
            raise
        return Ended(code, (output / "out").read_text(), (output / "err").read_text())

    def close(self) -> None:
        """End the server; another request starts one again."""
        if self._server is not None:
            self._server.kill()
            self._server.wait()
            self._server = None

    def _ask(self, request: Request, timeout: float) -> int:
        if self._server is None:
            command = [sys.executable, __file__]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            self._server = subprocess.Popen(command, env=environment(), cwd=ROOT, **pipes)
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps(asdict(request)).encode() + b"\n")
        self._server.stdin.flush()
        group = self._answer(timeout)
        try:
            return self._answer(timeout)
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
            raise

    def _answer(self, timeout: float) -> int:
        assert self._server is not None
        stream = self._server.stdout
        assert stream is not None
        if not select.select([stream], [], [], timeout)[0]:
            raise TimeoutError(f"no end after {timeout} s")
        line = b""
        while not line.endswith(b"\n"):
            part = os.read(stream.fileno(), 1)
            if not part:
                raise RuntimeError(f"the server ended with {self._server.wait()}")
            line += part
        return int(line)


@functools.cache
def shared() -> Programs:
    """One server for all tests of this process; it ends with it."""
    folder = tempfile.TemporaryDirectory(prefix="programs-")
    atexit.register(folder.cleanup)
    programs = Programs(Path(folder.name))
    atexit.register(programs.close)
    return programs


def _serve(requests: Iterator[str]) -> None:
    for module in IMPORTED_ONCE:
        __import__(module)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what is printed is no answer
    for line in requests:
        request = Request(**json.loads(line))
        leader = os.fork()
        if leader == 0:
            os.setpgid(0, 0)
            _be_a_launch(request)
        with contextlib.suppress(PermissionError, ProcessLookupError):
            os.setpgid(leader, leader)
        print(leader, file=answers, flush=True)
        try:
            _, status = os.waitpid(leader, 0)
        finally:  # what the program leaves behind ends too
            with contextlib.suppress(PermissionError, ProcessLookupError):
                os.killpg(leader, signal.SIGKILL)
        print(os.waitstatus_to_exitcode(status), file=answers, flush=True)


def _be_a_launch(request: Request) -> NoReturn:
    for name, descriptor in (("out", 1), ("err", 2)):
        path = Path(request.output) / name
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.clear()
    os.environ.update(request.environment)
    os.chdir(request.folder)
    if request.processes == 1:
        _be_a_program(request.arguments)
    reading, writing = os.pipe()
    ranks = []
    for rank in range(request.processes):
        child = os.fork()
        if child == 0:
            os.close(writing)
            port = os.read(reading, PORT_DIGITS).decode()
            if not port:
                sys.exit("the launch ended before its processes began")
            os.environ.update(_addresses(rank, request.processes, port))
            _be_a_program(request.arguments)
        ranks.append(child)
    # Made after the forks: it has a thread. Ports are taken by whoever asks, so none is chosen in advance.
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    os.write(writing, f"{store.port:{PORT_DIGITS}}".encode() * request.processes)
    sys.exit(_end_of_all(ranks))


def _addresses(rank: int, processes: int, port: str) -> dict[str, str]:
    """What torchrun tells a process."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port.strip(),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }


def _end_of_all(ranks: list[int]) -> int:
    """Exit code of the first process that fails, which ends the others; 0 where none does."""
    first = 0
    while ranks:
        child, status = os.wait()
        ranks.remove(child)
        code = os.waitstatus_to_exitcode(status)
        if code and not first:
            first = code if code > 0 else 128 - code
            time.sleep(0.2)  # others may be saying the same
            for other in ranks:
                os.kill(other, signal.SIGKILL)
    return first


def _be_a_program(arguments: list[str]) -> NoReturn:
    """Be the program, and end as it does: the interpreter shuts down, which is a part of it."""
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path[0] = str(Path(arguments[0]).resolve().parent)
        runpy.run_path(arguments[0], run_name="__main__")
    sys.exit()


if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # as `python -m` has it
    _serve(iter(sys.stdin.readline, ""))
