"""Files of clients: what is refused before it costs anything, and what is left undone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from emu3_megatron.inference import Generator
from emu3_megatron.inference.server.app import create_app
from emu3_megatron.inference.server.limits import Limits
from tests.inference.server.conftest import LIMITS
from tests.inference.server.test_app import (
    CHAT,
    PICTURE,
    VIDEOS,
    clip_bytes,
    data_url,
    png_bytes,
    question,
)

UPLOAD_LIMITS = Limits(
    pixels=1 << 14, length=400, understanding_area=256, upload_pixels=1 << 16, clip_pixels=4 * 16 * 96,
    frames=32, uploads=3,
)  # fmt: skip


def ask(*parts: Any, **fields: Any) -> dict[str, Any]:
    return question(*parts, **{"max_tokens": 4, **fields})


def test_uploads_are_refused_before_they_are_decoded(
    generator: Generator, monkeypatch, tmp_path: Path
) -> None:
    """Too many, too elongated, too large in all, too long for a sequence: a reason, and no work."""
    from emu3_megatron.inference.dialogue import MediaReader
    from emu3_megatron.inference.server import work

    def touched(*_: Any, **__: Any) -> None:
        raise RuntimeError("decoded")

    def image(height: int = 16, width: int = 16) -> dict[str, Any]:
        url = data_url("image/png", png_bytes(height, width))
        return {"type": "image_url", "image_url": {"url": url}}

    def video(**size: int) -> dict[str, Any]:
        return {
            "type": "video_url",
            "video_url": {"url": data_url("video/mp4", clip_bytes(tmp_path, **size))},
        }

    def continued(**size: int) -> dict[str, Any]:
        return {"prompt": "a", "fps": 8, "seconds": 2, "video": video(**size)["video_url"]["url"]}

    several = {"messages": [*question(image(), image())["messages"], {"role": "assistant", "content": "a"}]}
    several["messages"] += question(image(), image())["messages"]
    refused: list[tuple[str, Any, str]] = [
        (CHAT, ask(*[image()] * 4), "4 files"),
        (CHAT, several, "4 files"),
        (CHAT, ask(image(16, 96)), "aspect ratio"),
        (CHAT, ask(image(300, 300)), "pixels"),
        (CHAT, ask(image(), image(), image(), max_tokens=380), "positions"),
        (CHAT, ask(video(height=96), frames=4), "aspect ratio"),
        (CHAT, ask(video(height=48, width=48), frames=4), "in all"),
        (CHAT, ask(video(), video(), max_tokens=380, frames=4), "positions"),
        (VIDEOS, {**continued(height=48, width=48), "size": "16x16", "given_frames": 4}, "in all"),
        (VIDEOS, {**continued(), "size": "64x64", "given_frames": 4}, "positions"),
        (VIDEOS, {**continued(frames=80), "size": "16x16", "fps": 0.05, "seconds": 400}, "too short"),
    ]
    monkeypatch.setattr(Generator, "encode_images", touched)
    monkeypatch.setattr(Generator, "encode_clip", touched)
    monkeypatch.setattr(MediaReader, "image", touched)
    monkeypatch.setattr(MediaReader, "video", touched)
    monkeypatch.setattr(work, "load_clip", touched)
    app = create_app(generator, limits=UPLOAD_LIMITS)
    with TestClient(app, base_url="http://localhost", raise_server_exceptions=False) as client:
        for path, body, reason in refused:
            answer = client.post(path, json=body)
            assert (answer.status_code, reason in answer.text) == (400, True), (answer.text, reason)


def test_an_enlarged_clip_is_bounded(generator: Generator, tmp_path: Path) -> None:
    """A clip is enlarged whole before it is cropped: a thin one would become huge."""
    body = {**PICTURE, "size": "8x8", "seconds": 1.0, "fps": 8}
    video = data_url("video/mp4", clip_bytes(tmp_path, height=16, width=512))
    with TestClient(create_app(generator, limits=LIMITS), base_url="http://localhost") as client:
        answer = client.post(VIDEOS, json={**body, "video": video})
    assert (answer.status_code, "512x16" in answer.text) == (400, True)


def test_nothing_is_decoded_far_ahead(generator: Generator, tmp_path: Path) -> None:
    """A low rate would have a whole film decoded for a few frames."""
    from emu3_megatron.inference.dialogue import MediaReader
    from emu3_megatron.media import MediaError

    film = clip_bytes(tmp_path, frames=400)
    reader = MediaReader(generator, most_pixels=256, most_clip_pixels=4 * 256)
    reader.check_clip(film, frames=4, fps=None)
    reader.check_clip(film, frames=4, fps=1.0)
    with pytest.raises(MediaError, match="higher rate"):
        reader.check_clip(film, frames=4, fps=0.08)


@pytest.mark.parametrize("late", [True, False])
def test_a_job_that_is_given_up_encodes_nothing_more(generator: Generator, monkeypatch, late: bool) -> None:
    """Time and clients are looked at between the files of a request."""
    from emu3_megatron.inference.dialogue import MediaReader
    from emu3_megatron.inference.server.worker import Job, Worker

    jobs: list[Job] = []
    encoded: list[bytes] = []
    add, image = Worker.add, MediaReader.image

    def note(worker: Worker, job: Job) -> None:
        jobs.append(job)
        add(worker, job)

    def end(reader: MediaReader, media: bytes) -> Any:
        encoded.append(media)
        if late:
            jobs[-1].deadline = 0.0
        else:
            jobs[-1].cancel()
        return image(reader, media)

    monkeypatch.setattr(Worker, "add", note)
    monkeypatch.setattr(MediaReader, "image", end)
    picture = {"type": "image_url", "image_url": {"url": data_url("image/png", png_bytes())}}
    with TestClient(create_app(generator, limits=LIMITS), base_url="http://localhost") as client:
        answer = client.post(CHAT, json=question(*[picture] * 3, max_tokens=2))
        assert (answer.status_code, len(encoded)) == (504, 1)
        assert client.get("/status").json()["jobs"] == 0
