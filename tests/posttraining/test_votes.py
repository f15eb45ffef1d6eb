"""The page for votes: what it answers, what it keeps, and what it refuses."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from emu3_megatron.errors import UserError
from emu3_megatron.posttraining.preferences.scores import mean_scores, read_folder
from emu3_megatron.posttraining.preferences.voting import Poll, VoteServer
from tests.posttraining import folders

GOOD = {"appeal": 4, "alignment": 5}


class Browser:
    """Requests as the page makes them, unless told otherwise."""

    def __init__(self, server: VoteServer) -> None:
        self.server = server

    def ask(
        self, method: str, path: str, body: Any = None, *, raw: bytes | None = None, **headers: str
    ) -> tuple[int, bytes, dict[str, str]]:
        own = f"127.0.0.1:{self.server.server_port}"
        sent = {"Host": own, "Origin": f"http://{own}", "Content-Type": "application/json"}
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}
        connection = http.client.HTTPConnection("127.0.0.1", self.server.server_port, timeout=20)
        data = raw if raw is not None else json.dumps(body).encode() if body is not None else None
        connection.putrequest(method, path, skip_host=True)
        for name, value in sent.items():
            connection.putheader(name, value)
        if data is not None and "Content-Length" not in sent:
            connection.putheader("Content-Length", str(len(data)))
        connection.endheaders(data)
        reply = connection.getresponse()
        result = reply.status, reply.read(), dict(reply.getheaders())
        connection.close()
        return result

    def question(self, voter: Any) -> dict[str, Any]:
        return json.loads(self.ask("POST", "/question", {"voter": voter})[1])

    def vote(self, voter: str, prompt: Any, votes: Any) -> int:
        return self.ask("POST", "/vote", {"voter": voter, "prompt": prompt, "votes": votes})[0]


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    server = VoteServer(Poll(folders.filled_folder(tmp_path / "candidates")))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield Browser(server)
    server.shutdown()
    server.server_close()
    thread.join()


def votes_file(tmp_path: Path) -> Path:
    return tmp_path / "candidates" / "votes.jsonl"


def test_people_judge_every_prompt_once_and_their_votes_become_scores(
    browser: Browser, tmp_path: Path
) -> None:
    for voter in ("ada", "bo 博"):
        seen = []
        while (question := browser.question(voter))["left"]:
            number = question["prompt"]
            assert question["text"] == folders.PROMPTS[number]
            assert sorted(question["candidates"]) == list(range(folders.EACH))
            assert question["criteria"] == ["appeal", "alignment"]
            seen.append(number)
            votes = {str(place): {"appeal": 1 + place, "alignment": 5} for place in range(folders.EACH)}
            assert browser.vote(voter, number, votes) == 200
        assert sorted(seen) == list(range(len(folders.PROMPTS)))
    folder = folders.open_folder(tmp_path / "candidates")
    judgements, problems = read_folder(folder)
    assert not problems
    assert mean_scores(judgements)[3, 2] == (3 + 5) / 2
    votes_file(tmp_path).write_bytes(votes_file(tmp_path).read_bytes() + b'{"prompt"')
    assert Poll(folder).question("ada")["left"] == 0
    assert Poll(folder).question("cy")["left"] == len(folders.PROMPTS)


def test_images_are_given_by_number_and_nothing_else_is(browser: Browser, tmp_path: Path) -> None:
    status, picture, headers = browser.ask("GET", "/image/1/2")
    assert status == 200
    assert headers["Content-Type"] == "image/png"
    assert picture == (tmp_path / "candidates/images/000001-2.png").read_bytes()
    for path in (
        "/image/4/0",
        "/image/0/3",
        "/image/-1/0",
        "/image/0/0/../../settings.json",
        "/image/../settings.json",
        "/../settings.json",
        "/settings.json",
        "/votes.jsonl",
        "/%2e%2e/settings.json",
        "/image/0/%2e%2e",
        "//etc/passwd",
        "/image/%D9%A0/%D9%A0",
    ):
        assert browser.ask("GET", path)[0] == 404, path
    assert browser.ask("POST", "/settings.json", {})[0] == 404


def test_the_page_runs_no_text_of_others(browser: Browser) -> None:
    for path, kind in (("/", "text/html"), ("/page.js", "text/javascript"), ("/page.css", "text/css")):
        status, body, headers = browser.ask("GET", path)
        assert status == 200
        assert headers["Content-Type"].startswith(kind)
        assert "default-src 'self'" in headers["Content-Security-Policy"]
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert b"innerHTML" not in body
        assert b"http://" not in body.replace(b"http://www.w3.org", b"")


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "attacker.example"},
        {"Host": "127.0.0.1"},
        {"Origin": "http://attacker.example"},
        {"Origin": "null"},
        {"Content_Type": "text/plain"},
    ],
    ids=str,
)
def test_other_sites_are_refused(browser: Browser, tmp_path: Path, headers: dict[str, str]) -> None:
    vote = {"voter": "ada", "prompt": 0, "votes": {str(place): GOOD for place in range(folders.EACH)}}
    assert browser.ask("POST", "/vote", vote, **headers)[0] == 403
    if "Host" in headers:
        assert browser.ask("GET", "/", **headers)[0] == 403
    assert not votes_file(tmp_path).exists()


def test_a_vote_that_does_not_fit_keeps_nothing(browser: Browser, tmp_path: Path) -> None:
    whole: dict[str, Any] = {str(place): GOOD for place in range(folders.EACH)}
    for voter, prompt, votes in (
        ("", 0, whole),
        ("x" * 65, 0, whole),
        ("a\nb", 0, whole),
        (7, 0, whole),
        ("ada", 4, whole),
        ("ada", True, whole),
        ("ada", "0", whole),
        ("ada", 0, {"0": GOOD}),
        ("ada", 0, {**whole, "3": GOOD}),
        ("ada", 0, {**whole, "1": {"appeal": 4}}),
        ("ada", 0, {**whole, "1": {**GOOD, "appeal": 6}}),
        ("ada", 0, {**whole, "1": {**GOOD, "appeal": 0}}),
        ("ada", 0, {**whole, "1": {**GOOD, "appeal": 4.5}}),
        ("ada", 0, {**whole, "1": {**GOOD, "appeal": True}}),
        ("ada", 0, None),
    ):
        assert browser.vote(voter, prompt, votes) == 400, (voter, prompt, votes)
    assert browser.ask("POST", "/vote", [1])[0] == 400
    assert browser.ask("POST", "/vote", raw=b"{")[0] == 400
    assert browser.ask("POST", "/vote", raw=b"[" * 60000)[0] == 400
    assert browser.ask("POST", "/vote", raw=b"\xff")[0] == 400
    assert browser.ask("POST", "/vote", raw=b"{}", Content_Length="99999999")[0] == 400
    assert browser.ask("POST", "/vote", raw=b"{}", Content_Length="-1")[0] == 400
    assert browser.ask("POST", "/question", [1])[0] == 400
    assert not votes_file(tmp_path).exists()


def test_it_listens_on_this_machine_alone(browser: Browser) -> None:
    assert browser.server.server_address[0] == "127.0.0.1"


def test_votes_of_many_at_once_are_all_kept(browser: Browser, tmp_path: Path) -> None:
    whole = {str(place): GOOD for place in range(folders.EACH)}

    def vote(number: int) -> None:
        for prompt in range(len(folders.PROMPTS)):
            assert browser.vote(f"voter {number}", prompt, whole) == 200

    threads = [threading.Thread(target=vote, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    judgements, problems = read_folder(folders.open_folder(tmp_path / "candidates"))
    assert not problems
    assert len(judgements) == 6 * len(folders.PROMPTS) * folders.EACH


def test_without_candidates_there_is_nothing_to_judge(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no prompt has candidates"):
        Poll(folders.open_folder(tmp_path / "candidates"))
