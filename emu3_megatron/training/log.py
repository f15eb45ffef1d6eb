"""Messages of a run: one line each, on stderr, beside the progress bar."""

from __future__ import annotations

import logging
import sys

from tqdm import tqdm


class _BesideTheBar(logging.Handler):
    """Writes through tqdm, so that a message does not tear the bar."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def set_up() -> None:
    """Show the package's messages, each on a line of its own."""
    handler = _BesideTheBar()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname).1s %(message)s", "%H:%M:%S"))
    package = logging.getLogger("emu3_megatron")
    package.handlers = [handler]
    package.setLevel(logging.INFO)
    package.propagate = False
