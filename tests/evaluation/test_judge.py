"""The judge's protocol and its patience, against a real HTTP server on this machine."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from lightning_danube.evaluation.judge import (
    ChatJudge,
    JudgeRefused,
    _seconds,
    estimated_cost,
    grade_in,
    grading_messages,
    judgement_key,
)


class ScriptedServer:
    """Answers chat completions with the given replies, one after the other, the last one for ever: a text, or the
    status of an error. `refuses`: fields of a request that it refuses by name."""

    def __init__(self, replies: list[str | int | bytes]) -> None:
        self.replies, self.requests = replies, list[dict[str, Any]]()
        self.headers: list[Any] = []
        self.refuses: set[str] = set()
        scripted = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                reply = scripted.replies[min(len(scripted.requests), len(scripted.replies) - 1)]
                scripted.requests.append({"path": self.path, **body})
                scripted.headers.append(self.headers)
                refused = scripted.refuses & body.keys()
                self.send_response(400 if refused else reply if isinstance(reply, int) else 200)
                self.send_header("Content-Type", "application/json")
                if reply == 429:
                    self.send_header("Retry-After", "7")
                self.end_headers()
                said = reply if isinstance(reply, str) else "no"
                # A text that ends with an ellipsis was cut off.
                ended = "length" if said.endswith("…") else "stop"
                answer = {"choices": [{"message": {"role": "assistant", "content": said}, "finish_reason": ended}]}
                if refused:
                    error = {"message": f"Unsupported parameter: '{min(refused)}' is not supported with this model."}
                    reply = json.dumps({"error": error}).encode()
                self.wfile.write(reply if isinstance(reply, bytes) else json.dumps(answer).encode())

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def serve() -> Iterator[Any]:
    servers: list[ScriptedServer] = []

    def make(*replies: str | int | bytes) -> ScriptedServer:
        servers.append(ScriptedServer(list(replies)))
        return servers[-1]

    yield make
    for server in servers:
        server.close()


MESSAGES = grading_messages([{"role": "user", "content": "What is 2 + 2?"}], "4", "Four", ["Is it a number?"])


def judge_of(server: ScriptedServer, **options: Any) -> tuple[ChatJudge, list[float]]:
    waits: list[float] = []
    return ChatJudge(server.url, "grader", sleep=waits.append, **options), waits


def test_what_a_judge_is_told_and_where(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "secret")
    server = serve("Right and short.\n[[9]]")
    judge, waits = judge_of(server, api_key_variable="MY_KEY", new_tokens=99)
    assert judge.judge(MESSAGES)[:3] == (9.0, "Right and short.\n[[9]]", 1) and not waits
    (request,) = server.requests
    assert request["path"] == "/v1/chat/completions"
    assert (request["model"], request["temperature"], request["max_tokens"]) == ("grader", 0, 99)
    assert server.headers[0]["Authorization"] == "Bearer secret"
    told = request["messages"][1]["content"]
    for part in ("What is 2 + 2?", "### Answer to grade\n4", "Four", "- Is it a number?"):
        assert part in told
    assert "[[N]]" in request["messages"][0]["content"]


def test_without_a_key_the_judge_gets_none(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the user's token for the hub either."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.delenv("MY_KEY", raising=False)
    server = serve("[[9]]")
    judge_of(server, api_key_variable="MY_KEY")[0].judge(MESSAGES)
    assert "Authorization" not in server.headers[0]


@pytest.mark.parametrize(
    ("reply", "grade"),
    [
        ("[[7]]", 7),
        ("Not [[2]], on reflection [[ 3.5 ]]", 3.5),
        ("10 of 10", None),
        ("[[0]]", None),
        ("[[11]]", None),
        ("", None),
        ("<think>Perhaps a [[3]]?</think>It is fine. [[7]]", 7),
        ("Perhaps a [[3]]?</think>It is fine. [[7]]", 7),
        ("<think>Perhaps a [[3]]?</think>It is fine.", None),
        ("<think>Perhaps a [[3]], but", None),
    ],
)
def test_the_last_grade_counts_if_it_is_one(reply: str, grade: float | None) -> None:
    assert grade_in(reply) == grade


def test_a_judge_that_is_down_is_asked_again_after_longer_and_longer_waits(serve: Any) -> None:
    judge, waits = judge_of(serve(500, 429, b"no json", "[[4]]"))
    assert judge.judge(MESSAGES) == (4.0, "[[4]]", 4, None)
    # 429 says for how long; the others double.
    assert waits == [2.0, 7.0, 8.0]


def test_nonsense_is_asked_about_once_more_and_never_becomes_a_grade(serve: Any) -> None:
    server = serve("I like it.", "[[6]]")
    assert judge_of(server)[0].judge(MESSAGES)[:3] == (6.0, "[[6]]", 2)
    assert [message["role"] for message in server.requests[1]["messages"]] == ["system", "user", "assistant", "user"]
    found = judge_of(serve("I like it."), attempts=3)[0].judge(MESSAGES)
    assert found == (None, "I like it.", 3, "its reply held no grade")


def test_a_judge_that_stays_away_leaves_no_grade(serve: Any) -> None:
    server = serve("x")
    server.close()
    judge, waits = judge_of(server, attempts=2, timeout=2)
    found = judge.judge(MESSAGES)
    assert found.score is None and "does not answer" in str(found.problem) and waits == [2.0]
    assert "gives an answer without a message" in str(judge_of(serve(b"{}"), attempts=1)[0].judge(MESSAGES).problem)


def test_a_wrong_key_is_told_at_once(serve: Any) -> None:
    server = serve(401)
    with pytest.raises(JudgeRefused, match=r"the judge at http.*/v1/chat/completions answers 401 Unauthorized"):
        judge_of(server)[0].judge(MESSAGES)
    assert len(server.requests) == 1


@pytest.mark.parametrize("refused", [{"temperature"}, {"max_tokens"}, {"temperature", "max_tokens"}])
def test_a_field_that_a_judge_refuses_is_left_out_or_replaced(serve: Any, refused: set[str]) -> None:
    """As models that think do: one more request for each field, once in all."""
    server = serve("[[8]]")
    server.refuses = refused
    judge, waits = judge_of(server, new_tokens=99)
    assert judge.judge(MESSAGES) == (8.0, "[[8]]", 1, None) and not waits
    assert judge.judge(MESSAGES).score == 8.0
    assert len(server.requests) == 2 + len(refused)
    last = server.requests[-1]
    assert ("temperature" in last) == ("temperature" not in refused)
    limit = "max_completion_tokens" if "max_tokens" in refused else "max_tokens"
    assert last[limit] == 99 and not refused & last.keys()


def test_a_judge_that_refuses_something_else_is_refused(serve: Any) -> None:
    server = serve(400)
    with pytest.raises(JudgeRefused, match="answers 400 Bad Request"):
        judge_of(server)[0].judge(MESSAGES)
    assert len(server.requests) == 1


def test_a_reply_that_was_cut_off_is_no_grade(serve: Any) -> None:
    thinking = "At first sight it is a [[3]], but on the other hand…"
    found = judge_of(serve(thinking, "[[7]]"))[0].judge(MESSAGES)
    assert found == (7.0, "[[7]]", 2, None)
    found = judge_of(serve(thinking), attempts=2, new_tokens=9)[0].judge(MESSAGES)
    assert found == (None, thinking, 2, "its reply was cut off after new_tokens 9: raise new_tokens")


def test_a_judge_that_only_thinks_is_not_asked_again(serve: Any) -> None:
    reply = json.dumps({"choices": [{"message": {"content": None}, "finish_reason": "length"}]}).encode()
    server = serve(reply)
    found = judge_of(server)[0].judge(MESSAGES)
    assert found.score is None and "raise new_tokens" in str(found.problem) and len(server.requests) == 1


def test_requests_keep_to_the_rate(serve: Any) -> None:
    judge, waits = judge_of(serve("[[1]]"), requests_per_minute=6)
    for _ in range(3):
        judge.judge(MESSAGES)
    # Ten seconds from the first each; the sleeps themselves are not slept here.
    assert len(waits) == 2 and waits[0] == pytest.approx(10, abs=1) and waits[1] == pytest.approx(20, abs=1)


def test_costs_are_estimated_from_lengths() -> None:
    prompts = [[{"role": "user", "content": "x" * 4000}]] * 3
    assert estimated_cost(prompts, 100, None, None) == (3, 3000, 300, None)
    assert estimated_cost(prompts, 100, 2.0, 10.0).dollars == pytest.approx((3000 * 2 + 300 * 10) / 1e6)


def test_a_judgement_is_known_by_all_that_decides_it() -> None:
    other = grading_messages([{"role": "user", "content": "What is 2 + 2?"}], "5", "Four", ["Is it a number?"])
    keys = {judgement_key(MESSAGES, "a"), judgement_key(MESSAGES, "b"), judgement_key(other, "a")}
    assert len(keys) == 3 and judgement_key(list(MESSAGES), "a") in keys


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_url": "localhost:8000"}, "base_url is 'localhost:8000': give one such as"),
        ({"attempts": 0}, "attempts is 0: it must be at least 1"),
        ({"requests_per_minute": 0}, "requests_per_minute is 0: it must be above 0"),
    ],
)
def test_an_impossible_judge_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ChatJudge(**({"base_url": "http://x/v1", "model": "m"} | options))


def test_another_wording_is_another_judgement(monkeypatch: pytest.MonkeyPatch) -> None:
    before = judgement_key(MESSAGES, "a")
    monkeypatch.setattr("lightning_danube.evaluation.judge.PROMPTS", "danube-judge-2")
    assert judgement_key(MESSAGES, "a") != before


@pytest.mark.parametrize(
    ("told", "seconds"), [(None, None), ("7", 7.0), ("0.5", 0.5), ("-3", 0.0), ("86400", 600.0), ("Mon, 1 Jan", None)]
)
def test_a_server_cannot_ask_for_more_than_ten_minutes(told: str | None, seconds: float | None) -> None:
    assert _seconds(told) == seconds


def test_the_second_turn_is_graded_after_the_first_one() -> None:
    said = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "What is 2 + 2?"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "And 3 + 3?"},
    ]
    instructions, told = grading_messages(said, "6", "Six", ["Is it even?", "Is it short?"])
    assert instructions["role"] == "system" and told["role"] == "user"
    assert told["content"] == (
        "### System\nBe kind.\n\n### User\nWhat is 2 + 2?\n\n### Assistant\n4\n\n### User\nAnd 3 + 3?\n\n"
        "### Answer to grade\n6\n\n### A correct answer, to compare with\nSix\n\n"
        "### Questions to ask yourself about the answer\n- Is it even?\n- Is it short?\n\n"
        "Grade the answer to the last message of the user."
    )
