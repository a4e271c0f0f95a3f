"""Questions of chat benchmarks: MT-Bench (80 of two turns, arXiv 2306.05685) and WildBench v2 (arXiv 2406.04770)."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lightning_danube.evaluation.asking import AskedModel, Part, part_of, read_jsonl, shown_prompts
from lightning_danube.evaluation.results import Measured
from lightning_danube.evaluation.settings import ChatOptions
from lightning_danube.files import append_line
from lightning_danube.generation.sampling import Sampling
from lightning_danube.inspection.shown import ShownSource
from lightning_danube.text.corpora import Source
from lightning_danube.text.objects import read_objects
from lightning_danube.text.reading import BadRow
from lightning_danube.tokens.chat_template import ChatEncoder, encode_chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Benchmark = Literal["mt_bench", "wildbench"]
TITLES: dict[Benchmark, str] = {"mt_bench": "MT-Bench", "wildbench": "WildBench v2"}
TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}
"""MT-Bench category → its authors' sampling temperature. Other categories and WildBench use greedy decoding."""


@dataclass(frozen=True)
class ChatQuestion:
    """A question of a chat benchmark.

    Args:
        history: messages before the first question.
        turns: the user's messages; the model answers each.
        references: a good answer to each turn, if known.
        checklist: points that a judge should check.
    """

    id: str
    category: str
    history: list[dict[str, str]]
    turns: list[str]
    references: list[str] = field(default_factory=list)
    checklist: list[str] = field(default_factory=list)

    def messages(self, answers: Sequence[str]) -> list[dict[str, str]]:
        """Returns the conversation up to the question that follows these answers."""
        said = list(self.history)
        for number, turn in enumerate(self.turns[: len(answers) + 1]):
            said.append({"role": "user", "content": turn})
            if number < len(answers):
                said.append({"role": "assistant", "content": answers[number]})
        return said


@dataclass(frozen=True)
class ChatQuestions(Part):
    """The part of an evaluation that is one chat benchmark."""

    benchmark: Benchmark
    questions: list[ChatQuestion]
    available: int
    options: ChatOptions
    tokenizer: PreTrainedTokenizerBase
    end_ids: list[int]

    @property
    def title(self) -> str:
        return TITLES[self.benchmark]

    @property
    def has_template(self) -> bool:
        return self.tokenizer.chat_template is not None

    def temperature(self, question: ChatQuestion) -> float:
        return TEMPERATURES.get(question.category, 0.0) if self.benchmark == "mt_bench" else 0.0

    def prompt_ids(self, question: ChatQuestion, answers: Sequence[str]) -> list[int]:
        """Returns the token ids of the next prompt.

        Raises:
            ValueError: the template does not accept these messages.
        """
        return encode_chat(self.tokenizer, question.messages(answers), add_generation_prompt=True)

    def file(self, what: Literal["answers", "judgements"]) -> Path:
        return Path(self.options.keep).expanduser() / f"{self.benchmark}-{what}.jsonl"

    def shown(self, examples: int, tokenizer: PreTrainedTokenizerBase) -> ShownSource:
        def notes(number: int) -> list[str]:
            question = self.questions[number]
            later = [f"turn {turn}: {said}" for turn, said in enumerate(question.turns[1:], start=2)]
            return [f"question {question.id}, {question.category}", *later]

        prompts = [self.prompt_ids(question, []) for question in self.questions]
        shown = shown_prompts(self.title, self.options.path, prompts, notes, examples, tokenizer)
        shown.notes += part_of(len(prompts), self.available)
        if not self.has_template:
            shown.notes.append("the tokenizer has no chat template: asked in that of the H2O-Danube chat models")
        return shown

    def measure(self, model: AskedModel) -> list[Measured]:
        """Generates the answers and writes each to the file. Reuses an earlier run's answers with the same settings.

        `lightning_danube.callbacks.Judge` scores the answers.
        """
        file = self.file("answers")
        kept = {row["key"]: row for row in read_jsonl(file)}
        keys = [self._key(model, question) for question in self.questions]
        pending = [number for number, key in enumerate(keys) if key not in kept]
        for numbers in self._batches(model, pending):
            answered = self._answers(model, [self.questions[number] for number in numbers])
            for number, (answers, shortened) in zip(numbers, answered, strict=True):
                row = self._record(model, keys[number], self.questions[number], answers, shortened)
                kept[keys[number]] = row
                append_line(file, json.dumps(row, ensure_ascii=False))
            model.progress(self.title, sum(key in kept for key in keys), len(keys))
        notes = part_of(len(self.questions), self.available)
        if not self.has_template:
            notes.append("the tokenizer has no chat template: asked in that of the H2O-Danube chat models")
        records = [kept[key] for key in keys]
        notes += model.note_of_cut_prompts(sum(record["shortened"] for record in records))
        found = Measured("chat", self.benchmark, self.title, "score of 1 to 10", percent=False, notes=notes)
        found.not_run = (
            "its answers are written, and no judge is there to score them: add lightning_danube.callbacks.Judge"
        )
        found.records = records
        return [found]

    def _key(self, model: AskedModel, question: ChatQuestion) -> str:
        """Returns a digest of everything that decides an answer."""
        facts = [
            model.digest,
            # A prompt that does not fit the context loses its beginning.
            model.context_length,
            self._template,
            question.id,
            question.turns,
            question.history,
            self.options.new_tokens,
            self.temperature(question),
        ]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]

    @cached_property
    def _template(self) -> str:
        """Returns a digest of the tokenizer and its chat template."""
        return ChatEncoder(self.tokenizer).fingerprint

    def _record(
        self, model: AskedModel, key: str, question: ChatQuestion, answers: list[str], shortened: int
    ) -> dict[str, Any]:
        return {
            "key": key,
            "weights": model.weights,
            "question": question.id,
            "category": question.category,
            "temperature": self.temperature(question),
            "history": question.history,
            "turns": question.turns,
            "answers": answers,
            "shortened": shortened,
        }

    def _batches(self, model: AskedModel, numbers: Sequence[int]) -> Iterator[list[int]]:
        """Yields batches of questions: each has one temperature and fits the model's places."""
        by_temperature: dict[float, list[int]] = {}
        for number in numbers:
            by_temperature.setdefault(self.temperature(self.questions[number]), []).append(number)
        for mine in by_temperature.values():
            lengths = [len(self.prompt_ids(self.questions[number], [])) for number in mine]
            turns = max(len(self.questions[number].turns) for number in mine)
            for batch in model.batches(lengths, turns * self.options.new_tokens):
                yield [mine[place] for place in batch]

    def _answers(self, model: AskedModel, questions: Sequence[ChatQuestion]) -> list[tuple[list[str], int]]:
        """Returns for each question the answers to its turns, and the number of prompts that did not fit."""
        new_tokens = min(self.options.new_tokens, model.context_length // 2)
        room = model.context_length - new_tokens
        sampling = Sampling(temperature=self.temperature(questions[0]))
        answers: list[list[str]] = [[] for _ in questions]
        cut = [0] * len(questions)
        for turn in range(max(len(question.turns) for question in questions)):
            rows = [row for row, question in enumerate(questions) if turn < len(question.turns)]
            prompts = [self.prompt_ids(questions[row], answers[row]) for row in rows]
            seeds = [seed_of(questions[row].id) + turn for row in rows]
            kept = [prompt[-room:] for prompt in prompts]
            new = model.generate(kept, new_tokens, self.end_ids, sampling, seeds)
            for row, prompt, ids in zip(rows, prompts, new, strict=True):
                cut[row] += len(prompt) > room
                answers[row].append(str(model.tokenizer.decode(ids, skip_special_tokens=True)).strip())
        return list(zip(answers, cut, strict=True))


def seed_of(name: str) -> int:
    """Returns the sampling seed for the answers to a question."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4])


def chat_questions(
    benchmark: Benchmark,
    options: ChatOptions,
    tokenizer: PreTrainedTokenizerBase,
    ends: Sequence[int],
    seed: int,
    cache_dir: Path,
) -> ChatQuestions:
    """Returns the part of an evaluation for one chat benchmark.

    Raises:
        ValueError: a file cannot be read, or a row lacks a value; the message names file and row.
    """
    key = f"data.{benchmark}"
    references = _references(options.references, cache_dir, key) if options.references is not None else {}
    make = _of_mt_bench if benchmark == "mt_bench" else _of_wildbench
    source = Source(options.path, name=options.name, split=options.split)
    questions = []
    for file, row, values in read_objects(benchmark, source, cache_dir, called=key):
        if isinstance(values, BadRow):
            raise ValueError(values.message)
        try:
            questions.append(make(values, references))
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise ValueError(
                f"{file}, row {row}: no question of {TITLES[benchmark]} ({type(error).__name__}: {error})"
            ) from None
    available = len(questions)
    if options.limit is not None and options.limit < available:
        numbers = sorted(random.Random(f"{seed}/{benchmark}").sample(range(available), options.limit))
        questions = [questions[number] for number in numbers]
    return ChatQuestions(benchmark, questions, available, options, tokenizer, list(ends))


def _references(path: str, cache_dir: Path, key: str) -> dict[str, list[str]]:
    found = {}
    for file, row, values in read_objects("references", Source(path), cache_dir, called=f"{key}.references"):
        if isinstance(values, BadRow):
            raise ValueError(values.message)
        try:
            found[str(values["question_id"])] = [str(turn) for turn in values["choices"][0]["turns"]]
        except (KeyError, TypeError, IndexError) as error:
            raise ValueError(f"{file}, row {row}: no reference answer ({type(error).__name__}: {error})") from None
    return found


def _of_mt_bench(values: Mapping[str, Any], references: Mapping[str, list[str]]) -> ChatQuestion:
    name, turns = str(values["question_id"]), [str(turn) for turn in values["turns"]]
    if not turns:
        raise KeyError("turns")
    return ChatQuestion(name, str(values["category"]), [], turns, references.get(name, []))


def _of_wildbench(values: Mapping[str, Any], references: Mapping[str, list[str]]) -> ChatQuestion:
    said = [
        {"role": str(message["role"]), "content": str(message["content"])} for message in values["conversation_input"]
    ]
    if said[-1]["role"] != "user":
        raise KeyError("conversation_input does not end with a user's message")
    checklist = [str(point) for point in values["checklist"]]
    name = str(values.get("id") or values["session_id"])
    return ChatQuestion(name, str(values.get("primary_tag", "")), said[:-1], [said[-1]["content"]], [], checklist)
