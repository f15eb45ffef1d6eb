"""Every layout of two and four processes that training is held against one process with."""

from __future__ import annotations

from pathlib import Path

from tests.training import runs

FIRST_STEP = 1e-5
"""Largest relative difference of losses and gradient norm at the first step, fp32."""
ALL_STEPS = 1e-4
"""The same over 20 steps."""

FLAGS = {
    "tp": "--parallel.tensor_model_parallel_size",
    "pp": "--parallel.pipeline_model_parallel_size",
    "cp": "--parallel.context_parallel_size",
    "vpp": "--parallel.virtual_pipeline_model_parallel_size",
    "sp": "--parallel.sequence_parallel",
    "comm": "--parallel.cp_comm",
    "last": "--parallel.layers_in_last_stage",
    "reduce": "--optimizer.overlap_grad_reduce",
    "gather": "--optimizer.overlap_param_gather",
}

TWO: dict[str, dict[str, object]] = {
    "dp2": {},
    "tp2": {"tp": 2},
    "tp2-sp": {"tp": 2, "sp": "true"},
    "pp2": {"pp": 2},
    "pp2-interleaved": {"pp": 2, "vpp": 2},
    "pp2-uneven": {"pp": 2, "last": 1},
    "cp2": {"cp": 2},
    "cp2-a2a": {"cp": 2, "comm": "a2a"},
    "dp2-overlap": {"reduce": "true", "gather": "true"},
}
"""Layouts of two processes; what is left is data parallel."""

FOUR: dict[str, dict[str, object]] = {
    "dp4": {},
    "tp4": {"tp": 4},
    "tp4-sp": {"tp": 4, "sp": "true"},
    "pp4": {"pp": 4},
    "pp4-interleaved": {"pp": 4, "vpp": 2},
    "cp4": {"cp": 4},
    "cp4-a2a": {"cp": 4, "comm": "a2a"},
    "tp2-dp2-sp": {"tp": 2, "sp": "true"},
    "pp2-dp2": {"pp": 2},
    "cp2-dp2": {"cp": 2},
    "tp2-pp2": {"tp": 2, "pp": 2},
    "tp2-pp2-sp": {"tp": 2, "pp": 2, "sp": "true"},
    "tp2-pp2-interleaved-sp": {"tp": 2, "pp": 2, "vpp": 2, "sp": "true"},
    "tp2-cp2": {"tp": 2, "cp": 2},
    "tp2-cp2-sp": {"tp": 2, "cp": 2, "sp": "true"},
    "tp2-cp2-a2a-sp": {"tp": 2, "cp": 2, "comm": "a2a", "sp": "true"},
    "pp2-cp2": {"pp": 2, "cp": 2},
    "pp2-cp2-interleaved": {"pp": 2, "cp": 2, "vpp": 2},
}
"""Layouts of four processes."""


def options(layout: dict[str, object], *, distributed_optimizer: bool) -> list[str]:
    """Command-line arguments of a layout."""
    chosen = [part for name, value in layout.items() for part in (FLAGS[name], str(value))]
    return [*chosen, "--optimizer.use_distributed_optimizer", str(distributed_optimizer).lower()]


def differences(run: Path, reference: Path) -> tuple[float, float]:
    """Largest relative difference from one process: at the first step, and over all steps.

    Of the loss, its parts by class, and the gradient norm; counts must be equal, or the answer is infinite.
    """
    lines, expected = runs.metrics(run), runs.metrics(reference)
    if [line["step"] for line in lines] != list(range(1, runs.STEPS + 1)):
        return float("inf"), float("inf")
    for key in ("tokens_vision", "tokens_text", "padding_fraction", "windows"):
        if runs.largest_difference(lines, expected, key) != 0:
            return float("inf"), float("inf")
    keys = ("loss", "loss_text", "loss_vision", "grad_norm")
    first, every = (
        max(runs.largest_difference(part, expected, key) for key in keys) for part in (lines[:1], lines)
    )
    return first, every
