"""Servers that misbehave: each is refused within the time, in one line, and no judgement is lost by it."""

import json
import random
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from lightning_danube.evaluation import exchange as module
from lightning_danube.evaluation.exchange import exchange
from lightning_danube.evaluation.grading import Grader, gradings_of
from lightning_danube.evaluation.judge import ChatJudge, grading_messages
from tests.evaluation.test_grading import RECORDS, Part

Answer = bytes | list[bytes]
"""What a server sends: at once, or in pieces with a short wait before each."""


class RawServer:
    """Sends bytes that need not be HTTP. `answers`: called with the number of the request, from 0."""

    def __init__(self, answers: Callable[[int], Answer]) -> None:
        self.requests = 0
        self._answers, self._over = answers, threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}/v1"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                number, self.requests = self.requests, self.requests + 1
                threading.Thread(target=self._answer, args=(connection, number), daemon=True).start()

    def _answer(self, connection: socket.socket, number: int) -> None:
        with connection, suppress(OSError):
            request = b""
            while b"\r\n\r\n" not in request:
                request += connection.recv(1 << 16)
            length = int(request.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            while len(request.split(b"\r\n\r\n", 1)[1]) < length:
                request += connection.recv(1 << 16)
            answer = self._answers(number)
            for piece in [answer] if isinstance(answer, bytes) else answer:
                if isinstance(answer, list) and self._over.wait(0.02):
                    return
                connection.sendall(piece)
            if isinstance(answer, list):
                self._over.wait(30)  # it keeps the connection open and says no more

    def close(self) -> None:
        self._over.set()
        self._listener.close()


def http(body: bytes, *headers: str, status: str = "200 OK") -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


def reply(text: str) -> bytes:
    content = {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}]}
    return http(json.dumps(content).encode())


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
MISBEHAVIOURS: dict[str, Answer] = {
    "nothing at all": b"",
    "no answer": [],
    "a body that is cut off": reply("[[5]]")[:-9],
    "a bad status line": b"HELLO\r\n\r\n",
    "a status that is not a number": b"HTTP/1.1 abc OK\r\n\r\n",
    "a long header": b"HTTP/1.1 200 OK\r\nX: " + b"x" * 70_000 + b"\r\n\r\n",
    "many headers": b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200 + b"\r\n",
    "a bad chunk": CHUNKED + b"zz\r\n{}\r\n0\r\n\r\n",
    "a chunk that is cut off": CHUNKED + b"ff\r\n{}",
    "a negative length": b"HTTP/1.1 200 OK\r\nContent-Length: -7\r\n\r\n{}",
    "deep JSON": http(b"[" * 200_000),
    "a long number": http(b'{"choices": ' + b"9" * 5000 + b"}"),
    "no JSON": http(b"<html>"),
    "no UTF-8": http(b"\xff\xfe"),
    "another list": http(b'{"choices": [[]]}'),
    "binary noise": bytes(range(256)) * 20,
    "a slow header": [b"HTTP/1.1 200 OK\r\n", *([b"X: y\r\n"] * 500)],
    "a slow body": [b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n", *([b" "] * 500)],
    "a slow body without a length": [b"HTTP/1.1 200 OK\r\n\r\n", *([b" "] * 500)],
    "a body that never ends": CHUNKED + b"100000\r\n" + b" " * (1 << 20),
    "an error that is cut off": http(b"x" * 99, status="500 Oh")[:-50],
    "an error with a slow body": [b"HTTP/1.1 503 Busy\r\nContent-Length: 500\r\n\r\n", *([b"x"] * 500)],
}


@pytest.fixture
def serve() -> Iterator[Any]:
    servers: list[RawServer] = []

    def start(answers: Callable[[int], Answer]) -> RawServer:
        servers.append(RawServer(answers))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


MESSAGES = grading_messages([{"role": "user", "content": "What is 2 + 2?"}], "4", None, [])


SLOW = [name for name in MISBEHAVIOURS if "slow" in name or name == "no answer"]


@pytest.mark.parametrize("name", MISBEHAVIOURS)
def test_a_misbehaving_server_costs_an_attempt_and_no_more(
    serve: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_BYTES", 1 << 18)
    server = serve(lambda number: reply("Right. [[7]]") if number else MISBEHAVIOURS[name])
    judge = ChatJudge(server.url, "grader", sleep=lambda _: None, attempts=1, timeout=0.2 if name in SLOW else 30)
    found = judge.judge(MESSAGES)
    assert found.score is None and found.problem and "\n" not in found.problem and len(found.problem) < 500
    judge.timeout = 30
    assert judge.judge(MESSAGES)[:3] == (7.0, "Right. [[7]]", 1)


def test_half_of_a_pair_of_code_units_can_be_kept(serve: Any) -> None:
    server = serve(lambda _: http(b'{"choices": [{"message": {"content": "\\ud83d is [[8]]"}}]}'))
    found = ChatJudge(server.url, "grader").judge(MESSAGES)
    assert (found.score, found.reply) == (8.0, "? is [[8]]")


@pytest.mark.parametrize(
    ("first", "rest"),
    [(b"HTTP/1.1 200 OK\r\n", b"X: y\r\n"), (CHUNKED, b"1\r\nx\r\n"), (b"HTTP/1.1 200 OK\r\n\r\n", b" ")],
)
def test_the_time_is_for_the_whole_answer(serve: Any, first: bytes, rest: bytes) -> None:
    """A server that always sends something soon was never too slow: this one sends for 1.8 s."""
    sent: list[bytes] = [first, *([rest] * 90)]
    with pytest.raises(OSError, match=r"no whole answer within 0\.2 s"):
        exchange(urllib.request.Request(serve(lambda _: sent).url, b"{}"), 0.2)


def test_a_body_has_a_limit_and_is_otherwise_whole(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_BYTES", 1000)
    for size, fits in ((1000, True), (1001, False)):
        request = urllib.request.Request(serve(lambda _, size=size: http(b"x" * size)).url, b"{}")
        if fits:
            assert exchange(request, 10) == b"x" * size
        else:
            with pytest.raises(OSError, match="it sends more than 1,000 bytes"):
                exchange(request, 10)


class Counted(list[bytes]):
    """Pieces of an answer, and how many of them were sent."""

    sent = 0

    def __iter__(self) -> Iterator[bytes]:
        for piece in super().__iter__():
            self.sent += 1
            yield piece


def test_a_slow_server_cannot_send_to_its_end(serve: Any) -> None:
    """Its 500 pieces would take 10 s, and none of them is too late for a single read."""
    pieces = Counted([b"HTTP/1.1 200 OK\r\n\r\n", *([b" "] * 500)])
    with pytest.raises(OSError, match=r"no whole answer within 0\.2 s"):
        exchange(urllib.request.Request(serve(lambda _: pieces).url, b"{}"), 0.2)
    assert 0 < pieces.sent < 500


def test_no_more_than_the_limit_is_waited_for(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server keeps the connection open, and does not send the rest."""
    monkeypatch.setattr(module, "MOST_BYTES", 1000)
    begun = [b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n" + b"x" * 5000]
    with pytest.raises(OSError, match="it sends more than 1,000 bytes"):
        exchange(urllib.request.Request(serve(lambda _: begun).url, b"{}"), 10)


def test_an_error_has_a_body_that_is_cut_to_a_limit(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_BYTES_OF_AN_ERROR", 10)
    server = serve(lambda _: http(b"x" * 50, "Retry-After: 7", status="429 Slow"))
    with pytest.raises(urllib.error.HTTPError) as error:
        exchange(urllib.request.Request(server.url, b"{}"), 10)
    assert (error.value.code, error.value.read(), error.value.headers["Retry-After"]) == (429, b"x" * 10, "7")


def test_no_connection_and_no_thread_is_left(serve: Any) -> None:
    server = serve(lambda _: reply("[[1]]"))
    exchange(urllib.request.Request(server.url, b"{}"), 30)
    for thread in threading.enumerate():
        if isinstance(thread, threading.Timer):
            thread.join(20)
            assert not thread.is_alive()


# --- a whole evaluation -----------------------------------------------------------------------------------------------


def grade(tmp_path: Path, url: str, **options: Any) -> list[Any]:
    judge = ChatJudge(url, "grader", **{"sleep": lambda _: None, "timeout": 30, **options})
    part: Any = Part(tmp_path)
    return Grader(judge, at_once=2).grade(part, gradings_of(part, RECORDS), "mine", tell=str, on_progress=None)


def kept(tmp_path: Path) -> list[dict[str, Any]]:
    file = tmp_path / "mt_bench-judgements.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.mark.parametrize("seed", range(3))
def test_a_server_that_misbehaves_at_random_loses_no_judgement(serve: Any, tmp_path: Path, seed: int) -> None:
    """Every second answer is one. Each judgement that was given is on the disk, and none is paid for twice."""
    random_of = random.Random(seed)
    kinds = [name for name in MISBEHAVIOURS if name not in SLOW]
    given = 0
    lock = threading.Lock()

    def answer(_: int) -> Answer:
        nonlocal given
        with lock:
            if random_of.random() < 0.5:
                return MISBEHAVIOURS[random_of.choice(kinds)]
            given += 1
            return reply("[[6]]")

    server = serve(answer)
    for _ in range(20):
        found = grade(tmp_path, server.url, attempts=2)
        assert len({row["key"] for row in kept(tmp_path) if row["score"]}) == given
        if all(judgement.score == 6.0 for _, judgement in found):
            break
    assert given == len(found) == 4


def test_what_was_judged_before_the_judge_refuses_is_kept(serve: Any, tmp_path: Path) -> None:
    """Also the answer that is still on its way while another request is refused."""
    late = threading.Event()

    def answer(number: int) -> Answer:
        if number == 0:
            late.wait(10)
            return reply("[[6]]")
        late.set()
        return http(b"no money", status="402 Payment Required")

    with pytest.raises(ValueError, match="402 Payment Required"):
        grade(tmp_path, serve(answer).url)
    assert [row["score"] for row in kept(tmp_path)] == [6.0]


def test_a_judgement_is_on_the_disk_before_the_next_question_is_sent(serve: Any, tmp_path: Path) -> None:
    seen: list[int] = []

    def answer(_: int) -> Answer:
        seen.append(len(kept(tmp_path)))
        return reply("[[6]]")

    part: Any = Part(tmp_path)
    judge = ChatJudge(serve(answer).url, "grader")
    Grader(judge, at_once=1).grade(part, gradings_of(part, RECORDS), "mine", tell=str, on_progress=None)
    assert seen == [0, 1, 2, 3]


def test_an_evaluation_that_ends_does_not_wait_for_later_attempts(serve: Any, tmp_path: Path) -> None:
    """After Ctrl-C, a judge that is down is not asked again: its next attempt would be an hour away."""
    server = serve(lambda number: http(b"", status="500 Down") if number else reply("[[6]]"))
    judge, part = ChatJudge(server.url, "grader", wait=3600.0), Part(tmp_path)

    def interrupted(title: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    gradings = gradings_of(part, RECORDS)  # type: ignore[arg-type]
    with pytest.raises(KeyboardInterrupt):
        Grader(judge, at_once=2).grade(part, gradings, "mine", tell=str, on_progress=interrupted)  # type: ignore[arg-type]
    assert judge.sleep is None and server.requests <= 4
