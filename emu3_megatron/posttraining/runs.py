"""Runs of any kind as their configuration describes them, for programs that start none of their processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from emu3_megatron.data import Plan
from emu3_megatron.posttraining.preferences.config import PreferenceTrainingConfig
from emu3_megatron.posttraining.preferences.windows import PAIRS
from emu3_megatron.training import command_line
from emu3_megatron.training.config import TrainingConfig
from emu3_megatron.training.data import PACKED, Reading, open_plan

SECTION = "dpo"
"""What a configuration of preference training has, and no other."""


@dataclass(frozen=True)
class DescribedRun:
    """A run that is not started."""

    config: TrainingConfig
    """Of its kind."""
    reading: Reading
    """How its documents become windows."""

    def open_plan(self) -> Plan:
        """The order of its windows, see `training.data.open_plan`."""
        return open_plan(self.config, self.reading)


def describe_run(arguments: Sequence[str]) -> DescribedRun:
    """Read a configuration of training, or of preference training where it has that section.

    Args:
        arguments: As of ``python -m emu3_megatron.training``. The layout is checked for one copy of the
            model, whatever number of processes this one is of.

    Raises:
        UserError: one line with the key or value, the rule, the remedy.
    """
    preferences = any(argument.startswith(f"--{SECTION}.") for argument in arguments) or any(
        SECTION in contents for contents in _files(arguments)
    )
    kind, reading = (PreferenceTrainingConfig, PAIRS) if preferences else (TrainingConfig, PACKED)
    return DescribedRun(command_line.parse_as(kind, arguments, started=False).config, reading)


def _files(arguments: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Contents of the configuration files that can be read; the parser says what is wrong with others."""
    for place, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name != "--config" or (not equals and place + 1 == len(arguments)):
            continue
        try:
            contents = yaml.safe_load(Path(value if equals else arguments[place + 1]).read_bytes())
        except (OSError, yaml.YAMLError):
            continue
        if isinstance(contents, dict):
            yield contents
