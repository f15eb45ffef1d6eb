"""Errors that a user can cause, and how the command-line programs show them."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from typing import NoReturn

EXIT_USER_ERROR = 2
"""Exit code of a program stopped by something the user can put right."""

EXIT_MACHINE_FAULT = 1
"""Exit code of a program stopped by its machine: started again, or elsewhere, it may go on."""

SHOW_TRACEBACK = "EMU3_TRACEBACK"
"""Environment variable: when set and not empty, `run_main` lets the exception pass with its traceback."""

NOT_FOR_USERS: tuple[tuple[str, type[Warning], str], ...] = (
    (".*Falling back to", UserWarning, r"megatron\.core"),
    ("full scope is deprecated", UserWarning, r"megatron\.core"),
    (r"The \.grad attribute of a Tensor that is not a leaf", UserWarning, r"megatron\.core"),
    ("Creating a tensor from a list of numpy.ndarrays", UserWarning, r"megatron\.core"),
    ("", FutureWarning, r"megatron\.core"),
    ("", FutureWarning, r"torch\.distributed"),
)
"""Message, category, module: what megatron-core says of its own ways and of optional packages. `run_main`
hides these in every program, and nothing else."""


class UserError(ValueError):
    """Something the user can put right; one clear line with the value seen, the rule and the remedy."""


class MachineFault(OSError):
    """Memory, a GPU or a disk that failed, however often it was tried; no file and no setting is to blame."""


def one_line(error: BaseException) -> str:
    """The message of `error` on one line; its class name where it has no message."""
    return " ".join(str(error).split()) or type(error).__name__


def run_main(main: Callable[[], None]) -> None:
    """Run a program's `main`; turn a user's error into one line on stderr and exit code 2.

    `MachineFault` is one line too, with exit code 1: job scripts start that again. `ValueError` (so
    `UserError`) and `OSError` (a missing file, a full disk) are taken as the user's; anything else is a
    defect of ours and keeps its traceback, and so does every error where the environment variable
    ``EMU3_TRACEBACK`` is set. An interrupt exits with 130, as shells expect.
    """
    for message, category, module in NOT_FOR_USERS:
        warnings.filterwarnings("ignore", message, category, module)
    if os.environ.get(SHOW_TRACEBACK):
        main()
        return
    try:
        main()
    except BrokenPipeError:
        _leave_broken_pipe()
    except MachineFault as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(EXIT_MACHINE_FAULT)
    except (ValueError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    except KeyboardInterrupt:
        sys.exit(130)


def _leave_broken_pipe() -> NoReturn:
    """End quietly when the reader of stdout (``| head``) has gone."""
    # Python would flush stdout at exit and complain a second time.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(0)
