"""The parts of an evaluation, asking a model whose answers the test knows. Their questions: test_data.py."""

import copy
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_danube import evaluation
from lightning_danube.evaluation.academic_tasks import PAPER_TASKS
from lightning_danube.evaluation.asking import AskedModel
from lightning_danube.evaluation.parts.academic import AcademicQuestions
from lightning_danube.evaluation.parts.chat import ChatQuestion, ChatQuestions, chat_questions, seed_of
from lightning_danube.evaluation.parts.needles import make_needles
from lightning_danube.evaluation.parts.passages import PassageQuestion, passage_questions
from lightning_danube.evaluation.parts.perplexity import RunningText
from lightning_danube.evaluation.settings import ChatOptions, NeedleOptions, RetrievalOptions
from lightning_danube.generation.sampling import GREEDY, Sampling
from lightning_danube.text.corpora import Source
from tests.rows import write_rows
from tests.tiny_models import TEMPLATE, tiny_tokenizer


class KnownModel(AskedModel):
    """A model whose losses are a hundredth of the tokens' ids, and whose answers are the numbers of the questions."""

    def __init__(self, places: int = 1000, context: int = 128) -> None:
        self.tokenizer, self.weights, self.digest, self.places = tiny_tokenizer(), "mine", "digest", places
        self.context, self.on_progress, self.chat_template = context, None, False
        self.calls: list[Any] = []
        self.said = 0

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def context_length(self) -> int:
        return self.context

    def nats(self, ids_BT: Tensor) -> Tensor:
        self.calls.append(len(ids_BT))
        return ids_BT[:, 1:].double() / 100

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        new_tokens: int,
        ends: Sequence[int],
        sampling: Sampling = GREEDY,
        seeds: Sequence[int] | None = None,
    ) -> list[list[int]]:
        self.calls.append((list(map(list, prompts)), new_tokens, sampling.temperature, seeds))
        answers = range(self.said, self.said + len(prompts))
        self.said += len(prompts)
        return [self.tokenizer(f" answer {number} ", add_special_tokens=False).input_ids for number in answers]


# --- perplexity -------------------------------------------------------------------------------------------------------


def test_perplexity_and_bits_are_those_of_the_losses() -> None:
    ids = np.random.default_rng(0).integers(100, 300, (5, 150))
    model = KnownModel(places=310)
    (row,) = RunningText("wiki", ids, [600, 610, 620, 630, 640]).measure(model)
    nats = ids[:, 1:] / 100
    assert model.calls == [2, 2, 1]
    assert (
        row.estimate is not None and row.estimate.value == pytest.approx(math.exp(nats.mean())) and row.estimate.n == 5
    )
    assert row.more["tokens"] == 5 * 149
    assert row.more["bits_a_byte"] == pytest.approx(np.log2(np.exp(nats)).sum() / 3100)
    found = [(one["first"], one["last"], one["perplexity"]) for one in row.more["by_position"]]
    # The loss at a position is the next token's.
    for (first, last, value), (start, end) in zip(found, [(0, 63), (64, 127), (128, 149)], strict=True):
        assert (first, last) == (start, end)
        assert value == pytest.approx(math.exp(ids[:, start + 1 : end + 2].mean() / 100))


# --- needles and passages ---------------------------------------------------------------------------------------------


def test_each_trial_hides_another_needle_and_each_seed_others(tmp_path: Path) -> None:
    hay = Source(
        str(write_rows(tmp_path / "hay.jsonl", {"text": "Rivers run over stones, and the light is green. " * 20}))
    )

    def answers(seed: int, trials: int = 6) -> list[str]:
        options = NeedleOptions([200], depths=[0.5], haystack=hay, trials=trials)
        (part,) = make_needles(options, 200, seed, tiny_tokenizer(), tmp_path)
        return [needle.answer for needle in part.needles]

    assert len(set(answers(0))) == 6 and answers(0) == answers(0) and answers(0)[:3] == answers(0, 3)
    assert not set(answers(0)) & set(answers(1))


def test_limits_are_drawn_by_the_seed(tmp_path: Path) -> None:
    asked = str(
        write_rows(
            tmp_path / "asked.jsonl", *({"question": f"q{n}", "answers": "a", "passages": []} for n in range(30))
        )
    )
    chats = str(
        write_rows(tmp_path / "chats.jsonl", *({"question_id": n, "category": "x", "turns": ["t"]} for n in range(30)))
    )

    def drawn(seed: int) -> list[list[str]]:
        part = passage_questions(RetrievalOptions(asked, limit=5), tiny_tokenizer(), [1], seed, tmp_path)
        chat = chat_questions("mt_bench", ChatOptions(chats, limit=5), tiny_tokenizer(), [1], seed, tmp_path)
        assert (part.available, chat.available) == (30, 30)
        return [[one.question for one in part.questions], [one.id for one in chat.questions]]

    assert drawn(0) == drawn(0)
    for first, second in zip(drawn(0), drawn(1), strict=True):
        assert first != second and len(set(first)) == 5
        assert sorted(first, key=lambda name: int(name.strip("q"))) == first


def test_an_answer_may_stand_in_any_passage() -> None:
    there = [["the Nile", "no"], ["no", "the Nile"], ["no", "no"], []]
    found = [PassageQuestion("Which?", ["Red", "Nile"], passages, []).answer_is_there for passages in there]
    assert found == [True, True, False, False]


# --- chats ------------------------------------------------------------------------------------------------------------

WRITING = ChatQuestion("w", "writing", [], ["Write.", "Go on."])
ROLEPLAY = ChatQuestion(
    "r", "roleplay", [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}], ["Who?"]
)
MATH = ChatQuestion("m", "math", [], ["What is 2 + 2?", "And 3 + 3?"])
HISTORY = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]


def chats(directory: Path, *questions: ChatQuestion, benchmark: Any = "mt_bench", **options: Any) -> ChatQuestions:
    made = ChatOptions("x", keep=str(directory), **{"new_tokens": 5, **options})
    return ChatQuestions(benchmark, list(questions), len(questions), made, tiny_tokenizer(), [257])


def with_template(part: ChatQuestions, template: str) -> ChatQuestions:
    tokenizer = copy.deepcopy(part.tokenizer)
    tokenizer.chat_template = template
    return ChatQuestions(part.benchmark, part.questions, part.available, part.options, tokenizer, part.end_ids)


def keys(directory: Path) -> dict[str, str]:
    """The key of the first question, and its keys after a change of one fact each."""
    part, model, other = chats(directory, WRITING), KnownModel(), KnownModel()
    other.digest = "other"
    longer, shorter = chats(directory, new_tokens=6), KnownModel(context=64)
    wild = chats(directory, benchmark="wildbench")
    return {
        "": part._key(model, WRITING),
        "weights": part._key(other, WRITING),
        "question": part._key(model, ChatQuestion("v", "writing", [], WRITING.turns)),
        "first turn": part._key(model, ChatQuestion("w", "writing", [], ["Write!", "Go on."])),
        "second turn": part._key(model, ChatQuestion("w", "writing", [], ["Write.", "Go on!"])),
        "history": part._key(model, ChatQuestion("w", "writing", HISTORY, WRITING.turns)),
        "temperature": part._key(model, ChatQuestion("w", "stem", [], WRITING.turns)),
        "benchmark": wild._key(model, WRITING),
        "new tokens": longer._key(model, WRITING),
        "template": with_template(part, TEMPLATE.replace("{{ bos_token }}", ""))._key(model, WRITING),
        "context": part._key(shorter, WRITING),
    }


@pytest.mark.parametrize(
    "fact",
    [
        *("weights", "question", "first turn", "second turn", "history"),
        *("temperature", "benchmark", "new tokens", "template", "context"),
    ],
)
def test_an_answer_is_not_taken_for_one_with_another_fact(tmp_path: Path, fact: str) -> None:
    found = keys(tmp_path)
    assert found[fact] != found[""] == keys(tmp_path / "elsewhere")[""]


def test_what_a_judge_alone_sees_makes_no_other_answer(tmp_path: Path) -> None:
    graded = ChatQuestion("w", "writing", [], WRITING.turns, ["a reference"], ["a point"])
    part = chats(tmp_path)
    assert part._key(KnownModel(), graded) == part._key(KnownModel(), WRITING)


def test_answers_are_drawn_at_the_temperature_of_their_category_with_their_own_seeds(tmp_path: Path) -> None:
    model, part = KnownModel(), chats(tmp_path, WRITING, MATH, ROLEPLAY)
    (row,) = part.measure(model)
    said = [record["answers"] for record in row.records]
    assert [len(answers) for answers in said] == [2, 2, 1] and len(
        {answer for answers in said for answer in answers}
    ) == 5
    by_prompt = {
        tuple(prompt): (new_tokens, temperature, seed)
        for prompts, new_tokens, temperature, seeds in model.calls
        for prompt, seed in zip(prompts, seeds, strict=True)
    }
    expected = {}
    for question, answers, temperature in zip(part.questions, said, (0.7, 0.0, 0.7), strict=True):
        for turn in range(len(question.turns)):
            # A later question follows the earlier ones and the model's own answers.
            asked: list[dict[str, str]] = list(question.history)
            for earlier in range(turn):
                asked.append({"role": "user", "content": question.turns[earlier]})
                asked.append({"role": "assistant", "content": answers[earlier]})
            asked.append({"role": "user", "content": question.turns[turn]})
            text = "".join(f"<bos>{message['content']}<eos>" for message in asked)
            prompt = model.tokenizer(text, add_special_tokens=False).input_ids
            expected[tuple(prompt)] = (5, temperature, seed_of(question.id) + turn)
    assert by_prompt == expected
    assert len({seed for _, _, seed in expected.values()}) == 5
    assert [record["temperature"] for record in row.records] == [0.7, 0.0, 0.7]


def test_wildbench_is_answered_greedily_whatever_its_category(tmp_path: Path) -> None:
    model = KnownModel()
    chats(tmp_path, ROLEPLAY, benchmark="wildbench").measure(model)
    assert [call[2] for call in model.calls] == [0.0]


def test_a_conversation_that_is_too_long_loses_its_beginning(tmp_path: Path) -> None:
    long = ChatQuestion("l", "math", [], ["one two three four " * 5, "why?"])
    model, part = KnownModel(context=64), chats(tmp_path, long, new_tokens=40)
    (row,) = part.measure(model)
    # At most half of the context is left to the answer.
    whole = [part.prompt_ids(long, row.records[0]["answers"][:turn]) for turn in (0, 1)]
    assert [call[:2] for call in model.calls] == [([ids[-32:]], 32) for ids in whole]
    assert row.records[0]["shortened"] == 2 and row.notes == ["2 prompts lost their beginning, at 64 tokens"]


def test_answers_are_kept_and_only_others_are_asked_for(tmp_path: Path) -> None:
    (before,) = chats(tmp_path, WRITING, MATH).measure(KnownModel())
    model = KnownModel()
    model.said = 100
    (row,) = chats(tmp_path, MATH, ROLEPLAY, WRITING).measure(model)
    assert [record["question"] for record in row.records] == ["m", "r", "w"]
    assert row.records[0] == before.records[1] and row.records[2] == before.records[0]
    assert row.records[1]["answers"] == ["answer 100"] and len(model.calls) == 1


# --- academic benchmarks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("gsm8k", {"exact_match,flexible-extract": [1.0, 1.0], "exact_match,strict-match": [1.0, 0.0]}, 0.5),
        ("hellaswag", {"acc": [1.0, 1.0], "acc_norm": [1.0, 0.0]}, 0.5),
        ("piqa", {"acc_norm": [1.0, 1.0], "acc": [0.0, 0.0]}, 0.0),
    ],
)
def test_the_score_is_that_of_the_papers_metric(
    monkeypatch: pytest.MonkeyPatch, name: str, values: dict[str, list[float]], expected: float
) -> None:
    answered = SimpleNamespace(values=values, samples=[{"n": 1}, {"n": 2}])
    harness = SimpleNamespace(
        MissingData=LookupError,
        DecoderLM=lambda *_, **__: SimpleNamespace(truncated=3, max_length=96),
        ask=lambda lm, prepared, chat_template: answered,
        record=lambda sample: sample,
    )
    monkeypatch.setitem(sys.modules, "lightning_danube.evaluation.harness", harness)
    monkeypatch.setattr(evaluation, "harness", harness, raising=False)
    task = next(task for task in PAPER_TASKS if task.name == name)
    prepared: Any = SimpleNamespace(notes=["a note"], available=9)
    model: Any = SimpleNamespace(decoder=None, tokenizer=None, places=8, chat_template=True)
    (row,) = AcademicQuestions(task, None, None, 0, prepared).measure(model)
    assert row.estimate is not None and (row.estimate.value, row.estimate.n) == (expected, 2)
    assert {metric: row.more[metric]["value"] for metric in values} == {m: sum(v) / 2 for m, v in values.items()}
    assert row.more.get("guessing") == task.chance
    assert row.notes == [
        "a note", "2 of 9 questions, chosen by seed", "asked in the chat template",
        "3 prompts lost their beginning, at 96 tokens",
    ]  # fmt: skip
    (row,) = AcademicQuestions(task, None, None, 0, missing="no file").measure(model)
    assert row.estimate is None and row.not_run == "no file"
