"""Captions from `transformers serve`, an OpenAI-compatible server of others, directly and across faults."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.curation.test_captions import SAMPLES, caption, config_for, manifest, rows
from tests.curation.vision_model import build

__all__ = ["manifest"]  # a fixture

PROXY = Path(__file__).parent / "faulty_proxy.py"
START_SECONDS = 240


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, Path]]:
    """Port and model of a running server."""
    model = tmp_path_factory.mktemp("served") / "model"
    build(model)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(model), "--device", "cpu"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--log-level", "error"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with open(model.with_name("log"), "w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        _wait_until_ready(process, port, model.with_name("log"))
        yield port, model
    finally:
        process.kill()
        process.wait()


def _wait_until_ready(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        try:
            if httpx.get(f"http://127.0.0.1:{port}/health").is_success:
                return
        except httpx.TransportError:
            time.sleep(0.2)
    pytest.fail(f"no answer in {START_SECONDS} s: {log.read_text()}")


@pytest.mark.slow
def test_every_sample_is_captioned_once_by_a_real_server(
    serving: tuple[int, Path], manifest: Path, tmp_path: Path
) -> None:
    port, model = serving
    settings = {"model": str(model), "max_tokens": 12, "concurrency": 2, "timeout": 120.0, "temperature": 0.0}
    direct = config_for(manifest, tmp_path / "direct", f"http://127.0.0.1:{port}/v1", **settings)
    assert caption(direct) == (len(SAMPLES), 2)
    captioned = {
        row["id"]: row["caption"] for row in rows(tmp_path / "direct" / "manifest.jsonl") if "caption" in row
    }
    assert set(captioned) == {*SAMPLES, "told"}
    assert all(text.strip() for text in captioned.values())
    assert len(set(captioned.values())) > 2  # the model saw the pictures

    log = tmp_path / "log"
    failures = ["500", "drop", "lost", "hang", "503"]
    proxy = subprocess.Popen(
        [sys.executable, str(PROXY), str(port), str(log), *failures], stdout=subprocess.PIPE, text=True
    )
    try:
        assert proxy.stdout is not None
        url = f"http://127.0.0.1:{proxy.stdout.readline().strip()}/v1"
        spoiled = config_for(manifest, tmp_path / "spoiled", url, **{**settings, "timeout": 90.0})
        assert caption(spoiled) == (len(SAMPLES), 2)
        ends = Counter((row["picture"], row["end"]) for row in rows(log))
        assert {end for _, end in ends} == {*failures, "ok"}
        assert [count for (_, end), count in ends.items() if end == "ok"] == [1] * len(SAMPLES)
        assert caption(spoiled) == (len(SAMPLES), 2)
        assert sum(ends.values()) == len(rows(log))  # the second run asked for nothing
    finally:
        proxy.kill()
        proxy.wait()
    for name in ("manifest.jsonl", "failures.jsonl"):
        assert (tmp_path / "direct" / name).read_bytes() == (tmp_path / "spoiled" / name).read_bytes()
