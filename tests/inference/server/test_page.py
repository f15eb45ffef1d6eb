"""The page in a real browser: a prompt and its picture, an upload and its answer, cancelling."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn

from emu3_megatron.inference import Generator
from emu3_megatron.inference.server.app import create_app
from tests.inference.server.browser import Page, chromium, find_chromium
from tests.inference.server.conftest import LIMITS
from tests.inference.server.test_app import Gate, clip_bytes, png_bytes

pytestmark = pytest.mark.slow


@pytest.fixture
def address(generator: Generator) -> Iterator[str]:
    """A server on a free port."""
    server = uvicorn.Server(uvicorn.Config(create_app(generator, limits=LIMITS), port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        thread.join(0.05)
    (listener,) = server.servers[0].sockets
    yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
    server.should_exit = True
    thread.join()


@pytest.fixture
def page(address: str) -> Iterator[Page]:
    program = find_chromium()
    if program is None:
        message = "Chromium is not installed"
        if os.environ.get("EMU3_REQUIRE_CHROMIUM"):
            pytest.fail(message)
        pytest.skip(message)
    with chromium(program) as page:
        page.open(address)
        yield page


def fill(page: Page, **values: object) -> None:
    for name, value in values.items():
        page.run(f"document.getElementById({name!r}).value = {str(value)!r}")


def press(page: Page, button: str) -> None:
    page.run(f"document.getElementById({button!r}).click()")


def message(page: Page) -> str:
    return str(page.run("document.getElementById('message').textContent"))


def wait_for_jobs(page: Page, count: int) -> None:
    """Until the server works on so many requests."""
    jobs = "(await (await fetch('/status')).json()).jobs"
    pause = "await new Promise(done => setTimeout(done, 100))"
    page.run(f"(async () => {{ while ({jobs} !== {count}) {{ {pause}; }} }})()")


def test_the_page(page: Page, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, generator: Generator) -> None:
    settled = "!document.getElementById('go').disabled"
    page.wait("document.getElementById('model').textContent === 'emu3'")
    # a picture
    fill(page, prompt="a red circle", width=16, height=32)
    press(page, "go")
    page.wait(settled)
    assert message(page) == "Done."
    painted = "document.querySelector('canvas').getContext('2d').getImageData(0, 0, 16, 32).data"
    assert page.run(f"{painted}.every((value, place) => place % 4 !== 3 || value === 255)")
    # the server's reason for a refusal
    fill(page, width=17)
    press(page, "go")
    page.wait(settled)
    assert "multiples of 4" in message(page)
    # a question about an upload
    page.run("document.querySelector('[data-task=ask]').click()")
    (tmp_path / "picture.png").write_bytes(png_bytes())
    page.upload("#file", tmp_path / "picture.png")
    fill(page, prompt="what is it?", max_tokens=5)
    press(page, "go")
    page.wait(settled)
    assert message(page) == "Done."
    # a clip, continued
    page.run("document.querySelector('[data-task=video]').click()")
    clip_bytes(tmp_path)
    page.upload("#file", tmp_path / "clip.mp4")
    fill(page, prompt="go", width=16, height=16, seconds=1)
    press(page, "go")
    page.wait(settled)
    assert message(page) == "Done."
    assert page.run("document.querySelector('video').src.length") > 100
    # cancelling
    gate = Gate(generator, monkeypatch)
    page.run("document.querySelector('[data-task=image]').click()")
    fill(page, width=16, height=32)
    press(page, "go")
    wait_for_jobs(page, 1)
    press(page, "cancel")
    page.wait(settled)
    assert message(page) == "Cancelled."
    gate.opened.set()
    wait_for_jobs(page, 0)
