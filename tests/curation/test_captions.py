"""Captions from a real server process that fails in every way, and from a model of ours."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emu3_megatron.curation.captions import (
    CaptionAnswer,
    CaptionError,
    CaptionJob,
    CaptionRequest,
    Journal,
    piece_count,
)
from emu3_megatron.curation.config import CaptionConfig
from emu3_megatron.curation.server import RateLimiter, ServerCaptioner
from emu3_megatron.errors import UserError
from tests.curation.corpus import pan, save, write_manifest
from tests.media.clips import encode

Start = Callable[..., tuple[str, Path]]
SERVER = Path(__file__).parent / "caption_server.py"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Start]:
    """Starts servers: failures in, address and log out."""
    processes: list[subprocess.Popen[str]] = []

    def start(*failures: str) -> tuple[str, Path]:
        log = tmp_path / f"log-{len(processes)}"
        command = [sys.executable, str(SERVER), str(log), *failures]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        assert processes[-1].stdout is not None
        return f"http://127.0.0.1:{processes[-1].stdout.readline().strip()}/v1", log

    yield start
    for process in processes:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 images, a clip, a long clip, a text, a captioned image, and two bad entries."""
    folder = tmp_path_factory.mktemp("raw")
    generator = np.random.default_rng(0)
    records: list[dict[str, Any]] = []
    for i in range(20):
        save(folder / f"{i}.png", generator.integers(0, 256, (30 + i, 40, 3), dtype=np.uint8))
        records.append({"id": f"image {i}", "image": f"{i}.png"})
    encode(folder / "clip.mp4", pan("coffee.png", 36), rate=12)
    encode(folder / "long.mp4", pan("astronaut.png", 60), rate=2)
    records += [
        {"id": "clip", "video": "clip.mp4"},
        {"id": "long", "video": "long.mp4"},
        {"id": "text", "text": "a text"},
        {"id": "told", "image": "0.png", "caption": "there already"},
        {"id": "gone", "image": "none.png"},
        {"id": "no clip", "video": "manifest.jsonl"},
    ]
    return write_manifest(folder / "manifest.jsonl", records)


SAMPLES = [f"image {i}" for i in range(20)] + ["clip", "long#0.00-15.00", "long#15.00-30.00"]
"""What is to be captioned."""


def config_for(manifest: Path, output: Path, url: str, **settings: Any) -> CaptionConfig:
    defaults: dict[str, Any] = {"concurrency": 4, "first_wait": 0.01, "timeout": 10.0, "progress": False}
    return CaptionConfig(manifest=(manifest,), output=output, url=url, **{**defaults, **settings})


def caption(config: CaptionConfig) -> tuple[int, int]:
    return CaptionJob(config, ServerCaptioner(config)).run()


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def answered(log: Path) -> Counter[str]:
    """How often each picture was answered."""
    return Counter(row["picture"] for row in rows(log) if row["end"] == "ok")


def test_every_sample_is_captioned_once_or_listed(server: Start, manifest: Path, tmp_path: Path) -> None:
    url, log = server("500", "hang", "drop", "429", "503")
    assert caption(config_for(manifest, tmp_path / "out", url)) == (len(SAMPLES), 2)
    captioned = {row["id"]: row for row in rows(tmp_path / "out" / "manifest.jsonl")}
    assert list(captioned) == [*SAMPLES, "text", "told"]
    assert [row["id"] for row in rows(tmp_path / "out" / "failures.jsonl")] == ["gone", "no clip"]
    assert {row["end"] for row in rows(log)} == {"500", "hang", "drop", "429", "503", "ok"}
    assert set(answered(log).values()) == {1}
    assert len(answered(log)) == len(SAMPLES)
    assert captioned["told"]["caption"] == "there already"
    assert captioned["clip"]["caption"].startswith("12 pictures")
    assert (captioned["long#15.00-30.00"]["start"], captioned["long#15.00-30.00"]["end"]) == (15.0, 30.0)
    assert len({row["caption"] for name, row in captioned.items() if name in SAMPLES}) == len(SAMPLES)
    assert (tmp_path / "out" / captioned["image 3"]["image"]).exists()


def test_a_rerun_pays_for_nothing_and_a_new_prompt_for_all(
    server: Start, manifest: Path, tmp_path: Path
) -> None:
    url, log = server()
    config = config_for(manifest, tmp_path / "out", url, frames=8)
    caption(config)
    first = (tmp_path / "out" / "manifest.jsonl").read_bytes()
    assert {row["pictures"] for row in rows(log)} == {1, 8}
    caption(config)
    assert len(rows(log)) == len(SAMPLES)
    assert (tmp_path / "out" / "manifest.jsonl").read_bytes() == first
    (tmp_path / "prompt.txt").write_text("Say what you see.")
    caption(config_for(manifest, tmp_path / "out", url, frames=8, image_prompt=tmp_path / "prompt.txt"))
    assert len(rows(log)) == len(SAMPLES) + 20
    caption(config_for(manifest, tmp_path / "out", url, frames=8, max_edge=24))
    assert max(max(size) for row in rows(log)[-len(SAMPLES) :] for size in row["sizes"]) == 24


def test_several_captions_are_kept_or_all_replaced(server: Start, tmp_path: Path) -> None:
    url, log = server()
    save(tmp_path / "a.png", np.zeros((30, 40, 3), dtype=np.uint8))
    record = {"id": "a", "image": "a.png", "captions": ["one", "two"]}
    manifest = write_manifest(tmp_path / "manifest.jsonl", [record])
    assert caption(config_for(manifest, tmp_path / "out", url)) == (0, 0)
    (kept,) = rows(tmp_path / "out" / "manifest.jsonl")
    assert kept["captions"] == ["one", "two"]
    assert caption(config_for(manifest, tmp_path / "out", url, replace=True)) == (1, 0)
    (replaced,) = rows(tmp_path / "out" / "manifest.jsonl")
    assert replaced["caption"]
    assert "captions" not in replaced
    assert len(rows(log)) == 1


def test_what_never_succeeds_is_listed_and_tried_again(server: Start, manifest: Path, tmp_path: Path) -> None:
    url, log = server("500", "500", "500", "400")
    config = config_for(manifest, tmp_path / "out", url, retries=1)
    assert caption(config) == (0, len(SAMPLES) + 2)
    listed = {row["id"]: row["reason"] for row in rows(tmp_path / "out" / "failures.jsonl")}
    assert listed.keys() == {*SAMPLES, "gone", "no clip"}
    assert "2 tries" in listed["clip"]
    assert "status 500" in listed["clip"]
    assert caption(config) == (0, len(SAMPLES) + 2)  # 500, then 400, which is not tried again
    assert caption(config) == (len(SAMPLES), 2)
    assert set(answered(log).values()) == {1}


@pytest.mark.parametrize(
    ("failure", "message"), [("401", "check url, model and key"), ("404", "refuses all")]
)
def test_what_stops_all_stops_the_job(
    server: Start, manifest: Path, tmp_path: Path, failure: str, message: str
) -> None:
    url, log = server(failure)
    with pytest.raises(UserError, match=message):
        caption(config_for(manifest, tmp_path / "out", url))
    assert len(rows(log)) < 12


def test_a_server_that_is_not_there(manifest: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not answer"):
        caption(config_for(manifest, tmp_path / "out", "http://127.0.0.1:9/v1", retries=1))


def test_an_answer_without_a_caption_is_a_failure(server: Start, manifest: Path, tmp_path: Path) -> None:
    url, _ = server("garbage")
    assert caption(config_for(manifest, tmp_path / "out", url))[1] == len(SAMPLES) + 2


def trickle(listener: socket.socket, ended: threading.Event) -> None:
    """A server that sends a byte of its answer now and then, and never all of it."""
    while not ended.is_set():
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            continue
        with connection, suppress(OSError):
            connection.recv(1 << 16)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
            for _ in range(100):
                if ended.wait(0.1):
                    break
                connection.sendall(b" ")


def test_an_answer_that_trickles_in_without_end_is_given_up(tmp_path: Path) -> None:
    """Every read is in time, and all of them together are not."""
    ended = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.2)
        server = threading.Thread(target=trickle, args=(listener, ended), daemon=True)
        server.start()
        try:
            url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
            captioner = ServerCaptioner(
                config_for(tmp_path / "none", tmp_path, url, model="m", timeout=1.0, retries=0)
            )
            request = CaptionRequest("image", [np.zeros((8, 8, 3), np.uint8)], "what is it?")
            (answer,) = captioner([request])
        finally:
            ended.set()
            server.join(10)
    assert isinstance(answer, CaptionError)
    assert "no whole answer in 1 s" in str(answer)


PROGRAM = """
import sys
from pathlib import Path
from tests.curation.test_captions import caption, config_for
caption(config_for(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], requests_per_minute=900))
"""


@pytest.mark.slow
def test_kills_lose_only_what_is_in_flight(server: Start, manifest: Path, tmp_path: Path) -> None:
    url, log = server("500")
    command = [sys.executable, "-c", PROGRAM, str(manifest), str(tmp_path / "out"), url]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    kills = 0
    for seed in range(3):
        seen = len(rows(log)) if log.exists() else 0
        process = subprocess.Popen(command, env=environment, start_new_session=True)
        while process.poll() is None and (len(rows(log)) if log.exists() else 0) <= seen:
            time.sleep(0.02)
        time.sleep(random.Random(seed).uniform(0, 0.6))
        kills += process.poll() is None
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    subprocess.run(command, env=environment, check=True)
    counts = answered(log)
    assert len(counts) == len(SAMPLES)
    assert sum(counts.values()) <= len(SAMPLES) + 4 * kills
    undisturbed = config_for(manifest, tmp_path / "other", url)
    caption(undisturbed)
    names = ("manifest.jsonl", "failures.jsonl")
    assert [(tmp_path / "out" / n).read_bytes() for n in names] == [
        (tmp_path / "other" / n).read_bytes() for n in names
    ]


def test_the_rate_limit_spaces_requests(server: Start, manifest: Path, tmp_path: Path) -> None:
    """The property is a count of requests over a span of time, which a slow machine only lengthens."""
    now = [0.0]
    limiter = RateLimiter(120, clock=lambda: now[0])
    assert [limiter.reserve() for _ in range(3)] == [0.0, 0.5, 1.0]
    now[0] = 10.0
    assert [limiter.reserve() for _ in range(2)] == [0.0, 0.5]
    url, log = server()
    caption(config_for(manifest, tmp_path / "out", url, requests_per_minute=1200))
    times = [row["time"] for row in rows(log)]
    assert max(times) - min(times) >= 0.9 * (len(SAMPLES) - 1) * 60 / 1200


@settings(deadline=None)
@given(st.binary(max_size=30), st.integers(0, 200))
def test_a_cut_journal_keeps_its_whole_lines(
    tmp_path_factory: pytest.TempPathFactory, tail: bytes, size: int
) -> None:
    path = tmp_path_factory.mktemp("journal") / "journal.jsonl"
    journal = Journal(path)
    for i in range(4):
        journal.add({"key": str(i), "id": str(i), "caption": "一 b"})
    journal.close()
    whole = path.read_bytes()
    path.write_bytes(whole[:size] + (b"" if size < len(whole) else tail.replace(b"\n", b"")))
    journal = Journal(path)
    kept = [i for i in range(4) if journal.get(str(i))]
    assert kept == list(range(whole[:size].count(b"\n")))
    journal.add({"key": "new", "id": "new", "caption": "c"})
    journal.close()
    journal = Journal(path)
    assert [i for i in range(4) if journal.get(str(i))] == kept
    assert journal.get("new")
    journal.close()


OTHER = """
import sys
from pathlib import Path
from emu3_megatron.curation.captions import Journal
from emu3_megatron.errors import UserError
try:
    Journal(Path(sys.argv[1])).add({"key": "b", "id": "b", "caption": "other"})
except UserError as error:
    sys.exit(str(error))
"""


def test_two_processes_do_not_write_one_journal(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    command = [sys.executable, "-c", OTHER, str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    journal = Journal(path)
    journal.add({"key": "a", "id": "a", "caption": "one"})
    other = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert other.returncode
    assert "another process captions into this folder" in other.stderr
    journal.add({"key": "c", "id": "c", "caption": "two"})
    with pytest.raises(UserError, match="another process"):
        Journal(path)
    journal.close()
    subprocess.run(command, env=environment, check=True)
    assert [row["key"] for row in rows(path)] == ["a", "c", "b"]


def test_a_damaged_journal_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_bytes(
        b'{"key": "a", "id": "a", "caption": "b"}\ngarbage\n{"key": "b", "id": "b", "caption": "c"}\n'
    )
    with pytest.raises(UserError, match="damaged at byte 40"):
        Journal(path)


@settings(deadline=None)
@given(st.floats(0.1, 500), st.floats(1, 60))
def test_pieces_are_of_half_to_all_of_the_limit(seconds: float, longest: float) -> None:
    pieces = piece_count(seconds, longest)
    assert seconds / pieces <= longest + 1e-5
    assert pieces == 1 or seconds / pieces >= longest / 2 - 1e-5


def test_bad_settings_have_one_clear_line(manifest: Path, tmp_path: Path) -> None:
    for change, message in (
        ({"url": None}, "either `url`"),
        ({"checkpoint": tmp_path}, "either `url`"),
        ({"frames": 0}, "frames=0"),
        ({"requests_per_minute": 0.0}, "must be positive"),
    ):
        with pytest.raises(UserError, match=message):
            config_for(manifest, tmp_path / "out", **{"url": "http://x/v1", **change})
    (tmp_path / "blank.txt").write_text(" \n")
    config = config_for(manifest, tmp_path / "out", "http://x/v1", image_prompt=tmp_path / "blank.txt")
    with pytest.raises(UserError, match="the prompt is empty"):
        CaptionJob(config, Recorder())


class Recorder:
    """A captioner in this process."""

    name, concurrency, batch_size = "recorder", 1, 7

    def __init__(self) -> None:
        self.requests: list[CaptionRequest] = []

    def __call__(self, requests: Any) -> list[CaptionAnswer]:
        assert len(requests) <= self.batch_size
        self.requests += requests
        return [CaptionAnswer(f"caption of {request.pictures[0].shape}") for request in requests]


def test_any_captioner_will_do(manifest: Path, tmp_path: Path) -> None:
    recorder = Recorder()
    config = config_for(manifest, tmp_path / "out", "http://x/v1", frames=4)
    assert CaptionJob(config, recorder).run() == (len(SAMPLES), 2)
    clip, first, second = recorder.requests[-3:]
    assert [len(request.pictures) for request in (clip, first, second)] == [4, 4, 4]
    assert [request.seconds for request in (clip, first, second)] == pytest.approx([3.0, 15.0, 15.0])
    assert not np.array_equal(first.pictures[-1], second.pictures[0])


def test_a_part_may_be_open_at_either_end(manifest: Path, tmp_path: Path) -> None:
    """`null`, as other programs write what is absent, is absent."""
    clip = str(manifest.parent / "clip.mp4")
    parts = {"all": (None, None), "tail": (1.0, None), "head": (None, 1.5)}
    records = [{"id": name, "video": clip, "start": a, "end": b} for name, (a, b) in parts.items()]
    records.append({"id": "bad", "video": clip, "start": "1"})
    recorder = Recorder()
    config = config_for(write_manifest(tmp_path / "m.jsonl", records), tmp_path / "out", "http://x/v1")
    assert CaptionJob(config, recorder).run() == (3, 1)
    assert [request.seconds for request in recorder.requests] == pytest.approx([3.0, 2.0, 1.5])
    (failure,) = rows(tmp_path / "out" / "failures.jsonl")
    assert "number of seconds" in failure["reason"]
