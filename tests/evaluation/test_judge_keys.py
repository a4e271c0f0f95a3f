"""The key of a judge's API goes to the judge alone: to no other host, and into no output."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from lightning_danube.__main__ import main
from lightning_danube.evaluation.judge import ChatJudge, JudgeRefused
from tests.evaluation.test_run import CHAT
from tests.rows import write_rows
from tests.tiny_models import save_tiny

KEY = "sk-test-0123456789abcdef"
MESSAGES = [{"role": "user", "content": "?"}]


Answer = Callable[[BaseHTTPRequestHandler], tuple[int, dict[str, str], str]]


@contextmanager
def serving(answer: Answer) -> Iterator[tuple[str, list[Any]]]:
    """The address of a server whose answers (status, headers, body) a function makes, and all requests that it got."""
    seen: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            seen.append((self.command, self.path, dict(self.headers)))
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, headers, body = answer(self)
            self.send_response(status, headers.pop("reason", None))
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body.encode())

        do_GET = do_POST

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1", seen
    finally:
        server.shutdown()
        server.server_close()


def reply(text: str) -> str:
    return json.dumps({"choices": [{"message": {"content": text}, "finish_reason": "stop"}]})


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with ExitStack() as stack:
        other, seen = stack.enter_context(serving(lambda _: (200, {}, reply("[[9]]"))))
        place = f"{other}/chat/completions?key={KEY}"
        url, asked = stack.enter_context(serving(lambda _: (status, {"Location": place}, "")))
        with pytest.raises(JudgeRefused, match=rf"is elsewhere \({status}\): if http://127.*set base_url") as refused:
            ChatJudge(url, "m").judge(MESSAGES)
    assert not seen and len(asked) == 1 and KEY not in str(refused.value)


def echo(handler: BaseHTTPRequestHandler) -> str:
    return str(handler.headers["Authorization"])


@pytest.mark.parametrize(
    "answer",
    [
        lambda handler: (401, {}, f"wrong key {echo(handler)}"),
        lambda handler: (401, {"reason": f"Unauthorized {echo(handler)}"}, ""),
        # The key begins before the place where a message is cut, and ends behind it.
        lambda handler: (500, {}, "x" * 190 + echo(handler)),
        lambda handler: (500, {}, "x" * 490 + echo(handler)),
        lambda handler: (200, {}, reply(f"{echo(handler)} [[7]]")),
        lambda handler: (200, {}, reply(f"no grade {echo(handler)}")),
        lambda handler: (200, {}, f"no JSON {echo(handler)}"),
    ],
)
def test_a_server_that_repeats_the_key_puts_it_into_no_judgement(answer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with serving(answer) as (url, seen):
        judge = ChatJudge(url, "m", attempts=2, sleep=lambda _: None)
        try:
            told = str(judge.judge(MESSAGES))
        except JudgeRefused as error:
            told = str(error)
    assert seen[0][2]["Authorization"] == f"Bearer {KEY}"
    assert "sk-" not in told and "0123" not in told


@pytest.mark.parametrize(
    "url", [f"http://me:{KEY}@host/v1", f"http://host/v1?key={KEY}", f"me:{KEY}@host/v1", "http://host/v1?x=1"]
)
def test_an_address_with_a_key_is_refused_without_showing_it(url: str) -> None:
    with pytest.raises(ValueError, match=r"base_url is .*(give one such as|in the environment variable)") as refused:
        ChatJudge(url, "m")
    assert "0123" not in str(refused.value)


def test_a_key_that_no_header_takes_is_refused_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\nX: y")
    with pytest.raises(ValueError, match="the key in OPENAI_API_KEY holds a space") as refused:
        ChatJudge("http://localhost/v1", "m")
    assert "0123" not in str(refused.value)


def texts_below(place: Path) -> Iterator[tuple[Path, str]]:
    for file in place.rglob("*"):
        if file.suffix == ".parquet":
            yield file, str(pq.read_table(file).to_pylist())
        elif file.is_file():
            yield file, file.read_bytes().decode("utf-8", "replace")


@pytest.mark.parametrize("ends", ["graded", "refused"])
def test_no_output_of_a_run_holds_the_key(
    ends: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A server that repeats the key and sends codes of a terminal, and a run with --debug: everything is searched."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    save_tiny(tmp_path / "model")
    write_rows(tmp_path / "mt.jsonl", {"question_id": 1, "category": "math", "turns": ["2 + 2?", "<b>3</b>?"]})
    bodies = iter(range(100))

    def answer(handler: BaseHTTPRequestHandler) -> tuple[int, dict[str, str], str]:
        said = f"{echo(handler)} \x1b[31m<script>x</script>"
        if ends == "refused":
            return 403, {}, said
        return (200, {}, reply(f"{said} [[7]]")) if next(bodies) == 0 else (500, {}, said)

    with serving(answer) as (url, seen):
        text = CHAT.replace("TMP", str(tmp_path)).replace("URL", url).replace("attempts: 2", "attempts: 1")
        text = "".join(line for line in text.splitlines(keepends=True) if "wildbench" not in line)
        (tmp_path / "chat.yaml").write_text(text)
        code = main(["test", "--config", str(tmp_path / "chat.yaml"), "--debug"])
    assert code == (2 if ends == "refused" else 0) and len(seen) >= 1
    printed = "".join(capsys.readouterr())
    assert KEY not in printed and "0123" not in printed and "\x1b" not in printed
    assert "***" in printed or ends == "graded"
    names = set()
    for file, content in texts_below(tmp_path):
        names.add(file.name)
        assert KEY not in content and KEY[3:20] not in content, file
        assert file.suffix != ".md" or ("<script>" not in content.replace("\\<", "") and "\x1b" not in content), file
    if ends == "graded":
        assert {"mt_bench-judgements.jsonl", "report.md", "results.parquet", "summary.json"} <= names
        (report,) = tmp_path.rglob("report.md")
        assert "have no grade" in report.read_text() and r"Bearer \*\*\*" in report.read_text()
        assert main(["report", str(report.parent)]) == 0
        (page,) = tmp_path.rglob("*.html")
        assert "<script>x" not in page.read_text() and KEY not in page.read_text()
