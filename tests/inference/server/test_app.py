"""The server's interfaces: answers, refusals, limits, clients that go away."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import math
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from starlette.testclient import TestClient

from emu3_megatron.inference import Generator, Sampling
from emu3_megatron.inference.server.app import create_app
from emu3_megatron.inference.server.limits import Limits
from emu3_megatron.media import load_clip, write_mp4
from tests.inference.server.conftest import LIMITS

IMAGES, CHAT, VIDEOS = "/v1/images/generations", "/v1/chat/completions", "/v1/videos/generations"
PICTURE = {"prompt": "red", "size": "12x8", "seed": 5, "top_k": 10, "guidance": 2.0}


@pytest.fixture(scope="module")
def client(generator: Generator) -> Iterator[TestClient]:
    app = create_app(generator, limits=LIMITS)
    with TestClient(app, base_url="http://localhost", raise_server_exceptions=False) as client:
        yield client


def data_url(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def png_bytes(height: int = 16, width: int = 16) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG")
    return stream.getvalue()


def clip_bytes(folder: Path, frames: int = 12, height: int = 16, width: int = 16) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)
    write_mp4(folder / "clip.mp4", pixels, 8.0)
    return (folder / "clip.mp4").read_bytes()


def pixels_of(text: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))


def events_of(response: httpx.Response) -> list[Any]:
    *events, last, nothing = response.text.split("\n\n")
    assert (last, nothing) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


def question(*parts: Any, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [{"type": "text", "text": "a?"}, *parts]}], **fields}


def test_pictures_are_those_of_the_generator(client: TestClient, generator: Generator) -> None:
    answer = client.post(IMAGES, json={**PICTURE, "n": 2, "negative_prompt": "blue", "user": "x"}).json()
    expected = generator.text_to_image(
        ["red", "red"], height=8, width=12, seeds=[5, 6], negative_prompt="blue",
        sampling=Sampling(guidance=2.0, top_k=10),
    )  # fmt: skip
    for found, image in zip(answer["data"], expected, strict=True):
        np.testing.assert_array_equal(pixels_of(found["b64_json"]), image.pixels)
        assert found["seed"] == image.seed
    assert answer["usage"]["output_tokens"] == sum(image.tokens for image in expected)


def test_a_picture_grows_row_by_row(client: TestClient) -> None:
    """Strips cover the picture from the top, and the last event is what the plain answer holds."""
    body = {**PICTURE, "size": "16x64"}
    events = events_of(client.post(IMAGES, json={**body, "stream": True}))
    kinds = [event["type"].removeprefix("image_generation.") for event in events]
    assert kinds.index("completed") == len(kinds) - 1
    rows = [event["rows"] for event in events if event["type"].endswith("progress")]
    assert rows == sorted(set(rows))
    assert rows[-1] == 16
    top = 0
    for event in events:
        if event["type"].endswith("rows"):
            assert event["top"] == top
            top += len(pixels_of(event["b64_png"]))
    assert top <= 64
    assert events[-1]["b64_json"] == client.post(IMAGES, json=body).json()["data"][0]["b64_json"]


def test_answers_about_pictures_and_clips(client: TestClient, tmp_path: Path) -> None:
    image = {"type": "image_url", "image_url": {"url": data_url("image/png", png_bytes())}}
    video = {"type": "video_url", "video_url": {"url": data_url("video/mp4", clip_bytes(tmp_path))}}
    for parts in ([image], [video], [image, image], []):
        body = question(*parts, max_tokens=6, frames=4)
        answer = client.post(CHAT, json=body).json()
        choice = answer["choices"][0]
        assert choice["message"]["role"] == "assistant"
        assert choice["finish_reason"] in ("stop", "length")
        assert answer["usage"]["completion_tokens"] <= 6
        chunks = events_of(client.post(CHAT, json={**body, "stream": True}))
        text = "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks)
        assert text == choice["message"]["content"]
        assert chunks[-1]["choices"][0]["finish_reason"] == choice["finish_reason"]


def test_a_conversation_goes_on(client: TestClient) -> None:
    messages = [
        {"role": "system", "content": "be brief"}, {"role": "user", "content": "a?"},
        {"role": "assistant", "content": "b"}, {"role": "user", "content": "c?"},
    ]  # fmt: skip
    assert client.post(CHAT, json={"messages": messages, "max_tokens": 2}).status_code == 200


def test_clips_from_words_and_from_a_clip(client: TestClient, tmp_path: Path) -> None:
    body = {**PICTURE, "size": "16x16", "seconds": 1.0, "fps": 8}
    for more in ({}, {"video": data_url("video/mp4", clip_bytes(tmp_path)), "given_frames": 4}):
        (found,) = client.post(VIDEOS, json={**body, **more}).json()["data"]
        assert found["frames"] == 8
        assert load_clip(base64.b64decode(found["b64_mp4"]), 8, (16, 16)).shape == (8, 3, 16, 16)


def test_page_models_and_status(client: TestClient) -> None:
    assert "<canvas" in client.get("/").text or 'createElement("canvas")' in client.get("/").text
    assert client.get("/v1/models").json()["data"][0]["id"] == "emu3"
    assert client.get("/status").json()["jobs"] == 0


def test_pictures_that_are_offered_are_drawn(generator: Generator) -> None:
    """Whatever `pixels` says, no more than a sequence holds; what is too long by its shape is told so."""
    limits = replace(LIMITS, pixels=1 << 20)
    with TestClient(create_app(generator, limits=limits), base_url="http://localhost") as client:
        most = client.get("/status").json()["most_pixels"]
        side = math.isqrt(most)
        assert side * side == most
        body = {**PICTURE, "guidance": 1.0}
        assert client.post(IMAGES, json={**body, "size": f"{side}x{side}"}).status_code == 200
        refused = client.post(IMAGES, json={**body, "size": f"{side + 4}x{side}"})
        assert (refused.status_code, "pixels" in refused.text) == (400, True)
        thin = client.post(IMAGES, json={**body, "size": f"4x{most // 4 // 4 * 4}"})
        assert thin.status_code == 400
        assert f"more than the {LIMITS.length} of this server" in thin.text


def image_part(url: Any) -> dict[str, Any]:
    return question({"type": "image_url", "image_url": {"url": url}})


MALFORMED: list[tuple[str, Any]] = [
    (IMAGES, b""),
    (IMAGES, b"{"),
    (IMAGES, b"[]"),
    (IMAGES, b"null"),
    (IMAGES, b"\xff\xfe"),
    (IMAGES, b"[" * 100_000),
    (IMAGES, b'{"prompt": "a", "temperature": NaN}'),
    (IMAGES, b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}"),
    (IMAGES, b'{"prompt": "\\ud800"}'),
    (IMAGES, {}),
    (IMAGES, {"prompt": 3}),
    (IMAGES, {"prompt": "a" * 40_000}),
    (IMAGES, {"prompt": "a" * 500, "size": "8x8"}),
    (IMAGES, {**PICTURE, "size": "big"}),
    (IMAGES, {**PICTURE, "size": "8"}),
    (IMAGES, {**PICTURE, "size": "0x8"}),
    (IMAGES, {**PICTURE, "size": "-8x8"}),
    (IMAGES, {**PICTURE, "size": "9x8"}),
    (IMAGES, {**PICTURE, "size": "99999x99999"}),
    (IMAGES, {**PICTURE, "size": "1024x1024"}),
    (IMAGES, {**PICTURE, "n": 0}),
    (IMAGES, {**PICTURE, "n": 5}),
    (IMAGES, {**PICTURE, "n": "two"}),
    (IMAGES, {**PICTURE, "temperature": -1}),
    (IMAGES, {**PICTURE, "top_p": 1.5}),
    (IMAGES, {**PICTURE, "top_p": 0}),
    (IMAGES, {**PICTURE, "min_p": 1}),
    (IMAGES, {**PICTURE, "top_k": -1}),
    (IMAGES, {**PICTURE, "guidance": -1}),
    (IMAGES, {**PICTURE, "guidance": 1e300}),
    (IMAGES, {**PICTURE, "seed": -1}),
    (IMAGES, {**PICTURE, "seed": 2**64}),
    (IMAGES, {**PICTURE, "response_format": "url"}),
    (CHAT, {"messages": []}),
    (CHAT, {"messages": "hello"}),
    (CHAT, {"messages": [{"role": "user"}]}),
    (CHAT, {"messages": [{"role": "wizard", "content": "a"}]}),
    (CHAT, {"messages": [{"role": "assistant", "content": "a"}]}),
    (CHAT, {"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}),
    (CHAT, {"messages": [{"role": "system", "content": "a"}]}),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "audio", "audio": "a"}]}]}),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
    (CHAT, question(max_tokens=0)),
    (CHAT, question(max_tokens=10**9)),
    (CHAT, question(n=2)),
    (CHAT, question(frames=5)),
    (CHAT, image_part("/etc/passwd")),
    (CHAT, image_part("file:///etc/passwd")),
    (CHAT, image_part("http://localhost/picture.png")),
    (CHAT, image_part("data:image/png;base64,")),
    (CHAT, image_part("data:image/png;base64,@@@@")),
    (CHAT, image_part(data_url("image/png", b"no picture"))),
    (CHAT, image_part(data_url("image/png", png_bytes()[:60]))),
    (CHAT, image_part(data_url("image/png", png_bytes(8, 512)))),
    (CHAT, image_part(data_url("image/png", png_bytes(300, 300)))),
    (CHAT, image_part(data_url("video/mp4", b"no clip"))),
    (CHAT, image_part(None)),
    (VIDEOS, {**PICTURE, "seconds": 0}),
    (VIDEOS, {**PICTURE, "seconds": 100}),
    (VIDEOS, {**PICTURE, "fps": 0}),
    (VIDEOS, {**PICTURE, "video": "clip.mp4"}),
    (VIDEOS, {**PICTURE, "video": data_url("video/mp4", b"no clip")}),
    (VIDEOS, {**PICTURE, "video": data_url("video/mp4", b"no clip"), "given_frames": 3}),
]  # fmt: skip


def test_malformed_requests_are_refused_with_a_reason(client: TestClient) -> None:
    for path, body in MALFORMED:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        answer = client.post(path, content=content, headers={"Content-Type": "application/json"})
        assert 400 <= answer.status_code < 500, (path, content[:100], answer.status_code, answer.text)
        assert len(answer.json()["error"]["message"]) > 5, (path, content[:100])
    large = client.post(IMAGES, json={"prompt": "a", "user": "x" * LIMITS.body_bytes})
    assert (large.status_code, "larger than" in large.text) == (413, True)
    assert client.post(IMAGES, content=b"a=b").status_code == 400
    assert client.get(IMAGES).status_code == 405
    assert client.get("/../etc/passwd").status_code == 404
    assert client.get("/", headers={"Host": "evil.example"}).status_code == 400
    assert client.get("/status").json()["jobs"] == 0
    assert client.post(IMAGES, json=PICTURE).status_code == 200


class Gate:
    """Holds the engine's steps until it is opened."""

    def __init__(self, generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
        from emu3_megatron.inference.session import Session

        self.opened = threading.Event()
        step = Session.step

        def held(session: Session) -> None:
            self.opened.wait(500)
            step(session)

        monkeypatch.setattr(Session, "step", held)


def test_a_full_queue_refuses_politely(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 50 clients at once 8 are served and 42 told to come again; nobody waits for nothing."""
    gate = Gate(generator, monkeypatch)
    app = create_app(generator, limits=Limits(jobs=8, pixels=4096, length=400))

    async def crowd() -> list[httpx.Response]:
        async with app.router.lifespan_context(app):
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
                clients = [asyncio.ensure_future(client.post(IMAGES, json=PICTURE)) for _ in range(50)]
                while sum(client.done() for client in clients) < 42:
                    await asyncio.sleep(0.01)
                gate.opened.set()
                return await asyncio.gather(*clients)

    answers = asyncio.run(crowd())
    statuses = [answer.status_code for answer in answers]
    assert (statuses.count(200), statuses.count(429)) == (8, 42)
    for answer in answers:
        if answer.status_code == 429:
            assert "try again" in answer.json()["error"]["message"]
            assert answer.headers["Retry-After"] == "1"
    pictures = {answer.json()["data"][0]["b64_json"] for answer in answers if answer.status_code == 200}
    assert len(pictures) == 1


def test_too_many_connections_are_refused_unread(generator: Generator, monkeypatch) -> None:
    gate = Gate(generator, monkeypatch)
    app = create_app(generator, limits=Limits(jobs=8, connections=2, pixels=4096, length=400))

    async def crowd() -> list[int]:
        async with app.router.lifespan_context(app):
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
                clients = [asyncio.ensure_future(client.post(IMAGES, json=PICTURE)) for _ in range(5)]
                while sum(client.done() for client in clients) < 3:
                    await asyncio.sleep(0.01)
                gate.opened.set()
                return [answer.status_code for answer in await asyncio.gather(*clients)]

    assert sorted(asyncio.run(crowd())) == [200, 200, 429, 429, 429]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_ends_its_job(generator: Generator, monkeypatch, stream: bool) -> None:
    gate = Gate(generator, monkeypatch)
    app = create_app(generator, limits=Limits(jobs=1, pixels=4096, length=2000))
    body = json.dumps({**PICTURE, "size": "64x64", "stream": stream}).encode()
    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "path": IMAGES,
        "raw_path": IMAGES.encode(), "root_path": "", "scheme": "http", "query_string": b"",
        "headers": headers, "server": ("localhost", 80), "client": ("localhost", 1),
    }  # fmt: skip

    async def visit() -> int:
        async with app.router.lifespan_context(app):
            gone = asyncio.Event()
            parts = [{"type": "http.request", "body": body, "more_body": False}]

            async def receive() -> dict[str, Any]:
                if parts:
                    return parts.pop()
                await gone.wait()
                return {"type": "http.disconnect"}

            async def send(_: Any) -> None:
                pass

            call = asyncio.ensure_future(app(scope, receive, send))
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
                while (await client.get("/status")).json()["jobs"] == 0:
                    await asyncio.sleep(0.01)
                gone.set()
                await call
                gate.opened.set()
                while (await client.get("/status")).json()["jobs"]:
                    await asyncio.sleep(0.01)
                return (await client.post(IMAGES, json=PICTURE)).status_code

    assert asyncio.run(visit()) == 200


def test_a_job_has_its_time(generator: Generator) -> None:
    app = create_app(generator, limits=Limits(seconds=1e-6, pixels=4096, length=400))
    with TestClient(app, base_url="http://localhost") as client:
        answer = client.post(IMAGES, json=PICTURE)
        assert (answer.status_code, "seconds" in answer.json()["error"]["message"]) == (504, True)
        (error,) = events_of(client.post(IMAGES, json={**PICTURE, "stream": True}))
        assert error["error"]["code"] == 504


def test_a_defect_ends_the_job_and_not_the_server(generator: Generator, monkeypatch) -> None:
    from emu3_megatron.inference.session import Session

    app = create_app(generator, limits=LIMITS)
    step = Session.step
    broken = [True]

    def stumble(session: Session) -> None:
        if broken.pop() if broken else False:
            raise RuntimeError("out of memory")
        step(session)

    monkeypatch.setattr(Session, "step", stumble)
    with TestClient(app, base_url="http://localhost", raise_server_exceptions=False) as client:
        answer = client.post(IMAGES, json=PICTURE)
        assert (answer.status_code, "memory" in answer.text) == (500, False)
        assert client.post(IMAGES, json=PICTURE).status_code == 200


def test_a_failed_step_needs_no_new_memory(generator: Generator, monkeypatch) -> None:
    """Where it fails for want of memory, another cache could not be had either; results stay the same."""
    from emu3_megatron.inference.decoder import CachedDecoder
    from emu3_megatron.inference.session import Session

    app = create_app(generator, limits=LIMITS)
    choose = Session._choose
    broken = [True]

    def stumble(session: Session, *arguments: Any) -> None:
        if broken.pop() if broken else False:
            for cache in session._decoder._cache:
                cache.fill_(float("nan"))  # what half a step may leave
            raise torch.OutOfMemoryError("out of memory")
        choose(session, *arguments)

    def no_memory(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("out of memory")

    with TestClient(app, base_url="http://localhost", raise_server_exceptions=False) as client:
        expected = client.post(IMAGES, json=PICTURE).json()["data"]
        monkeypatch.setattr(Session, "_choose", stumble)
        monkeypatch.setattr(CachedDecoder, "__init__", no_memory)
        assert client.post(IMAGES, json=PICTURE).status_code == 500
        assert client.get("/status").json()["jobs"] == 0
        assert client.post(IMAGES, json=PICTURE).json()["data"] == expected


def test_a_server_whose_thread_has_ended_says_so(generator: Generator, monkeypatch) -> None:
    """The job under way, the next one and the status: nobody waits for a thread that is not there."""
    from emu3_megatron.inference.session import Session

    def fail(*_: Any) -> None:
        raise RuntimeError("the device is lost")

    app = create_app(generator, limits=LIMITS)
    with TestClient(app, base_url="http://localhost", raise_server_exceptions=False) as client:
        assert client.get("/status").status_code == 200
        monkeypatch.setattr(Session, "step", fail)
        monkeypatch.setattr(Session, "clear", fail)
        assert client.post(IMAGES, json=PICTURE).status_code == 500
        for _ in range(2):  # it may end a moment after its last answer
            events = client.post(IMAGES, json=PICTURE)
            assert (events.status_code, "restarted" in events.text) == (503, True)
        assert client.get("/status").status_code == 503
        assert client.get("/v1/models").status_code == 200


def test_a_defect_outside_of_a_step_leaves_nobody_waiting(generator: Generator, monkeypatch) -> None:
    from emu3_megatron.inference.server.worker import Worker

    def fail(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(Worker, "_give_up", fail)
    with TestClient(create_app(generator, limits=LIMITS), base_url="http://localhost") as client:
        assert client.post(IMAGES, json=PICTURE).status_code == 503
        assert client.post(IMAGES, json=PICTURE).status_code == 503


def test_a_body_that_does_not_arrive_is_given_up(generator: Generator) -> None:
    app = create_app(generator, limits=Limits(body_seconds=0.05))

    async def drip():
        yield b"{"
        await asyncio.sleep(60)

    async def visit() -> int:
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://localhost"
        ) as client:
            headers = {"Content-Type": "application/json"}
            return (await client.post(IMAGES, content=drip(), headers=headers)).status_code

    assert asyncio.run(visit()) == 408
