"""Messages of a run: one line each, on stderr, beside the progress bar."""

from __future__ import annotations

import logging
import sys
import warnings

from tqdm import tqdm

NOT_FOR_USERS = (
    ".*Falling back to.*",
    ".*full scope is deprecated.*",
    r".*\.grad attribute of a Tensor that is not a leaf.*",
    ".*Creating a tensor from a list of numpy.ndarrays.*",
)
"""Warnings of megatron-core about its own ways, or about optional packages."""


class _BesideTheBar(logging.Handler):
    """Writes through tqdm, so that a message does not tear the bar."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def set_up() -> None:
    """Show the package's messages; keep megatron-core's notes on what is not installed out of the way."""
    for message in NOT_FOR_USERS:
        warnings.filterwarnings("ignore", message=message)
    warnings.filterwarnings("ignore", category=FutureWarning)
    handler = _BesideTheBar()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname).1s %(message)s", "%H:%M:%S"))
    package = logging.getLogger("emu3_megatron")
    package.handlers = [handler]
    package.setLevel(logging.INFO)
    package.propagate = False
