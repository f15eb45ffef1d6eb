"""How programs end: exit codes, and nothing left behind that could change them."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import sys
import torch.distributed as dist
from emu3_megatron.errors import UserError, run_main

def main():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    dist.all_gather_object([None], "hello")
    if sys.argv[1] == "error":
        raise UserError("value: 3 is not even; give an even one")

try:
    run_main(main)
finally:
    print("open" if dist.is_initialized() else "closed")
"""


@pytest.mark.parametrize(
    ("ending", "code", "said"), [("well", 0, ""), ("error", 2, "error: value: 3 is not even")]
)
def test_a_process_group_left_open_is_closed(ending: str, code: int, said: str) -> None:
    """Its threads would free Python objects while the interpreter shuts down: exit code 134, now and then."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, ending], capture_output=True, text=True, check=False, timeout=100
    )
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert done.stdout.split() == ["closed"]
