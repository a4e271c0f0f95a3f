"""MT-Bench with a real judge: SmolLM2 behind llama.cpp's chat completions, on this machine."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from lightning_danube.__main__ import main
from lightning_danube.evaluation.judge import grade_in
from lightning_danube.weights.llama_cpp import import_llama_cpp
from lightning_danube.weights.names import smollm2_file
from tests.evaluation.test_run import CHAT, results
from tests.rows import write_rows

GRADE = 'root ::= "The grade is [[" [1-9] "]]"'
pytestmark = [pytest.mark.slow, pytest.mark.llama_cpp]


class LlamaServer:
    """The one route of llama.cpp's server that a judge needs; the package's own needs a web framework."""

    def __init__(self, gguf: Path) -> None:
        self.model = import_llama_cpp().Llama(str(gguf), n_ctx=2048, n_threads=1, verbose=False)
        self.requests: list[dict[str, Any]] = []
        self.grammar: Any = None
        """What replies are held to, as a server's option."""
        served = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                served.requests.append(body)
                assert self.path == "/v1/chat/completions"
                answer = served.model.create_chat_completion(
                    body["messages"],
                    max_tokens=body["max_tokens"],
                    temperature=body["temperature"],
                    grammar=served.grammar,
                )
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.end_headers()
                self.wfile.write(json.dumps(answer).encode())

            def log_message(self, *_: Any) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.model.close()


def test_mt_bench_with_a_judge_on_this_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    turns = ["What is the capital of France? One word.", "And of Italy?"]
    write_rows(
        tmp_path / "mt.jsonl",
        {"question_id": 1, "category": "humanities", "turns": turns},
        {"question_id": 2, "category": "math", "turns": ["What is 2 + 2?", "And 3 + 3?"]},
    )
    said = [{"role": "user", "content": "Name a colour."}]
    write_rows(
        tmp_path / "wild.jsonl", {"id": "w", "primary_tag": "", "conversation_input": said, "checklist": ["Is it one?"]}
    )
    server = LlamaServer(smollm2_file())
    config = CHAT.replace("TMP/model", "smollm2").replace("TMP", str(tmp_path)).replace("URL", server.url)
    config = config.replace("new_tokens: 5", "new_tokens: 24").replace("attempts: 2", "attempts: 2, new_tokens: 96")
    (tmp_path / "chat.yaml").write_text(config)
    command = ["test", "--config", str(tmp_path / "chat.yaml")]
    try:
        assert main(command) == 0
        found, asked = results(tmp_path, "chat"), len(server.requests)
        assert set(found) == {"mt_bench_turn_1", "mt_bench_turn_2", "mt_bench", "wildbench"}
        judgements = [
            json.loads(line)
            for name in ("mt_bench", "wildbench")
            for line in (tmp_path / "kept" / f"{name}-judgements.jsonl").open()
        ]
        assert len(judgements) == 5 and asked == sum(judgement["attempts"] for judgement in judgements)
        for judgement in judgements:
            assert judgement["reply"].strip() and judgement["score"] == grade_in(judgement["reply"])
        graded = [judgement["score"] for judgement in judgements if judgement["score"] is not None]
        assert sum(found[name]["n"] or 0 for name in ("mt_bench", "wildbench")) == len(graded)
        answers = [json.loads(line) for line in (tmp_path / "kept" / "mt_bench-answers.jsonl").open()]
        assert "Paris" in answers[0]["answers"][0]
        # The second run asks only about what has no grade. So small a model seldom gives one, unless it is held to.
        server.grammar = import_llama_cpp().LlamaGrammar.from_string(GRADE, verbose=False)
        assert main(command) == 0
        assert len(server.requests) - asked == 5 - len(graded)
        found = results(tmp_path, "chat")
        assert (found["mt_bench"]["n"], found["wildbench"]["n"]) == (4, 1)
        assert all(1 <= row["value"] <= 9 for row in found.values())
    finally:
        server.close()
