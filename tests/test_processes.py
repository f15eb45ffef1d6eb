"""How a process leaves the others."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import os
import torch
from emu3_megatron import processes

def threads():
    return len(os.listdir("/proc/self/task"))

before = threads()
processes.join("gloo")
weight = torch.ones(3, requires_grad=True)
optimizer = torch.optim.AdamW([weight])
weight.sum().backward()
optimizer.step()  # imports a great deal, some of which takes hold of the default group
torch.distributed.all_gather_object([None], "hello")
assert threads() > before
processes.leave()
print(threads() - before)
"""


def test_no_thread_of_a_group_is_left_after_a_training_step() -> None:
    """A thread that is left aborts the process at its end, now and then."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False, timeout=100
    )
    assert done.stdout == "0\n", done.stderr
