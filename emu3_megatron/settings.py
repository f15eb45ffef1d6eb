"""Settings of a program: a dataclass filled from YAML and the command line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import TypeVar

from jsonargparse import ArgumentError, ArgumentParser

from emu3_megatron.errors import UserError, one_line

S = TypeVar("S")


def read_settings(kind: type[S], description: str | None, arguments: Sequence[str] | None = None) -> S:
    """Read ``--config FILE.yaml`` and ``--key value`` for every field of `kind`; later ones override.

    Args:
        kind: a dataclass, possibly of dataclasses.
        description: first lines of ``--help``.
        arguments: the command line; this process's where None.

    Raises:
        UserError: one line: an unknown key, a value of the wrong type, a missing file.
    """
    parser = ArgumentParser(description=description, exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file with the same keys as the options")
    parser.add_class_arguments(kind)
    try:
        values = parser.instantiate(parser.parse_args(arguments))
        return kind(**{field.name: values[field.name] for field in fields(kind)})  # type: ignore[arg-type]
    except (ArgumentError, TypeError, ValueError) as error:
        text = one_line(error)
        raise UserError(text if "--help" in text else f"{text}; `--help` lists every key") from error
