"""The lm-evaluation-harness on our decoder: the same answers as its own Hugging Face backend on the exported model,
sample by sample, and its tasks on local files."""

import dataclasses
import inspect
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightning_danube.evaluation.academic_tasks import PAPER_TASKS, AcademicTask
from lightning_danube.weights.huggingface import save_hf
from tests.rows import write_rows
from tests.tiny_models import CONFIG, tiny_decoder, tiny_tokenizer

pytestmark = pytest.mark.evaluation

# Norms and rotary angles of transformers are float32 in a float64 model, too: 3e-6 on sums of up to 700 nats.
TOLERANCE = 2e-5
WORDS = ("the", "river", "stone", "then", "light", "other", "walks", "they", "green", "that", "mountain", "them")
TASKS = {task.name: task for task in PAPER_TASKS}


def words(seed: int, count: int) -> str:
    source = random.Random(seed)
    return " ".join(source.choice(WORDS) for _ in range(count))


def arc(n: int) -> dict[str, Any]:
    texts = [words(100 * n + k, 1 + (n + k) % 4) for k in range(4)]
    return {"question": words(n, 5), "choices": {"label": list("ABCD"), "text": texts}, "answerKey": "ABCD"[n % 4]}


def winogrande(n: int) -> dict[str, Any]:
    sentence = f"{words(n, 2)} _ {words(n + 50, 3)}"
    return {"sentence": sentence, "option1": "river", "option2": "the stone", "answer": str(1 + n % 2)}


def gsm8k(n: int) -> dict[str, Any]:
    return {"question": words(n, 6), "answer": f"{words(n + 9, 3)}\n#### {n}"}


def coqa(n: int) -> dict[str, Any]:
    said = {"input_text": [words(n, 1), words(n + 1, 2)]}
    return {"story": words(n, 30), "questions": {"input_text": ["who?", "what?"]}, "answers": said}


LAYOUTS: dict[str, tuple[str, dict[str, str], Callable[[int], dict[str, Any]]]] = {
    "arc_challenge": ("allenai/ai2_arc/ARC-Challenge", {"train": "train", "test": "test"}, arc),
    "winogrande": ("allenai/winogrande/winogrande_xl", {"train": "train", "test": "validation"}, winogrande),
    "gsm8k": ("openai/gsm8k/main", {"train": "train", "test": "test"}, gsm8k),
    "coqa": ("EleutherAI/coqa", {"test": "validation"}, coqa),
}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Six questions of four tasks, in the hub's layout."""
    for folder, splits, make in LAYOUTS.values():
        for first, split in enumerate(splits.values()):
            write_rows(tmp_path / folder / f"{split}.jsonl", *[make(n) for n in range(40 * first, 40 * first + 6)])
    return tmp_path


def exported(path: Path, context: int) -> tuple[Any, Any]:
    """A random decoder in float64, and the harness's Hugging Face backend on its export."""
    from lm_eval.models.huggingface import HFLM

    from lightning_danube.tokens.tokenizer import adding_bos

    decoder = tiny_decoder(dataclasses.replace(CONFIG, max_position_embeddings=context)).double().eval()
    tokenizer = adding_bos(tiny_tokenizer())
    ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    save_hf(decoder, path, tokenizer, bos_id=ids[0], eos_id=ids[1], pad_id=ids[2])
    return (decoder, tokenizer), HFLM(pretrained=str(path), dtype="float64", batch_size=1, device="cpu")


def with_fewer_shots(name: str, shots: int) -> AcademicTask:
    return dataclasses.replace(TASKS[name], shots=min(shots, TASKS[name].shots))


# 96 tokens are fewer than most prompts have, so that beginnings are cut; three texts, or all, a batch.
@pytest.mark.parametrize(("context", "batch_tokens"), [(2048, 1000), (96, 4096)])
@pytest.mark.parametrize("name", ["arc_challenge", "winogrande", "gsm8k", "coqa"])
def test_answers_are_those_of_the_harness_own_backend(
    name: str, context: int, batch_tokens: int, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.models.huggingface import HFLM

    from lightning_danube.evaluation import harness

    monkeypatch.setattr(harness, "NEW_TOKENS", 16)
    monkeypatch.setattr(HFLM, "max_gen_toks", 16)
    (decoder, tokenizer), theirs = exported(directory / "model", context)
    prepared = harness.prepare_task(with_fewer_shots(name, 2), directory, None, seed=0)
    assert prepared.documents == 6 and not prepared.notes
    lm = harness.DecoderLM(decoder, tokenizer, batch_tokens=batch_tokens)
    mine, expected = harness.ask(lm, prepared), harness.ask(theirs, prepared)
    assert mine.values.keys() == expected.values.keys() and mine.values
    assert (lm.truncated > 0) == (context == 96)
    for ours, reference in zip(mine.samples, expected.samples, strict=True):
        assert ours["arguments"] == reference["arguments"] and ours["doc_id"] == reference["doc_id"]
        for (answer,), (wanted,) in zip(ours["resps"], reference["resps"], strict=True):
            if isinstance(wanted, str):
                assert answer == wanted
            else:
                assert answer[0] == pytest.approx(wanted[0], abs=TOLERANCE) and answer[1] == wanted[1]
        assert {m: ours[m] for m in ours["metrics"]} == {m: reference[m] for m in reference["metrics"]}


@pytest.mark.parametrize("name", ["arc_challenge", "gsm8k"])
def test_questions_in_a_chat_template_are_those_of_the_harness_own_backend(
    name: str, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.models.huggingface import HFLM

    from lightning_danube.evaluation import harness

    monkeypatch.setattr(harness, "NEW_TOKENS", 16)
    monkeypatch.setattr(HFLM, "max_gen_toks", 16)
    (decoder, tokenizer), theirs = exported(directory / "model", 2048)
    prepared = harness.prepare_task(with_fewer_shots(name, 2), directory, None, seed=0)
    lm = harness.DecoderLM(decoder, tokenizer)
    mine, expected = (harness.ask(model, prepared, chat_template=True) for model in (lm, theirs))
    assert mine.samples[0]["arguments"][0][0].count("<bos>") == 5  # two examples of two turns, and the question
    for ours, reference in zip(mine.samples, expected.samples, strict=True):
        assert ours["arguments"] == reference["arguments"]
        assert {m: ours[m] for m in ours["metrics"]} == {m: reference[m] for m in reference["metrics"]}
        if name == "gsm8k":
            assert ours["resps"] == reference["resps"]


def test_whole_texts_are_as_likely_as_the_harness_own_backend_says(tmp_path: Path) -> None:
    from lm_eval.api.instance import Instance

    from lightning_danube.evaluation import harness

    (decoder, tokenizer), theirs = exported(tmp_path / "model", 24)
    requests = [Instance("loglikelihood_rolling", {}, (words(n, 3 + 9 * n),), n) for n in range(3)]
    mine = harness.DecoderLM(decoder, tokenizer).loglikelihood_rolling(requests)
    assert mine == pytest.approx(theirs.loglikelihood_rolling(requests), abs=TOLERANCE)


# --- tasks on local files ---------------------------------------------------------------------------------------------


def test_what_is_not_there_is_replaced_where_a_note_can_say_by_what(directory: Path) -> None:
    from lightning_danube.evaluation import harness

    folder = directory / LAYOUTS["arc_challenge"][0]
    task = with_fewer_shots("arc_challenge", 3)
    (folder / "test.jsonl").rename(folder / "validation.jsonl")
    prepared = harness.prepare_task(task, directory, None, seed=0)
    assert prepared.notes == ["the questions are those of validation, because test is missing"]
    (folder / "train.jsonl").unlink()
    prepared = harness.prepare_task(task, directory, None, seed=0)
    assert prepared.notes[1:] == ["the examples are other questions of validation"]
    (folder / "validation.jsonl").rename(folder / "test.jsonl")
    prepared = harness.prepare_task(task, directory, None, seed=0)
    assert prepared.notes == ["the examples are other questions of test"]


@pytest.mark.parametrize("split", ["test", "validation"])
def test_a_question_is_never_its_own_example(split: str, directory: Path) -> None:
    """Four questions with three examples each: these are the three others."""
    from lightning_danube.evaluation import harness

    folder = directory / LAYOUTS["arc_challenge"][0]
    for name in ("train", "test"):
        (folder / f"{name}.jsonl").unlink()
    questions = [arc(n) for n in range(4)]
    write_rows(folder / f"{split}.jsonl", *questions)
    prepared = harness.prepare_task(with_fewer_shots("arc_challenge", 3), directory, None, seed=0)
    lm = CountingLM()
    harness.ask(lm, prepared)
    for number, (prompt, _) in enumerate(lm.asked[::4]):
        for other, question in enumerate(questions):
            assert prompt.count(question["question"]) == 1, (number, other)
        assert prompt.endswith(f"Question: {questions[number]['question']}\nAnswer:")


def test_a_group_is_asked_with_as_many_examples_as_there_are(directory: Path) -> None:
    """MMLU has exactly five of them for each of its 57 subjects."""
    import lm_eval.tasks

    from lightning_danube.evaluation import harness

    folder = Path(lm_eval.tasks.__file__).parent / TASKS["mmlu"].folder
    manager = harness.TaskManager(include_defaults=False, include_path=str(folder))
    subjects = [name.removeprefix("mmlu_") for name in harness.leaf_names(manager, "mmlu")]
    for number, subject in enumerate(subjects):
        rows = [
            {"question": words(n, 4), "choices": list("wxyz"), "answer": n % 4}
            for n in range(7 * number, 7 * number + 7)
        ]
        write_rows(directory / "cais" / "mmlu" / subject / "dev.jsonl", *rows[:5])
        write_rows(directory / "cais" / "mmlu" / subject / "test.jsonl", *rows[5:])
    prepared = harness.prepare_task(TASKS["mmlu"], directory, 60, seed=0)
    assert len(prepared.parts) == 57 and prepared.documents == 60 and prepared.available == 114
    lm = CountingLM()
    answered = harness.ask(lm, prepared)
    assert len(answered.values["acc"]) == 60 and len(lm.asked) == 240
    assert lm.asked[0][0].count("Answer:") == 6


def CountingLM() -> Any:
    """A model of the harness that notes what it is asked, and finds everything equally likely."""
    from lm_eval.api.model import LM

    class Counting(LM):
        def __init__(self) -> None:
            super().__init__()
            self.asked: list[tuple[str, str]] = []

        def loglikelihood(self, requests: Any) -> list[tuple[float, bool]]:
            self.asked += [request.args for request in requests]
            return [(0.0, False)] * len(requests)

        def loglikelihood_rolling(self, requests: Any) -> list[float]:
            raise AssertionError

        def generate_until(self, requests: Any) -> list[str]:
            return [""] * len(requests)

    return Counting()


def test_missing_questions_are_told_with_their_file(directory: Path) -> None:
    from lightning_danube.evaluation import harness

    with pytest.raises(harness.MissingData, match="there are 6 examples, too few for 25 before each question"):
        harness.prepare_task(TASKS["arc_challenge"], directory, None, seed=0)

    with pytest.raises(harness.MissingData, match=r"there is no .*/baber/piqa/validation.jsonl"):
        harness.prepare_task(TASKS["piqa"], directory, None, seed=0)
    question = {"question": "?", "choices": ["a"] * 4, "answer": 0}
    write_rows(directory / "cais" / "mmlu" / "anatomy" / "test.jsonl", question)
    with pytest.raises(harness.MissingData, match=r"56 of 57 parts: there is no .*/cais/mmlu/\w+/test.jsonl"):
        harness.prepare_task(with_fewer_shots("mmlu", 0), directory, None, seed=0)
    with pytest.raises(harness.MissingData, match="Rowan/hellaswag cannot be loaded from the hub"):
        harness.prepare_task(TASKS["hellaswag"], None, None, seed=0)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (arc(3) | {"answerKey": "E"}, r"test.jsonl, row 3: the task arc_challenge cannot use it \(ValueError"),
        (arc(3) | {"choices": {"label": ["A"], "text": ["x"]}}, r"test.jsonl, row 3: .*cannot use it"),
        (arc(3) | {"question": None}, None),
        (arc(3) | {"answerKey": None}, r"test.jsonl, row 3: the task arc_challenge cannot use it"),
        ({"question": "x"}, "test.jsonl, row 3: the column '\\w+' is missing"),
        (arc(3) | {"choices": "none"}, "test.jsonl: a column holds values of several kinds"),
    ],
)
def test_a_bad_row_is_named(row: dict[str, Any], message: str | None, directory: Path) -> None:
    from lightning_danube.evaluation import harness

    write_rows(directory / LAYOUTS["arc_challenge"][0] / "test.jsonl", arc(1), arc(2), row)
    task = with_fewer_shots("arc_challenge", 1)
    if message is None:  # an empty question is one
        assert harness.prepare_task(task, directory, None, seed=0).documents == 3
        return
    with pytest.raises(ValueError, match=message):
        harness.prepare_task(task, directory, None, seed=0)
    if "cannot use" in message:  # of the first row it is told, too
        write_rows(directory / LAYOUTS["arc_challenge"][0] / "test.jsonl", row, arc(1))
        with pytest.raises(ValueError, match=r"test.jsonl, row 1: the task arc_challenge cannot use it"):
            harness.prepare_task(task, directory, None, seed=0)


def test_a_limit_takes_of_each_part_its_share() -> None:
    from lightning_danube.evaluation import harness

    sizes = {"a": 10, "b": 30, "c": 1}
    chosen = harness.chosen_documents(sizes, 8, seed=1)
    assert {name: len(numbers) for name, numbers in chosen.items()} == {"a": 2, "b": 6, "c": 0}
    for name, numbers in chosen.items():
        assert numbers == sorted(set(numbers)) and all(0 <= number < sizes[name] for number in numbers)
    assert chosen == harness.chosen_documents(sizes, 8, seed=1) != harness.chosen_documents(sizes, 8, seed=2)
    assert harness.chosen_documents(sizes, 100, seed=1)["b"] == list(range(30))


def test_more_new_tokens_than_the_context_has_are_a_row_that_says_so(directory: Path) -> None:
    from lightning_danube.evaluation import harness

    (decoder, tokenizer), _ = exported(directory / "model", 96)
    prepared = harness.prepare_task(with_fewer_shots("gsm8k", 0), directory, None, seed=0)
    with pytest.raises(harness.MissingData, match="answers have 256 tokens, and the context of the model is 96"):
        harness.ask(harness.DecoderLM(decoder, tokenizer), prepared)


def test_the_command_line_reports_what_was_run_and_what_was_not(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from lightning_danube.__main__ import main

    exported(directory / "model", 1024)
    config = Path(__file__).resolve().parents[2] / "configs" / "evaluation" / "paper.yaml"
    options = {
        "model.init_args.weights": directory / "model",
        "data.init_args.directory": directory,
        "data.init_args.limit": 4,
        "data.init_args.tasks": "[winogrande,coqa,piqa]",
        "trainer.accelerator": "cpu",
        "runs": directory / "runs",
    }
    arguments = [part for key, value in options.items() for part in (f"--{key}", str(value))]
    assert main(["test", "--config", str(config), *arguments]) == 0
    printed = capsys.readouterr().out
    assert "PIQA was not run: there is no " in printed and "average of 2 of 3" in printed
    assert "Winogrande, CoQA: 4 of 6 questions, chosen by seed" in printed
    (run,) = (directory / "runs" / "evaluation-test").iterdir()
    summary = json.loads((run / "summary.json").read_text())
    rows = {row["name"]: row for row in summary["results"]}
    assert (rows["winogrande"]["n"], rows["coqa"]["n"], rows["piqa"]["n"]) == (4, 4, None)
    documents = [json.loads(line) for line in (run / "documents" / "winogrande.jsonl").open()]
    assert sum(document["acc"] for document in documents) / 4 == rows["winogrande"]["value"]
    average = summary["averages"]["academic"]
    assert average["names"] == ["winogrande", "coqa"]
    assert average["measured"] == pytest.approx(50 * (rows["winogrande"]["value"] + rows["coqa"]["value"]))
    assert average["paper"]["Danube3 4B"] == pytest.approx((76.48 + 77.23) / 2)


def test_questions_of_the_training_texts_are_counted(
    directory: Path, tiny_run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Two of the questions stand in what the tiny run was trained on."""
    from lightning_danube.__main__ import main

    seen = [json.loads(line)["text"] for line in (tiny_run.parents[2] / "web.jsonl").open()][5:7]
    folder = directory / LAYOUTS["winogrande"][0]
    questions = [winogrande(n) for n in range(3)]
    questions += [winogrande(n) | {"sentence": f"{text} _ and"} for n, text in enumerate(seen)]
    write_rows(folder / "validation.jsonl", *questions)
    config = Path(__file__).resolve().parents[2] / "configs" / "evaluation" / "paper.yaml"
    options = {
        "model.init_args.weights": tiny_run,
        "data.init_args.directory": directory,
        "data.init_args.tasks": "[winogrande]",
        "trainer.accelerator": "cpu",
        "runs": tmp_path / "runs",
    }
    arguments = [part for key, value in options.items() for part in (f"--{key}", str(value))]
    assert main(["test", "--config", str(config), *arguments]) == 0
    printed = capsys.readouterr().out
    assert "2 of 2 questions share 13 words in a row, or all they have, with the run's training texts" in printed
    assert re.search(r"prompts lost their beginning, at 32 tokens", printed)


def test_the_harness_still_has_the_private_parts_that_are_used() -> None:
    from lm_eval.api import task
    from lm_eval.api.model import TemplateLM
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._index import Entry
    from lm_eval.tasks._yaml_loader import load_yaml

    assert {"path", "resolve_func"} <= inspect.signature(load_yaml).parameters.keys()
    assert {"yaml_path", "cfg", "tags"} <= {field.name for field in dataclasses.fields(Entry)}
    assert isinstance(TaskManager.task_index, property)
    assert list(inspect.signature(TemplateLM._loglikelihood_tokens).parameters) == ["self", "requests", "kwargs"]
    assert callable(task.tqdm), "replaced while the harness asks, so that one progress bar is shown"


@pytest.mark.parametrize("name", ["arc_challenge", "gsm8k"])
def test_the_first_prompt_is_shown_as_it_is_asked(name: str, directory: Path) -> None:
    from lightning_danube.evaluation import harness
    from lightning_danube.evaluation.parts.academic import AcademicQuestions

    task, tokenizer = with_fewer_shots(name, 2), tiny_tokenizer()
    shown = AcademicQuestions(task, directory, None, 0).shown(2, tokenizer)
    decoder = tiny_decoder(dataclasses.replace(CONFIG, max_position_embeddings=2048))
    asked: list[list[int]] = []

    class Listening(harness.DecoderLM):
        def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> Any:
            asked.extend([*context, *continuation] for _, context, continuation in requests)
            return super()._loglikelihood_tokens(requests)

        def _continue(self, prompts: Any, new_tokens: int, until: Any) -> list[str]:
            asked.extend(map(list, prompts))
            return [""] * len(prompts)

    prepared = harness.prepare_task(task, directory, None, seed=0)
    harness.ask(Listening(decoder, tokenizer), prepared)
    examples = [[token.id for token in one.tokens] for one in shown.examples]
    assert len(examples) == (4 if name == "arc_challenge" else 1)
    assert all(one in asked for one in examples)
    assert (shown.kept, shown.marks) == (6, "scored" if name == "arc_challenge" else None)
    if shown.marks:
        marked = [tokenizer.decode([token.id for token in one.tokens if token.marked]) for one in shown.examples]
        assert [str(text).strip() for text in marked] == arc(40)["choices"]["text"]
