"""The server's addresses.

``/`` is the page. ``/v1/images/generations`` and ``/v1/chat/completions`` are OpenAI's;
``/v1/videos/generations`` is like the first. Files come and go inside the JSON (data URLs, base64): no
request names a file or an address to fetch.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

from emu3_megatron.errors import UserError, one_line
from emu3_megatron.inference.dialogue import MediaReader
from emu3_megatron.inference.server.body import BoundedBodies, refusal
from emu3_megatron.inference.server.limits import Limits
from emu3_megatron.inference.server.schemas import Chat, Clip, Picture, read_upload
from emu3_megatron.inference.server.work import AnswerWork, ImageWork, VideoWork
from emu3_megatron.inference.server.worker import BROKEN, Down, Event, Job, Refused, Work, Worker
from emu3_megatron.inference.tasks import Generator
from emu3_megatron.text.chat import CHAT_TEMPLATES, ChatTemplate

Shape = Callable[[Event], dict[str, Any] | None]
"""An event of a job as an event for the client; None where it is not told."""


_PROMPT_SHARE = 32
"""One of so many positions of a sequence is for words where the largest picture is reckoned."""

LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1", "[::1]")
"""Names by which a browser on this machine calls the server."""


class Service:
    """Bodies to jobs, and jobs to answers."""

    def __init__(
        self, generator: Generator, *, limits: Limits, template: ChatTemplate, model_name: str
    ) -> None:
        self.worker = Worker(generator.engine, limits)
        self.model_name = model_name
        vision = generator.bundle.vision_tokenizer
        self._spatial, self._temporal = vision.spatial_factor, vision.temporal_factor
        limits = replace(limits, pixels=min(limits.pixels, _square(generator, limits.length)))
        self._generator, self._limits, self._template = generator, limits, template
        self._reader = MediaReader(
            generator,
            area=limits.understanding_area,
            most_pixels=limits.upload_pixels,
            most_clip_pixels=limits.clip_pixels,
        )

    def about(self) -> dict[str, Any]:
        """What the page needs to know, and how busy the server is."""
        return {
            "model": self.model_name, "jobs": self.worker.jobs, "most_jobs": self._limits.jobs,
            "spatial_factor": self._spatial, "temporal_factor": self._temporal,
            "most_pixels": self._limits.pixels, "most_frames": self._limits.frames,
        }  # fmt: skip

    async def images(self, body: Picture, request: Request) -> Response:
        """Draw pictures."""
        if body.n > self._limits.samples:
            raise UserError(f"n={body.n} is more than {self._limits.samples}")
        height, width = body.dimensions(self._limits, self._spatial)
        work = ImageWork(
            self._generator,
            prompt=body.prompt,
            negative_prompt=body.negative_prompt,
            height=height,
            width=width,
            sampling=body.sampling(guidance=body.guidance, temperature=1.0),
            seeds=range(body.seed, body.seed + body.n),
            most_positions=self._limits.length,
        )
        return await self._answer(work, request, body.stream, _picture_event("image_generation"), _pictures)

    async def videos(self, body: Clip, request: Request) -> Response:
        """Make a clip, or continue one."""
        if body.n != 1:
            raise UserError(f"n={body.n}: one clip at a time")
        clip = None if body.video is None else read_upload(body.video, self._limits, "video").data
        work = VideoWork(
            self._generator,
            prompt=body.prompt,
            negative_prompt=body.negative_prompt,
            size=body.dimensions(self._limits, self._spatial),
            frames=body.frames(self._limits, self._temporal),
            fps=body.fps,
            sampling=body.sampling(guidance=body.guidance, temperature=1.0),
            seed=body.seed,
            clip=clip,
            given_frames=body.given_frames,
            reader=self._reader,
            most_positions=self._limits.length,
        )
        return await self._answer(work, request, body.stream, _picture_event("video_generation"), _pictures)

    async def chat(self, body: Chat, request: Request) -> Response:
        """Answer a question."""
        if body.frames % self._temporal or body.frames > self._limits.frames:
            raise UserError(
                f"frames={body.frames} must be a multiple of {self._temporal}, at most {self._limits.frames}"
            )
        work = AnswerWork(
            self._generator,
            self._reader,
            messages=body.read(self._limits),
            template=self._template,
            frames=body.frames,
            sampling=body.sampling(guidance=1.0, temperature=0.0),
            seed=body.seed,
            max_new_tokens=body.most_tokens(self._limits),
            most_positions=self._limits.length,
        )
        about = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": self.model_name}
        return await self._answer(work, request, body.stream, _chunk(about), _completion(about))

    async def _answer(
        self,
        work: Work,
        request: Request,
        stream: bool,
        shape: Shape,
        whole: Callable[[Event], dict[str, Any]],
    ) -> Response:
        """Run a job; a client that goes away ends it."""
        job = Job(work, self._limits.seconds)
        self.worker.add(job)
        if stream:
            headers = {"Cache-Control": "no-store"}
            return StreamingResponse(
                _server_events(job, shape), media_type="text/event-stream", headers=headers
            )
        last = asyncio.ensure_future(_last(job))
        gone = asyncio.ensure_future(_disconnected(request))
        try:
            await asyncio.wait({last, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not last.done():
                return Response(status_code=499)  # nobody reads it
            event = last.result()
        finally:
            job.cancel()
            last.cancel()
            gone.cancel()
        if event["type"] == "error":
            return refusal(event["status"], event["message"])
        return JSONResponse(whole(event))


def _square(generator: Generator, length: int) -> int:
    """Pixels of the largest square picture that `length` positions hold after a prompt; at least one code."""
    dialect, side, most = generator.bundle.dialect, 1, length - length // _PROMPT_SHARE
    while dialect.span_length(side + 1, side + 1) <= most:
        side += 1
    return int((side * generator.bundle.vision_tokenizer.spatial_factor) ** 2)


async def _last(job: Job) -> Event:
    """The last event of a job."""
    event: Event = {}
    async for event in job.events():  # noqa: B007 - the last one stays
        pass
    return event


async def _disconnected(request: Request) -> None:
    """Wait until the client goes away."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _server_events(job: Job, shape: Shape) -> AsyncIterator[str]:
    """A job as server-sent events, an error as one of them."""
    async for event in job.events():
        told = shape(event)
        if event["type"] == "error":
            told = json.loads(bytes(refusal(event["status"], event["message"]).body))
        if told is not None:
            yield f"data: {json.dumps(told)}\n\n"
    yield "data: [DONE]\n\n"


def _picture_event(kind: str) -> Shape:
    """Events of pictures and clips: ``KIND.progress``, ``KIND.rows``, ``KIND.completed``."""

    def shape(event: Event) -> dict[str, Any] | None:
        if event["type"] == "done":
            return {**event["data"][0], **_pictures(event), "type": f"{kind}.completed"}
        return {**event, "type": f"{kind}.{event['type']}"}

    return shape


def _pictures(event: Event) -> dict[str, Any]:
    """The answer of ``/v1/images/generations``."""
    tokens = event["tokens"]
    used = {
        "input_tokens": tokens["prompt_tokens"], "output_tokens": tokens["completion_tokens"],
        "total_tokens": tokens["total_tokens"],
    }  # fmt: skip
    return {"created": int(time.time()), "data": event["data"], "usage": used}


def _completion(about: dict[str, Any]) -> Callable[[Event], dict[str, Any]]:
    """The answer of ``/v1/chat/completions``."""

    def whole(event: Event) -> dict[str, Any]:
        choice = {
            "index": 0, "message": {"role": "assistant", "content": event["text"]},
            "finish_reason": "stop" if event["finished"] else "length",
        }  # fmt: skip
        return {**about, "object": "chat.completion", "choices": [choice], "usage": event["tokens"]}

    return whole


def _chunk(about: dict[str, Any]) -> Shape:
    """Its pieces."""

    def shape(event: Event) -> dict[str, Any] | None:
        done = event["type"] == "done"
        text = event.get("rest") if done else event.get("text")
        choice = {
            "index": 0, "delta": {"role": "assistant", "content": text or ""},
            "finish_reason": None if not done else "stop" if event["finished"] else "length",
        }  # fmt: skip
        return {**about, "object": "chat.completion.chunk", "choices": [choice]}

    return shape


def create_app(
    generator: Generator,
    *,
    limits: Limits | None = None,
    template: ChatTemplate = CHAT_TEMPLATES["emu3-chat"],
    model_name: str = "emu3",
    hosts: tuple[str, ...] = LOCAL_HOSTS,
) -> FastAPI:
    """The server over one model.

    Args:
        generator: The model; nobody else uses it while the server runs.
        limits: What one client may ask.
        template: How a question is put to the model.
        model_name: What ``/v1/models`` says.
        hosts: Names by which clients may call the server; ``*`` takes all. A web page of somebody else cannot
            reach a server on localhost by giving it another name.
    """
    limits = limits or Limits()
    service = Service(generator, limits=limits, template=template, model_name=model_name)
    page = files("emu3_megatron.inference.server").joinpath("page.html").read_text("utf-8")

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.worker.start()
        yield
        await asyncio.to_thread(service.worker.close)

    app = FastAPI(title="emu3-megatron", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(BoundedBodies, limits=limits)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))
    _add_errors(app)

    @app.get("/")
    async def show_page() -> HTMLResponse:
        return HTMLResponse(page)

    @app.get("/status", response_model=None)
    async def status() -> Response:
        if service.worker.broken:
            return refusal(503, BROKEN)
        return JSONResponse(service.about())

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        model = {"id": model_name, "object": "model", "created": 0, "owned_by": "emu3-megatron"}
        return {"object": "list", "data": [model]}

    app.post("/v1/images/generations", response_model=None)(service.images)
    app.post("/v1/videos/generations", response_model=None)(service.videos)
    app.post("/v1/chat/completions", response_model=None)(service.chat)
    return app


def _add_errors(app: FastAPI) -> None:
    """Every error in one form, with its reason."""

    @app.exception_handler(RequestValidationError)
    async def malformed(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        place = ".".join(str(step) for step in first["loc"])
        return refusal(400, f"{place}: {first['msg']}"[:500])

    @app.exception_handler(ValueError)
    async def unusable(_: Request, error: ValueError) -> Response:
        return refusal(400, one_line(error))

    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> Response:
        return refusal(429, one_line(error))

    @app.exception_handler(Down)
    async def down(_: Request, error: Down) -> Response:
        return refusal(503, one_line(error))

    @app.exception_handler(HTTPException)
    async def other(_: Request, error: HTTPException) -> Response:
        return refusal(error.status_code, str(error.detail))
