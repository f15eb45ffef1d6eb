"""What `tools/estimate.py` prints."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from emu3_megatron.errors import UserError
from emu3_megatron.training import command_line
from emu3_megatron.training.config import TrainingConfig
from emu3_megatron.training.data import TrainingData
from emu3_megatron.training.estimate import describe, readable
from emu3_megatron.training.step_time import Choice, Cluster, StepTime, search, step_time
from emu3_megatron.vocabulary import Vocabulary

ONE_PROCESS = (
    "--parallel.tensor_model_parallel_size=1",
    "--parallel.pipeline_model_parallel_size=1",
    "--parallel.virtual_pipeline_model_parallel_size=null",
    "--parallel.context_parallel_size=1",
    "--parallel.sequence_parallel=false",
    "--trainer.micro_batch_size=1",
)
"""Where a search starts."""


def predict(
    asked: Mapping[str, Any],
    training: Sequence[str],
    read: Callable[[Sequence[str]], TrainingConfig] = lambda given: command_line.parse(given).config,
) -> str:
    """Lines about a run on a cluster, or about its fastest layouts there; assumptions first.

    Args:
        asked: Options of `tools/estimate.py` by name.
        training: The rest of the command line, as training takes it.
        read: Makes a configuration of it.

    Raises:
        UserError: an option or the configuration is wrong, or no layout fits.
    """
    given = {field.name: asked.get(field.name) for field in fields(Cluster)}
    cluster = Cluster(**{name: value for name, value in given.items() if value is not None})
    processes = cluster.processes
    if asked["search"]:  # the layout of the file need not fit the cluster
        training, processes = [*training, *ONE_PROCESS], 1
    config = read([*training, "--world-size", str(processes)])
    if asked["vocabulary"]:
        vocabulary = Vocabulary.preset(asked["vocabulary"])
    elif (ready := TrainingData.vocabulary_if_ready(config.data)) is not None:
        vocabulary = ready
    else:
        raise UserError("the run's datasets do not exist yet; name a vocabulary preset by --vocabulary")
    length = asked["document_tokens"]
    lines = [_assumptions(cluster, length)]
    if asked["search"]:
        if config.platform == "auto":
            config = replace(config, platform="cuda")
        lines.append(f"platform          {config.platform}")
        found = search(config, cluster, vocabulary.size, vocabulary.padded_size, length)
        return "\n".join([*lines, *_listed(found[: asked["top"]], config, cluster)])
    time = step_time(config, cluster, vocabulary.size, length)
    sizes = (vocabulary.size, vocabulary.padded_size)
    lines.append(describe(config, cluster.processes, *sizes, document_tokens=length))
    return "\n".join([*lines, _time_line(time, config, cluster)])


def _assumptions(cluster: Cluster, length: float | None) -> str:
    documents = f"{length:,.0f} tokens" if length else "a whole window"
    return (
        f"assumed           {cluster.peak_tflops:g} TFLOP/s peak a device, {cluster.efficiency:.0%} of it "
        f"reached by kernels; {cluster.node_gbytes:g} GB/s inside a node of {cluster.devices_per_node}, "
        f"{cluster.network_gbytes:g} GB/s outside; collectives are not overlapped unless configured; "
        f"documents of {documents}"
    )


def _time_line(time: StepTime, config: TrainingConfig, cluster: Cluster) -> str:
    speed = config.trainer.global_batch_size * config.data.context_length / time.total
    return (
        f"time of a step    {time.total:.3g} s = compute {time.compute:.3g} + bubble {time.bubble:.3g} "
        f"+ tensor {time.tensor:.3g} + context {time.context:.3g} + data {time.data:.3g}; "
        f"{speed:,.0f} tokens/s, {speed / cluster.processes:,.0f} a device"
    )


def _listed(found: list[Choice], config: TrainingConfig, cluster: Cluster) -> list[str]:
    """A table of layouts."""
    if not found:
        raise UserError(
            f"no layout of {cluster.processes} devices with {cluster.memory_gib:g} GiB holds this run with "
            f"trainer.global_batch_size={config.trainer.global_batch_size}; take more devices, or change it"
        )
    lines = [
        f"{'TP':>3}{'PP':>4}{'VP':>4}{'CP':>4}{'DP':>5}{'micro':>7}  recompute{'memory':>12}{'step s':>9}"
    ]
    for choice in found:
        layout = choice.config.parallel
        lines.append(
            f"{layout.tensor_model_parallel_size:3}{layout.pipeline_model_parallel_size:4}"
            f"{layout.virtual_pipeline_model_parallel_size or 1:4}{layout.context_parallel_size:4}"
            f"{layout.data_parallel_size(cluster.processes):5}{choice.config.trainer.micro_batch_size:7}  "
            f"{choice.config.model.recompute:9}{readable(choice.memory.total):>12}{choice.time.total:9.3g}"
        )
    return lines
