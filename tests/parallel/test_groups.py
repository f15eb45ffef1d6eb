"""How processes with process groups end."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

PROGRAM = """
import atexit, os, sys

def threads():
    return len(os.listdir("/proc/self/task"))

atexit.register(lambda: print(threads()))  # called after what is registered later
import torch
from emu3_megatron.errors import UserError, run_main
from emu3_megatron.parallel import platform
from emu3_megatron.parallel.config import ParallelConfig
from emu3_megatron.parallel.groups import initialize_parallel

def main():
    machine = platform.install("cpu")
    print(threads())
    initialize_parallel(ParallelConfig(), machine, seed=0)
    torch.distributed.all_gather_object([None], "hello")
    assert threads() > 1
    if sys.argv[1] == "error":
        raise UserError("value: 3 is not even; give an even one")
    if sys.argv[1] == "exit":
        sys.exit(7)

run_main(main)
"""


@pytest.mark.parametrize(("ending", "code"), [("well", 0), ("error", 2), ("exit", 7)])
def test_threads_of_groups_end_before_the_interpreter(ending: str, code: int) -> None:
    """Freeing Python objects while it shuts down they would abort the process, now and then."""
    command = [sys.executable, "-c", PROGRAM, ending]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == code, done.stderr
    assert ("error: value: 3 is not even" in done.stderr) == (ending == "error")
    before, after = done.stdout.split()
    assert before == after


TIMEOUTS = """
import json
from datetime import timedelta
import torch
from emu3_megatron.parallel import platform
from emu3_megatron.parallel.config import ParallelConfig
from emu3_megatron.parallel.groups import initialize_parallel

machine = platform.install("cpu")
initialize_parallel(ParallelConfig(), machine, seed=0, timeout=timedelta(minutes=77))
groups = torch.distributed.distributed_c10d._world.pg_map
backends = {group.group_desc: group._get_backend(torch.device("cpu")) for group in groups}
print(json.dumps({name: backend.options._timeout.total_seconds() / 60 for name, backend in backends.items()}))
"""


def test_collectives_of_all_groups_wait_as_long_as_they_are_told() -> None:
    """Of the default group and of those that megatron-core makes; for experts it forgets, we have none."""
    done = subprocess.run(
        [sys.executable, "-c", TIMEOUTS], capture_output=True, text=True, check=False, timeout=100
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for name in ("default_pg", "TENSOR_MODEL_PARALLEL_GROUP", "DATA_PARALLEL_GROUP_WITH_CP_GLOO"):
        assert name in found
    assert {minutes for name, minutes in found.items() if "EXPERT" not in name} == {77.0}
