"""Evaluation through the command line: what it measures, writes, resumes from, and says of what it cannot do."""

import dataclasses
import json
import math
import os
import random
import re
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from lightning.pytorch import Callback
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_danube.__main__ import main
from lightning_danube.callbacks import Judge
from lightning_danube.evaluation.judge import ChatJudge
from lightning_danube.evaluation.task import Evaluation
from lightning_danube.generation.token_stream import generate
from lightning_danube.weights.loading import load_decoder
from tests.evaluation.test_exchange import MISBEHAVIOURS, SLOW, Answer, RawServer, reply
from tests.evaluation.test_judge import ScriptedServer
from tests.rows import write_rows
from tests.tiny_models import CONFIG, save_tiny, tiny_tokenizer

YAML = """
name: asked
runs: TMP/runs
data:
  class_path: lightning_danube.evaluation.EvaluationData
  init_args:
    tokenizer: ${model.init_args.weights}
    context_length: 160
    texts:
      wiki: {path: TMP/texts.jsonl}
    text_rows: 3
    needle: {lengths: [160], depths: [0.0, 1.0], trials: 2, haystack: {path: TMP/texts.jsonl}}
    retrieval: {path: TMP/questions.jsonl, new_tokens: 4}
    cache_dir: TMP/cache
model:
  class_path: lightning_danube.evaluation.Evaluation
  init_args:
    weights: TMP/model
    places: 400
trainer:
  accelerator: cpu
  devices: 1
  enable_progress_bar: false
  callbacks:
    - class_path: lightning_danube.callbacks.EvaluationReport
"""
CHAT = """
name: chat
runs: TMP/runs
data:
  class_path: lightning_danube.evaluation.EvaluationData
  init_args:
    tokenizer: ${model.init_args.weights}
    mt_bench: {path: TMP/mt.jsonl, keep: TMP/kept, new_tokens: 5}
    wildbench: {path: TMP/wild.jsonl, keep: TMP/kept, new_tokens: 5}
    cache_dir: TMP/cache
model:
  class_path: lightning_danube.evaluation.Evaluation
  init_args: {weights: TMP/model}
trainer:
  accelerator: cpu
  devices: 1
  enable_progress_bar: false
  callbacks:
    - class_path: lightning_danube.callbacks.Judge
      init_args: {base_url: URL, model: grader, at_once: 1, attempts: 2}
    - class_path: lightning_danube.callbacks.EvaluationReport
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    save_tiny(tmp_path / "model", dataclasses.replace(CONFIG, max_position_embeddings=512))
    write_rows(tmp_path / "texts.jsonl", *({"text": f"{n}: the river and the other stones. " * 4} for n in range(6)))
    write_rows(
        tmp_path / "questions.jsonl",
        {"question": "Which river?", "answers": "Nile", "passages": ["It is the Nile."]},
        {"question": "Which letter?", "answers": "q", "passages": ["none"]},
    )
    write_rows(
        tmp_path / "mt.jsonl",
        {"question_id": 1, "category": "math", "turns": ["What is 2 + 2?", "And 3 + 3?"]},
        {"question_id": 2, "category": "writing", "turns": ["Write.", "Go on."]},
    )
    said = [{"role": "user", "content": "Sort."}]
    write_rows(
        tmp_path / "wild.jsonl", {"id": "w", "primary_tag": "Coding", "conversation_input": said, "checklist": ["?"]}
    )
    (tmp_path / "asked.yaml").write_text(YAML.replace("TMP", str(tmp_path)))
    (tmp_path / "chat.yaml").write_text(CHAT.replace("TMP", str(tmp_path)))
    return tmp_path


def run(place: Path, *options: str, config: str = "asked", verb: str = "test") -> int:
    return main([verb, "--config", str(place / f"{config}.yaml"), *options])


def directory(place: Path, name: str = "asked") -> Path:
    return max((place / "runs" / f"{name}-test").glob("version_*"))


def results(place: Path, name: str = "asked") -> dict[str, dict[str, Any]]:
    summary = json.loads((directory(place, name) / "summary.json").read_text())
    return {row["name"]: row for row in summary["results"]}


@pytest.mark.usefixtures("no_warnings")
def test_a_report_of_text_needles_and_passages(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(place) == 0
    printed = capsys.readouterr()
    assert "arning" not in printed.err + printed.out
    found = results(place)
    assert list(found) == ["wiki", "needle_160", "answers"]

    # The perplexity by its definition, on the documents as training would read them.
    decoder, tokenizer = load_decoder(str(place / "model")).eval(), tiny_tokenizer()
    ids: list[int] = []
    for line in (place / "texts.jsonl").read_text().splitlines():
        text = tokenizer(json.loads(line)["text"], add_special_tokens=False).input_ids
        ids += [tokenizer.bos_token_id, *text, tokenizer.eos_token_id]
    rows = torch.tensor(ids[: 3 * 160]).view(3, 160)
    with torch.no_grad():
        logs = decoder(rows[:, :-1]).double().log_softmax(-1).gather(2, rows[:, 1:, None])[..., 0]
    # float32 weights, sums in another order.
    assert found["wiki"]["value"] == pytest.approx(math.exp(-logs.mean()), rel=1e-5)
    assert found["wiki"]["low"] < found["wiki"]["value"] < found["wiki"]["high"] and found["wiki"]["n"] == 3
    more = found["wiki"]["more"]
    assert more["tokens"] == 3 * 159
    by_position = {(one["first"], one["last"]): one["perplexity"] for one in more["by_position"]}
    assert list(by_position) == [(0, 63), (64, 127), (128, 159)]
    assert by_position[64, 127] == pytest.approx(math.exp(-logs[:, 64:128].mean()), rel=1e-5)
    text = "".join(str(tokenizer.decode(row[1:].tolist())) for row in rows)
    assert more["bits_a_byte"] == pytest.approx(-float(logs.sum()) / math.log(2) / len(text.encode()), rel=1e-5)

    assert found["needle_160"]["n"] == 4 and set(found["needle_160"]["more"]["by_depth"]) == {"0.0", "1.0"}
    needles = [json.loads(line) for line in (directory(place) / "documents" / "needle_160.jsonl").open()]
    assert [needle["depth"] for needle in needles] == [0.0, 0.0, 1.0, 1.0]
    answers = [json.loads(line) for line in (directory(place) / "documents" / "answers.jsonl").open()]
    assert [answer["answers"] for answer in answers] == [["Nile"], ["q"]]
    assert found["answers"]["value"] == sum(answer["right"] for answer in answers) / 2
    assert "in 50.0 % of the questions a passage holds the answer" in found["answers"]["notes"]

    report = (directory(place) / "report.md").read_text()
    for part in ("# Evaluation of ", "## Perplexity", "129–160", "| 160 tokens |", "arXiv 2407.09276", "| 73.37 |"):
        assert part in report, part
    table = pq.read_table(directory(place) / "results.parquet").to_pylist()
    assert [row["name"] for row in table if row["measured"]] == list(found)
    assert next(row["value"] for row in table if row["model"] == "Danube3 4B") == pytest.approx(0.7337)
    events = EventAccumulator(str(directory(place)), size_guidance={"images": 0}).Reload()
    (picture,) = events.Images("evaluation")
    assert picture.encoded_image_string.startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        (("--trainer.precision", "64-true"), 1e-5),
        # Sixteen bits of a random model whose weights are ten times the usual size.
        (("--trainer.precision", "bf16-mixed"), 0.1),
        (("--model.init_args.dtype", "bfloat16"), 0.1),
    ],
)
def test_other_types_measure_the_same(place: Path, options: tuple[str, ...], tolerance: float) -> None:
    assert run(place) == 0
    expected = results(place)["wiki"]["value"]
    assert run(place, *options) == 0
    assert results(place)["wiki"]["value"] == pytest.approx(expected, rel=tolerance)


@pytest.mark.slow
def test_answers_do_not_depend_on_how_they_are_batched(place: Path) -> None:
    assert run(place) == 0 and run(place, "--model.init_args.places", "1") == 0
    first, second = sorted((place / "runs" / "asked-test").glob("version_*"))
    for part in ("needle_160", "answers"):
        assert (first / "documents" / f"{part}.jsonl").read_text() == (
            second / "documents" / f"{part}.jsonl"
        ).read_text()


@pytest.mark.slow
def test_chats_do_not_depend_on_how_they_are_batched(place: Path) -> None:
    turns = ["Write a line.", "And now one that is longer, please."]
    many = [{"question_id": n, "category": "writing", "turns": turns[: 1 + n % 2]} for n in range(5)]
    write_rows(place / "mt.jsonl", *many)
    path = place / "chat.yaml"
    before, _, after = path.read_text().partition("    - class_path: lightning_danube.callbacks.Judge\n")
    path.write_text(before + after.partition("\n")[2])
    said = []
    for places in ("1", "8192"):
        kept = str(place / f"kept-{places}")
        assert (
            run(place, "--model.init_args.places", places, "--data.init_args.mt_bench.keep", kept, config="chat") == 0
        )
        rows = [json.loads(line) for line in (Path(kept) / "mt_bench-answers.jsonl").open()]
        said.append({row["question"]: row["answers"] for row in rows})
    assert said[0] == said[1] and len({tuple(answers) for answers in said[0].values()}) == 5


def with_judge(place: Path, server: ScriptedServer | RawServer) -> None:
    path = place / "chat.yaml"
    path.write_text(path.read_text().replace("base_url: URL", f"base_url: {server.url}"))


def test_answers_are_graded_kept_and_gone_on_from(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # The second answer of the first question gets no grade at first.
    server = ScriptedServer(["[[8]]", "hm", "hm", "[[4]]", "[[3]]", "[[2]]"])
    with_judge(place, server)
    assert run(place, config="chat") == 0
    printed = capsys.readouterr().out
    assert "MT-Bench: 4 judgements by grader, about" in printed and "no price is given" in printed
    found = results(place, "chat")
    scores = {name: (found[name]["value"], found[name]["n"]) for name in found}
    assert scores == {
        "mt_bench_turn_1": (6.0, 2),
        "mt_bench_turn_2": (3.0, 1),
        "mt_bench": (5.0, 3),
        "wildbench": (2.0, 1),
    }
    assert "1 of 4 answers have no grade and count nowhere (its reply held no grade)" in found["mt_bench"]["notes"]
    assert found["mt_bench"]["more"]["by_category"] == {"math": {"score": 8, "n": 1}, "writing": {"score": 3.5, "n": 2}}
    answers = [json.loads(line) for line in (place / "kept" / "mt_bench-answers.jsonl").open()]
    assert [answer["question"] for answer in answers] == ["1", "2"] and len(answers[0]["answers"]) == 2
    judgements = [json.loads(line) for line in (place / "kept" / "mt_bench-judgements.jsonl").open()]
    assert [judgement["score"] for judgement in judgements] == [8, None, 4, 3]
    assert {judgement["prompts"] for judgement in judgements} == {"danube-judge-1"}

    # A greedy answer is the model's own; what the judge saw is what was kept.
    decoder, tokenizer = load_decoder(str(place / "model")).eval(), tiny_tokenizer()
    asked = tokenizer("<bos>What is 2 + 2?<eos>", add_special_tokens=False).input_ids
    (ids,) = generate(decoder, [asked], 5, eos_ids=[tokenizer.eos_token_id])
    assert answers[0]["answers"][0] == str(tokenizer.decode(ids, skip_special_tokens=True)).strip()
    assert answers[0]["answers"][0] in server.requests[0]["messages"][1]["content"]

    # The next run asks for nothing but the one that has no grade. A line that a kill broke off is made anew.
    with (place / "kept" / "mt_bench-judgements.jsonl").open("a") as file:
        file.write('{"key": "broken off')
    asked_before = len(server.requests)
    server.replies = ["[[10]]"]
    assert run(place, config="chat") == 0
    assert len(server.requests) == asked_before + 1
    found = results(place, "chat")
    assert (found["mt_bench"]["value"], found["mt_bench"]["n"]) == (6.25, 4)
    assert len((place / "kept" / "mt_bench-answers.jsonl").read_text().splitlines()) == 2
    server.close()


def test_a_judge_that_thinks_grades_a_whole_run(place: Path) -> None:
    """Its server refuses two fields of a request. Its first two replies end within a thought that names a grade."""
    server = ScriptedServer(["<think>Perhaps a [[3]], but…", "<think>Perhaps a [[9]], or", "[[8]]", "[[6]]"])
    server.refuses = {"temperature", "max_tokens"}
    with_judge(place, server)
    path = place / "chat.yaml"
    path.write_text(path.read_text().replace("attempts: 2", "attempts: 3, new_tokens: 99"))
    server.replies[:0] = ["refused"] * 2  # a reply for each refused request
    assert run(place, config="chat") == 0
    judgements = [json.loads(line) for line in (place / "kept" / "mt_bench-judgements.jsonl").open()]
    assert [judgement["score"] for judgement in judgements] == [8, 6, 6, 6]
    assert results(place, "chat")["mt_bench"]["value"] == 6.5
    accepted = server.requests[2:]
    assert {request.get("max_completion_tokens") for request in accepted} == {99}
    assert not any(server.refuses & request.keys() for request in accepted)
    server.close()


@pytest.mark.medium
def test_a_whole_run_with_a_judge_that_misbehaves_at_random(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of its answers are damaged. The same command, repeated, ends with all grades, and pays for each one once."""
    dice, given = random.Random(3), 0

    def answer(_: int) -> Answer:
        nonlocal given
        if dice.random() < 0.5:
            return MISBEHAVIOURS[dice.choice([name for name in MISBEHAVIOURS if name not in SLOW])]
        given += 1
        return reply("[[6]]")

    monkeypatch.setattr(ChatJudge, "_wait", lambda *_: None)
    server = RawServer(answer)
    with_judge(place, server)
    ended = False
    for _ in range(20):
        assert run(place, config="chat") == 0
        found = results(place, "chat")
        if ended := [found[name]["n"] for name in ("mt_bench", "wildbench")] == [4, 1]:
            break
    server.close()
    assert ended and given == 5 < server.requests
    assert [found[name]["value"] for name in ("mt_bench_turn_1", "mt_bench_turn_2", "mt_bench", "wildbench")] == [
        6.0
    ] * 4


def test_without_a_judge_answers_are_written_and_not_scored(place: Path) -> None:
    path = place / "chat.yaml"
    before, _, after = path.read_text().partition("    - class_path: lightning_danube.callbacks.Judge\n")
    path.write_text(before + after.partition("\n")[2])
    assert run(place, config="chat") == 0
    found = results(place, "chat")
    assert found["mt_bench"]["value"] is None and "no judge is there" in found["mt_bench"]["not_run"]
    assert (place / "kept" / "wildbench-answers.jsonl").is_file()


def test_nothing_is_sent_that_costs_too_much(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server = ScriptedServer(["[[8]]"])
    with_judge(place, server)
    path = place / "chat.yaml"
    prices = "attempts: 2, price_in: 1000, price_out: 1000, most_dollars: 0.5"
    path.write_text(path.read_text().replace("attempts: 2", prices))
    assert run(place, config="chat") == 2
    assert "judging MT-Bench would cost about" in capsys.readouterr().err and not server.requests
    server.close()


def test_a_judge_that_refuses_ends_the_run_in_one_line(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server = ScriptedServer([404])
    with_judge(place, server)
    assert run(place, config="chat") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: the judge at http") and "404 Not Found" in error and error.count("\n") == 1
    server.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--data.init_args.tasks", "[pika]"), "--data.init_args.tasks names 'pika': did you mean piqa?"),
        (
            ("--data.init_args.context_length", "600"),
            "--data.init_args.context_length is 600, the model of .* was made for 512",
        ),
        (
            ("--data.init_args.tokenizer", "mistral"),
            "--data.init_args.tokenizer has 32,000 tokens, the model of .* knows 272",
        ),
    ],
)
def test_a_mistake_is_told_in_one_line(
    place: Path, options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(place, *options) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and re.search(message, error), error


class Terminated(Callback):
    """What a scheduler does to a run that is out of time."""

    def on_test_batch_start(self, *_: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


def test_it_stops_when_told_to(place: Path) -> None:
    path = place / "asked.yaml"
    path.write_text(f"{path.read_text()}    - class_path: tests.evaluation.test_run.Terminated\n")
    assert run(place) == 128 + signal.SIGTERM
    assert not (place / "runs" / "asked-test").exists()


def test_it_measures_and_does_not_train(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ("fit", "validate", "predict"):
        assert run(place, verb=verb) == 2
        assert f"Evaluation has no {verb}: say test" in capsys.readouterr().err


def test_what_is_missing_for_academic_tasks_is_told(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "lightning_danube.evaluation.harness", raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert run(place, "--data.init_args.tasks", "[piqa]") == 2
    error = capsys.readouterr().err
    assert "an academic benchmark needs lm_eval, which is not installed; type: " in error
    assert "[evaluation]" in error and error.count("\n") == 1


def test_it_runs_on_one_device(place: Path) -> None:
    class Ranks:
        world_size = 2

    task, trainer = Evaluation(str(place / "model")), Ranks()
    task.trainer = trainer  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"an evaluation runs on one device: set --trainer.devices 1"):
        task.setup("test")


def test_an_impossible_model_is_refused(place: Path) -> None:
    with pytest.raises(ValueError, match=r"model.places is 0: it must be at least 1"):
        Evaluation(str(place / "model"), places=0)
    path = place / "model" / "chat_template.jinja"
    assert path.is_file()
    path.rename(place / "template")
    with pytest.raises(ValueError, match=r"model.chat_template: the tokenizer of .* has none: leave it out"):
        Evaluation(str(place / "model"), chat_template=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"at_once": 0}, r"the judge's at_once is 0: it must be at least 1"),
        ({"most_dollars": 1.0, "price_in": 2.0}, r"the judge's most_dollars needs price_in and price_out"),
    ],
)
def test_an_impossible_judge_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Judge("http://localhost/v1", "m", **options)


def test_the_report_is_of_evaluations_alone(tiny: Path, capsys: pytest.CaptureFixture[str], tiny_run: Path) -> None:
    callbacks = ["--trainer.callbacks+", "lightning_danube.callbacks.EvaluationReport"]
    command = ["test", "--config", str(tiny / "tiny.yaml"), "--ckpt_path", str(tiny_run), *callbacks]
    assert main(command) == 2
    assert "EvaluationReport reports on Evaluation with EvaluationData: remove it" in capsys.readouterr().err


def test_transformers_still_warns_of_long_texts_once() -> None:
    """`Evaluation` says that the warning was given: what does not fit is cut, and counted in the report."""
    key = "sequence-length-is-longer-than-the-specified-maximum"
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 1
    tokenizer("two words")
    assert tokenizer.deprecation_warnings[key]


def test_answers_are_kept_for_all_weights_in_their_type(tmp_path: Path) -> None:
    """The last value of a matrix and the type count, so that answers of one model are never taken for another's."""
    digests = []
    for number, dtype in ((0, None), (0, "bfloat16"), (1, None)):
        save_tiny(tmp_path / "model")
        weights = load_file(tmp_path / "model" / "model.safetensors")
        weights["model.layers.0.mlp.down_proj.weight"][-1, -1] += number
        save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
        digests.append(Evaluation(str(tmp_path / "model"), dtype=dtype).asked.digest)
        shutil.rmtree(tmp_path / "model")
    assert len(set(digests)) == 3
