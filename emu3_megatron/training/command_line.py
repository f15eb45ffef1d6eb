"""From a YAML file and dotted overrides to a checked configuration.

A mistake is one line: an unknown key, a value of the wrong type, a layout that cannot work.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Generic, TypeVar

import yaml
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from emu3_megatron.errors import EXIT_USER_ERROR, UserError, one_line
from emu3_megatron.training.config import TrainingConfig, require

RUN_ALIAS = "--run_folder"
"""Means ``--run``, which torchrun takes for an abbreviation of its own ``--run-path`` and refuses."""


FP8_TOKENS = 16
"""Rows and columns of an 8-bit matrix product come in multiples of it."""

CAPABILITIES = "--capabilities"
"""Asks for a report that needs no configuration."""


C = TypeVar("C", bound=TrainingConfig)


@dataclass(frozen=True)
class CommandLine(Generic[C]):
    """What was asked for."""

    config: C
    dry_run: bool
    """Print the configuration and its arithmetic, and end."""
    world_size: int
    """Processes: as started, as given for a dry run, or those of one copy of the model."""


def parse(arguments: Sequence[str]) -> CommandLine[TrainingConfig]:
    """`parse_as` of the plain configuration."""
    return parse_as(TrainingConfig, arguments)


def parse_as(kind: type[C], arguments: Sequence[str], *, started: bool = True) -> CommandLine[C]:
    """Read arguments and the files they name; check every section, alone and against the others.

    Args:
        kind: The configuration to fill: `TrainingConfig`, or one with sections of its own.
        arguments: The command line.
        started: Whether this is one of the run's processes. Where it is not, but plans the run or looks at
            it, the layout is checked for one copy of the model.

    Raises:
        UserError: one line with the key or value, the rule, the remedy.
    """
    parser = build_parser(kind)
    try:
        values = parser.parse_args([_without_alias(argument) for argument in arguments])
        values = parser.instantiate(values)
    except (ArgumentError, TypeError, ValueError) as error:
        raise UserError(_readable(error)) from error
    fields = {name: getattr(values, name) for name in kind.__dataclass_fields__}
    config = kind(**fields)
    here = int(os.environ.get("WORLD_SIZE", "1")) if started else config.parallel.model_parallel_size
    world_size = values.world_size or here
    check_layout(config, world_size)
    return CommandLine(config=config, dry_run=values.dry_run, world_size=world_size)


def build_parser(kind: type[TrainingConfig] = TrainingConfig) -> ArgumentParser:
    """The parser: ``--config FILE``, every field as ``--section.key VALUE``, and two options of its own."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog="python -m emu3_megatron.training",
        description="Train. Start it under torchrun for more than one process.",
        exit_on_error=False,
        allow_abbrev=False,  # a mistyped key must not pass for the one it begins
    )
    parser.add_argument("--config", action="config", help="YAML file; later options override it")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the resolved configuration and its arithmetic"
    )
    parser.add_argument(
        CAPABILITIES, action="store_true", help="print what this machine has for training, and end"
    )
    parser.add_argument("--world-size", type=int, default=0, help="processes to assume in a dry run")
    parser.add_class_arguments(kind)
    return parser


def check_layout(config: TrainingConfig, world_size: int) -> None:
    """Check what depends on the number of processes, and what sections must agree on.

    Raises:
        ValueError: naming the first rule that is broken.
    """
    parallel, trainer, data = config.parallel, config.trainer, config.data
    config.model.validate(parallel)
    ranks = parallel.data_parallel_size(world_size)
    share = ranks * trainer.micro_batch_size
    require(
        trainer.global_batch_size % share == 0,
        f"trainer.global_batch_size={trainer.global_batch_size} is not divisible by data-parallel size x "
        f"micro_batch_size = {ranks} x {trainer.micro_batch_size} = {share}; change one of them",
    )
    if trainer.initial_batch_size is not None:
        for name, size in (
            ("initial_batch_size", trainer.initial_batch_size),
            ("batch_increment", trainer.batch_growth),
        ):
            require(
                size % share == 0,
                f"trainer.{name}={size} is not divisible by data-parallel size x micro_batch_size = {share}; "
                f"change one of them",
            )
    alignment = alignment_of(config)
    split = 2 * parallel.context_parallel_size if parallel.context_parallel_size > 1 else 1
    require(
        alignment % split == 0,
        f"data.alignment={alignment} must be a multiple of 2 x context_parallel_size = {split}; leave it out",
    )
    pieces = split * (parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1)
    require(
        data.context_length % max(alignment, pieces) == 0,
        f"data.context_length={data.context_length} is not divisible by "
        f"{max(alignment, pieces)}, which context and "
        f"sequence parallelism and data.alignment ask for; change it",
    )
    require(
        data.context_length <= config.model.max_position_embeddings,
        f"data.context_length={data.context_length} exceeds model.max_position_embeddings="
        f"{config.model.max_position_embeddings}; raise the latter",
    )
    _check_combinations(config, ranks)


def _check_combinations(config: TrainingConfig, ranks: int) -> None:
    parallel, trainer = config.parallel, config.trainer
    stages = parallel.pipeline_model_parallel_size
    sizes = [trainer.global_batch_size, trainer.initial_batch_size or 0, trainer.batch_growth]
    for size in sizes:
        micro_batches = size // (ranks * trainer.micro_batch_size)
        require(
            parallel.virtual_pipeline_model_parallel_size is None or micro_batches % stages == 0,
            f"an interleaved pipeline of {stages} stages needs a multiple of {stages} "
            f"micro-batches, not {micro_batches}; "
            f"change trainer.global_batch_size or trainer.micro_batch_size",
        )
    tokens = trainer.micro_batch_size * config.data.context_length // parallel.context_parallel_size
    if parallel.sequence_parallel:
        tokens //= parallel.tensor_model_parallel_size
    require(
        trainer.fp8 == "off" or tokens % FP8_TOKENS == 0,
        f"trainer.fp8={trainer.fp8} needs a multiple of {FP8_TOKENS} tokens of a micro-batch on a rank, not "
        f"{tokens}; change data.context_length",
    )
    require(
        not config.samples.interval or (stages == 1 and not config.optimizer.overlap_param_gather),
        "samples.interval needs the whole model after each step: "
        "pipeline_model_parallel_size=1 and no optimizer.overlap_param_gather; set it to 0",
    )
    require(
        not (config.ema.decay and config.optimizer.overlap_param_gather),
        "ema.decay needs whole parameters after each step, which "
        "optimizer.overlap_param_gather gathers later; "
        "switch one off",
    )


def alignment_of(config: TrainingConfig) -> int:
    """Tokens that documents are padded to a multiple of: as set, or what context parallelism needs."""
    if config.data.alignment is not None:
        return config.data.alignment
    context = config.parallel.context_parallel_size
    return 2 * context if context > 1 else 1


def to_yaml(config: TrainingConfig) -> str:
    """The resolved configuration, every field written out; `--config` reads it back."""
    return yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True)


def parse_once(kind: type[C], arguments: Sequence[str]) -> CommandLine[C]:
    """`parse_as`, where of torchrun's processes, which share one output, only the first reports a mistake.

    Processes that another launcher started (``srun`` in the SLURM scripts) write a log each, and report each.
    """
    try:
        return parse_as(kind, arguments)
    except ValueError:
        if os.environ.get("RANK", "0") == "0" or "TORCHELASTIC_RUN_ID" not in os.environ:
            raise
        sys.exit(EXIT_USER_ERROR)


def _without_alias(argument: str) -> str:
    name, equals, value = argument.partition("=")
    return f"--run{equals}{value}" if name == RUN_ALIAS else argument


def _readable(error: Any) -> str:
    """A parser's error as one line that says what to do."""
    text = one_line(error)
    return text if "--help" in text else f"{text}; `--help` lists every key"
