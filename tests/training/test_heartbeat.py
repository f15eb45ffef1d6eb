"""Heartbeats under the resiliency extension's launcher, which stands in here."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest

from emu3_megatron.training.callbacks import heartbeat


class Monitor:
    """Writes down what a rank says, as the extension's client takes it."""

    said: list[str]

    def __init__(self) -> None:
        Monitor.said = ["made"]

    def init_workload_monitoring(self) -> None:
        self.said.append("begins")

    def send_heartbeat(self) -> None:
        self.said.append("lives")

    def shutdown_workload_monitoring(self) -> None:
        self.said.append("ends")


@pytest.fixture
def extension(monkeypatch: pytest.MonkeyPatch) -> None:
    package: Any = types.ModuleType("nvidia_resiliency_ext")
    package.fault_tolerance = types.SimpleNamespace(RankMonitorClient=Monitor)
    monkeypatch.setitem(sys.modules, "nvidia_resiliency_ext", package)


def test_a_rank_beats_after_every_step_and_says_goodbye(extension: None) -> None:
    callback, anything = heartbeat.Heartbeat(), types.SimpleNamespace()
    callback.on_start(anything)
    for _ in range(3):
        callback.on_step(anything, anything)
    callback.close()
    callback.close()  # an error may close twice
    assert Monitor.said == ["made", "begins", "lives", "lives", "lives", "ends"]


def test_a_rank_that_never_started_closes_quietly() -> None:
    heartbeat.Heartbeat().close()


def test_only_the_launcher_of_the_extension_makes_ranks_beat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(heartbeat.MONITOR, raising=False)
    assert not heartbeat.is_monitored()
    monkeypatch.setenv(heartbeat.MONITOR, "/tmp/socket")
    assert heartbeat.is_monitored()
