"""Questions to be answered from passages: retrieval-augmented generation, scored by whether the output has the answer.

Passages come with a question, or TF-IDF retrieves them from a corpus. TF-IDF matches words, not meaning. So the score
measures the reader; the report also shows how often the retrieved passages contain the answer.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_danube.evaluation.asking import AskedModel, Part, part_of, shown_prompts
from lightning_danube.evaluation.results import Measured, columns_of, mean_of
from lightning_danube.evaluation.settings import FUNCTIONS, RetrievalOptions
from lightning_danube.inspection.shown import ShownSource
from lightning_danube.text.corpora import DOCUMENTATION, Source, local_files
from lightning_danube.text.objects import read_objects
from lightning_danube.text.reading import BadRow, read_rows
from lightning_danube.tokens.chat_template import encode_chat
from lightning_danube.tokens.tokenizer import begin_token, encode_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

INSTRUCTION = "Answer the question from the passages, with a few words and nothing else."


@dataclass(frozen=True)
class PassageQuestion:
    question: str
    answers: list[str]
    passages: list[str]
    prompt_ids: list[int]

    @property
    def answer_is_there(self) -> bool:
        """Returns whether a passage contains an answer."""
        return any(says(passage, self.answers) for passage in self.passages)


@dataclass(frozen=True)
class PassageQuestions(Part):
    """The part of an evaluation whose questions are answered from passages."""

    questions: list[PassageQuestion]
    available: int
    new_tokens: int
    end_ids: list[int]
    source: str

    @property
    def title(self) -> str:
        return "answers from passages"

    def is_right(self, question: PassageQuestion, text: str) -> bool:
        return says(text, question.answers)

    def shown(self, examples: int, tokenizer: PreTrainedTokenizerBase) -> ShownSource:
        def notes(number: int) -> list[str]:
            question = self.questions[number]
            there = "a passage holds it" if question.answer_is_there else "no passage holds it"
            return [f"accepted answers: {', '.join(question.answers)}; {there}"]

        prompts = [question.prompt_ids for question in self.questions]
        shown = shown_prompts(self.title, self.source, prompts, notes, examples, tokenizer)
        shown.notes += part_of(len(prompts), self.available)
        return shown

    def measure(self, model: AskedModel) -> list[Measured]:
        prompts = [question.prompt_ids for question in self.questions]
        texts = model.continuations(self.title, prompts, self.new_tokens, self.end_ids)
        right = [self.is_right(question, text) for question, text in zip(self.questions, texts, strict=True)]
        there = [float(question.answer_is_there) for question in self.questions]
        row = Measured(
            "retrieval",
            "answers",
            "answers",
            "answer said",
            mean_of(list(map(float, right))),
            notes=part_of(len(right), self.available),
        )
        row.more = {"answer_is_in_a_passage": columns_of(mean_of(there))}
        row.notes.append(f"in {100 * sum(there) / len(there):.1f} % of the questions a passage holds the answer")
        row.notes.append(f"the questions are those of {self.source}: the paper's own set was not published")
        room = model.context_length - self.new_tokens
        row.notes += model.note_of_cut_prompts(sum(len(prompt) > room for prompt in prompts))
        row.records = [
            {
                "question": question.question,
                "answers": question.answers,
                "passages": question.passages,
                "said": text,
                "right": one,
            }
            for question, text, one in zip(self.questions, texts, right, strict=True)
        ]
        return [row]


def says(text: str, answers: Sequence[str]) -> bool:
    """Returns whether a text contains one of the answers as whole words, ignoring case and punctuation."""
    there = f" {' '.join(_words(text))} "
    return any(f" {' '.join(_words(answer))} " in there for answer in answers if _words(answer))


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def passage_questions(
    options: RetrievalOptions, tokenizer: PreTrainedTokenizerBase, ends: Sequence[int], seed: int, cache_dir: Path
) -> PassageQuestions:
    """Returns the part of an evaluation for questions about passages.

    Raises:
        ValueError: a file cannot be read, or a row lacks a value; the message names file and row.
    """
    corpus: list[str] | None = None
    if options.path == FUNCTIONS:
        rows, corpus = _functions(cache_dir)
    else:
        rows = _read_questions(options, cache_dir)
        if options.corpus is not None:
            corpus = _read_corpus(options.corpus, cache_dir)
    chosen = rows
    if options.limit is not None and options.limit < len(rows):
        numbers = sorted(random.Random(f"{seed}/retrieval").sample(range(len(rows)), options.limit))
        chosen = [rows[number] for number in numbers]
    if corpus is not None:
        found = retrieved([row["question"] for row in chosen], corpus, options.passages)
        chosen = [row | {"passages": passages} for row, passages in zip(chosen, found, strict=True)]
    questions = []
    for row in chosen:
        passages = row["passages"][: options.passages]
        ids = prompt_ids(tokenizer, row["question"], passages)
        questions.append(PassageQuestion(row["question"], row["answers"], passages, ids))
    return PassageQuestions(questions, len(rows), options.new_tokens, list(ends), options.path)


def prompt_ids(tokenizer: PreTrainedTokenizerBase, question: str, passages: Sequence[str]) -> list[int]:
    """Returns the ids of a user's message if the tokenizer has a chat template, else of a text that the answer
    continues."""
    numbered = "\n\n".join(f"Passage {number}: {passage}" for number, passage in enumerate(passages, start=1))
    text = f"{INSTRUCTION}\n\n{numbered}\n\nQuestion: {question}"
    if tokenizer.chat_template is not None:
        return encode_chat(tokenizer, [{"role": "user", "content": text}], add_generation_prompt=True)
    begin = begin_token(tokenizer)
    ids = encode_text(tokenizer, f"{text}\nAnswer:")
    return ids if begin is None else [begin, *ids]


def retrieved(questions: Sequence[str], corpus: Sequence[str], count: int) -> list[list[str]]:
    """Returns for each question the most similar texts of the corpus, the best first."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(sublinear_tf=True, token_pattern=r"\w+")
    texts = vectorizer.fit_transform(corpus)
    similarities = vectorizer.transform(questions) @ texts.T
    best = []
    for row in similarities:
        # Equally similar texts keep the order of the corpus, so the result is equal on every machine.
        order = sorted(zip(-row.data, row.indices, strict=True))[:count]
        best.append([corpus[number] for _, number in order])
    return best


def _read_questions(options: RetrievalOptions, cache_dir: Path) -> list[dict[str, Any]]:
    rows = []
    for file, number, values in read_objects("retrieval", Source(options.path), cache_dir, called="data.retrieval"):
        where = f"{file}, row {number}"
        if isinstance(values, BadRow):
            raise ValueError(values.message)
        wanted = ["question", "answers", *(["passages"] if options.corpus is None else [])]
        if not isinstance(values, Mapping) or (missing := [name for name in wanted if name not in values]):
            lacks = missing[0] if isinstance(values, Mapping) else "question"
            way = ", or give data.retrieval.corpus" if lacks == "passages" else ""
            raise ValueError(f"{where}: there is no column {lacks!r}; a row has {', '.join(wanted)}{way}")
        answers = values["answers"]
        answers = [answers] if isinstance(answers, str) else answers
        passages = values.get("passages", [])
        for name, texts in (("answers", answers), ("passages", passages)):
            if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
                raise ValueError(f"{where}: {name} has to be a list of texts")
        if not isinstance(values["question"], str) or not any(_words(answer) for answer in answers):
            raise ValueError(f"{where}: it has no question, or no answer with a word in it")
        rows.append({"question": values["question"], "answers": answers, "passages": passages})
    return rows


def _read_corpus(path: str, cache_dir: Path) -> list[str]:
    texts = []
    for file, number, values in read_objects("corpus", Source(path), cache_dir, called="data.retrieval.corpus"):
        if isinstance(values, BadRow):
            raise ValueError(values.message)
        if not isinstance(values, Mapping) or not isinstance(values.get("text"), str):
            raise ValueError(f"{file}, row {number}: there is no column 'text' with a text in it")
        texts.append(values["text"])
    return texts


def _functions(cache_dir: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Returns questions about functions of the standard library, and the passages that describe the functions.

    A question quotes the first sentence of a function's documentation; the passage also has the function's name.
    """
    (file,) = local_files("retrieval", Source(f"{DOCUMENTATION}wiki"), cache_dir)
    rows, corpus = [], []
    for _, values in read_rows(file):
        heading, _, rest = values["text"].partition("\n\n")
        if not heading.startswith("The module "):
            continue
        module = heading.removeprefix("The module ")
        for name, paragraph in re.findall(r"^The function (\w+)\n\n(\S[^\n]*)", rest, flags=re.MULTILINE):
            sentence = re.split(r"(?<=\.)\s", paragraph)[0]
            corpus.append(f"{heading}\nThe function {name}\n{paragraph}")
            if 6 <= len(sentence.split()) <= 30 and name.lower() not in sentence.lower():
                asked = f"Which function of the module {module} is described like this: {sentence}"
                rows.append({"question": asked, "answers": [name], "passages": []})
    return rows, corpus
