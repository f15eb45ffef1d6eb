"""Learning rate as a pure function of the step."""

from __future__ import annotations

import math

from emu3_megatron.training.config import OptimizerConfig

WSD_DECAY_SHARE = 10
"""The final decay of `wsd` takes one part in this many of the run, where the config does not say."""


def learning_rate(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """Learning rate of optimizer step `step`.

    Args:
        config: Peak, minimum, shape and lengths.
        step: The step about to be taken, counted from 0; step 0 has a rate above zero.
        total_steps: Steps of the whole run; the last one, ``total_steps - 1``, has the minimum rate for every
            shape but `constant`.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    span = config.learning_rate - config.min_learning_rate
    return config.min_learning_rate + span * _remaining(config, step, total_steps)


def _remaining(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """Height of the schedule above its minimum, 1 at the peak and 0 at the end."""
    last = total_steps - 1
    start = config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "wsd":
        decay = config.decay_steps or max(1, total_steps // WSD_DECAY_SHARE)
        start = max(start, last - decay)
    done = min(1.0, max(0.0, (step - start) / max(1, last - start)))
    return 0.5 * (1.0 + math.cos(math.pi * done)) if config.schedule == "cosine" else 1.0 - done
