"""Heartbeats for NVIDIA's resiliency extension, where its launcher started the run."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from emu3_megatron.training.callbacks.base import Callback
from emu3_megatron.training.metrics import StepReport

if TYPE_CHECKING:
    from emu3_megatron.training.trainer import Trainer

MONITOR = "FT_RANK_MONITOR_IPC_SOCKET"
"""Variable by which ``ft_launcher`` tells a rank where its monitor listens."""


def is_monitored() -> bool:
    """Whether ``ft_launcher`` (nvidia-resiliency-ext) started this process."""
    return MONITOR in os.environ


class Heartbeat(Callback):
    """Tells the rank's monitor after every step that it lives.

    The monitor ends a rank whose heart stops, and the launcher starts all ranks again, without giving the
    nodes back; the run then goes on from its newest checkpoint.
    """

    def __init__(self) -> None:
        self._client: Any = None

    def on_start(self, trainer: Trainer) -> None:
        """Register with the monitor."""
        from nvidia_resiliency_ext import fault_tolerance

        self._client = fault_tolerance.RankMonitorClient()
        self._client.init_workload_monitoring()

    def on_step(self, trainer: Trainer, report: StepReport) -> None:
        """One beat."""
        self._client.send_heartbeat()

    def close(self) -> None:
        """Say goodbye, so that the end of a run is no failure."""
        if self._client is not None:
            self._client.shutdown_workload_monitoring()
            self._client = None
