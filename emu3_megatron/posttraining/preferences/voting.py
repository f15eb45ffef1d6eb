"""A page on this machine where people judge candidates: K images of a prompt, two questions about each.

The server listens on the loopback address alone and answers six requests. Nothing that comes from the network
becomes a path: an image is asked for by two numbers, which are looked up among those the folder has, and
votes go to one file whose name is fixed. Other sites open in the same browser cannot use it: a request must
name this server as its host, a vote must come from its own page, and the page loads nothing from elsewhere.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections.abc import Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from emu3_megatron.errors import UserError
from emu3_megatron.files import atomic_write, parse_json
from emu3_megatron.posttraining.preferences.candidates import VOTES, CandidateFolder
from emu3_megatron.posttraining.preferences.scores import Judgement, read_judgements
from emu3_megatron.posttraining.preferences.vote_page import PAGE, SCRIPT, STYLE

LOOPBACK = "127.0.0.1"
CRITERIA = ("appeal", "alignment")
"""What the paper's voters were asked: visual appeal, and alignment with the prompt."""

LONGEST_NAME = 64
LARGEST_VOTE = 65_536
"""Bytes of a request's body."""
SECONDS_FOR_A_REQUEST = 30

_IMAGE = re.compile(r"/image/([0-9]{1,9})/([0-9]{1,4})")
_STATIC = {
    "/": ("text/html; charset=utf-8", PAGE),
    "/page.js": ("text/javascript; charset=utf-8", SCRIPT),
    "/page.css": ("text/css; charset=utf-8", STYLE),
}


class Poll:
    """What has been judged, and what is next for whom. Safe to use from several threads.

    Args:
        folder: The candidates; prompts finished later are seen when the page is started again.
        scale: Highest vote; the lowest is 1.
    """

    def __init__(self, folder: CandidateFolder, scale: int = 5) -> None:
        self.scale = scale
        self._folder = folder
        self._lock = threading.Lock()
        self._path = folder.path / VOTES
        self._counts = {number: folder.count(number) for number in folder.finished()}
        if not self._counts:
            raise UserError(f"{folder.path}: no prompt has candidates yet; sample some first")
        self._judged: dict[str, set[int]] = {}
        for judgement in self._known():
            self._judged.setdefault(judgement.voter, set()).add(judgement.prompt)

    def _known(self) -> list[Judgement]:
        """Votes of before; a last line that a crash cut short is cut off."""
        if not self._path.is_file():
            return []
        data = self._path.read_bytes()
        if data and not data.endswith(b"\n"):
            with atomic_write(self._path) as stream:
                stream.write(data[: data.rfind(b"\n") + 1])
        return read_judgements(self._path)[0]

    def question(self, voter: str) -> dict[str, Any]:
        """The next prompt that `voter` has not judged: its number, text, images in the voter's own order.

        Raises:
            UserError: a name that is empty, too long, or holds control characters.
        """
        _check_name(voter)
        with self._lock:
            judged = set(self._judged.get(voter, ()))
        left = [number for number in self._counts if number not in judged]
        about = {"left": len(left), "criteria": list(CRITERIA), "scale": self.scale}
        if not left:
            return about
        # Another order of prompts and of images for everybody, so that no place is always first.
        number = min(left, key=lambda each: _hash(voter, each))
        order = sorted(range(self._counts[number]), key=lambda place: _hash(voter, number, place))
        return {**about, "prompt": number, "text": self._folder.prompts[number], "candidates": order}

    def vote(self, fields: Any) -> None:
        """Keep the votes of one person about all candidates of one prompt.

        Args:
            fields: ``{"voter": name, "prompt": number, "votes": {candidate: {criterion: vote}}}``.

        Raises:
            UserError: anything is missing, unknown or out of range; nothing is kept then.
        """
        if not isinstance(fields, dict) or set(fields) != {"voter", "prompt", "votes"}:
            raise UserError("a vote has the keys voter, prompt and votes")
        voter, number, votes = fields["voter"], fields["prompt"], fields["votes"]
        _check_name(voter)
        if not isinstance(number, int) or isinstance(number, bool) or number not in self._counts:
            raise UserError("there is no such prompt")
        expected = {str(place) for place in range(self._counts[number])}
        if not isinstance(votes, dict) or set(votes) != expected:
            raise UserError("every image of the prompt needs a vote, and no other")
        lines = [
            Judgement(number, place, voter, self._checked(votes[str(place)])).to_line()
            for place in range(self._counts[number])
        ]
        with self._lock:
            with open(self._path, "a", encoding="utf-8") as stream:
                stream.write("".join(lines))
                stream.flush()
                os.fsync(stream.fileno())
            self._judged.setdefault(voter, set()).add(number)

    def _checked(self, votes: Any) -> dict[str, float]:
        if not isinstance(votes, dict) or set(votes) != set(CRITERIA):
            raise UserError(f"an image is judged by {' and '.join(CRITERIA)}")
        for value in votes.values():
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= self.scale:
                raise UserError(f"a vote is a whole number from 1 to {self.scale}")
        return {name: votes[name] for name in CRITERIA}

    def image(self, number: int, candidate: int) -> bytes | None:
        """PNG of a candidate; None where there is none."""
        if not 0 <= candidate < self._counts.get(number, 0):
            return None
        try:
            return self._folder.image(number, candidate).read_bytes()
        except OSError:  # taken away since; the page shows a gap
            return None


def _check_name(voter: Any) -> None:
    if not isinstance(voter, str) or not 1 <= len(voter) <= LONGEST_NAME or not voter.isprintable():
        raise UserError(f"a name has 1 to {LONGEST_NAME} printable characters")


def _hash(*parts: object) -> bytes:
    return hashlib.sha256(repr(parts).encode()).digest()


class VoteServer(ThreadingHTTPServer):
    """Serves a poll on the loopback address.

    Args:
        poll: The poll.
        port: 0 takes a free one; see `server_port`.
    """

    daemon_threads = True

    def __init__(self, poll: Poll, port: int = 0) -> None:
        self.poll = poll
        super().__init__((LOOPBACK, port), _Handler)

    @property
    def address(self) -> str:
        """What to open in a browser."""
        return f"http://{LOOPBACK}:{self.server_port}/"


class _Handler(BaseHTTPRequestHandler):
    server: VoteServer
    timeout = SECONDS_FOR_A_REQUEST
    server_version = "votes"
    sys_version = ""

    def do_GET(self) -> None:
        """The page, its parts, and images."""
        if not self._is_asked_here():
            return
        if self.path in _STATIC:
            kind, text = _STATIC[self.path]
            self._answer(HTTPStatus.OK, text.encode(), kind)
            return
        if match := _IMAGE.fullmatch(self.path):
            picture = self.server.poll.image(int(match[1]), int(match[2]))
            if picture is not None:
                self._answer(HTTPStatus.OK, picture, "image/png")
                return
        self._answer(HTTPStatus.NOT_FOUND)

    def do_POST(self) -> None:
        """``/question`` with ``{"voter": name}``, and ``/vote``; JSON in and out."""
        if not self._is_asked_here() or not self._is_of_the_page():
            return
        try:
            fields = parse_json(self._body())
            if self.path == "/question":
                voter = fields.get("voter") if isinstance(fields, dict) else None
                self._json(HTTPStatus.OK, self.server.poll.question(voter))  # type: ignore[arg-type]
            elif self.path == "/vote":
                self.server.poll.vote(fields)
                self._json(HTTPStatus.OK, {})
            else:
                self._answer(HTTPStatus.NOT_FOUND)
        except UserError as error:
            self._json(HTTPStatus.BAD_REQUEST, {"error": str(error)})
        except ValueError:
            self._json(HTTPStatus.BAD_REQUEST, {"error": "not JSON"})

    def _is_asked_here(self) -> bool:
        """Whether the browser meant this server: another name for its address may be another site's."""
        hosts = {f"{name}:{self.server.server_port}" for name in (LOOPBACK, "localhost")}
        if self.headers.get("Host") in hosts:
            return True
        self._answer(HTTPStatus.FORBIDDEN)
        return False

    def _is_of_the_page(self) -> bool:
        """Whether a request with a body comes from our own page."""
        own = {f"http://{name}:{self.server.server_port}" for name in (LOOPBACK, "localhost")}
        is_json = self.headers.get("Content-Type", "").partition(";")[0].strip() == "application/json"
        if self.headers.get("Origin") in own and is_json:
            return True
        self._answer(HTTPStatus.FORBIDDEN)
        return False

    def _body(self) -> bytes:
        length = self.headers.get("Content-Length", "")
        if not length.isdigit() or int(length) > LARGEST_VOTE:
            self.close_connection = True
            raise UserError(f"a request has at most {LARGEST_VOTE} bytes")
        return self.rfile.read(int(length))

    def _json(self, status: HTTPStatus, value: Mapping[str, Any]) -> None:
        self._answer(status, json.dumps(value).encode(), "application/json")

    def _answer(self, status: HTTPStatus, body: bytes = b"", kind: str = "text/plain") -> None:
        self.send_response(status)
        headers = {
            "Content-Type": kind,
            "Content-Length": str(len(body)),
            "Cache-Control": "no-store",
            "Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'; form-action 'none'",
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
        }
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Say nothing: the terminal shows the address only."""


def serve(path: Path, port: int) -> None:
    """Serve a folder of candidates until interrupted.

    Raises:
        UserError: no candidates, or the port is taken.
    """
    poll = Poll(CandidateFolder(path))
    try:
        server = VoteServer(poll, port)
    except (OSError, OverflowError) as error:
        raise UserError(f"port {port} cannot be used ({error}); choose another with --port") from error
    with server:
        print(f"vote at {server.address} (Ctrl-C ends it); votes go to {path / VOTES}", flush=True)
        server.serve_forever()
