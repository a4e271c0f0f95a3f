"""Grades the answers of chat benchmarks with a judge, and makes the report's rows from the grades."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any, NamedTuple

from lightning_danube.evaluation.asking import read_jsonl
from lightning_danube.evaluation.judge import (
    PROMPTS,
    ChatJudge,
    Judgement,
    estimated_cost,
    grading_messages,
    judgement_key,
)
from lightning_danube.evaluation.parts.chat import ChatQuestions
from lightning_danube.evaluation.results import Measured, mean_of
from lightning_danube.files import append_line
from lightning_danube.terminal import amount


class Grading(NamedTuple):
    """One turn of a question, with the messages to the judge."""

    question: str
    category: str
    turn: int
    messages: list[dict[str, str]]


@dataclass(frozen=True)
class Grader:
    """Grades answers with a judge, and keeps each judgement in a file.

    Args:
        at_once: most requests in flight at the same time.
        price_in, price_out: dollars per million tokens.
        most_dollars: if the estimated cost is higher, nothing is sent. Needs the prices.

    Raises:
        ValueError: a number is out of range, or the prices are missing.
    """

    judge: ChatJudge
    at_once: int = 4
    price_in: float | None = None
    price_out: float | None = None
    most_dollars: float | None = None

    def __post_init__(self) -> None:
        if self.at_once < 1:
            raise ValueError(f"the judge's at_once is {self.at_once}: it must be at least 1")
        if self.most_dollars is not None and (self.price_in is None or self.price_out is None):
            raise ValueError("the judge's most_dollars needs price_in and price_out: dollars a million tokens")

    def grade(
        self,
        part: ChatQuestions,
        gradings: Sequence[Grading],
        weights: str,
        *,
        tell: Callable[[str], object],
        on_progress: Callable[[str, int, int], object] | None,
    ) -> list[tuple[Grading, Judgement]]:
        """Returns each grading with its judgement, which is new or kept from an earlier run.

        Args:
            weights: name of the model that has answered.
            tell: called with the cost of the new judgements, before anything is sent.
            on_progress: called with the part's title, the number of gradings done and the number of all gradings.

        Raises:
            ValueError: the new judgements would cost too much.
        """
        file = part.file("judgements")
        kept = {row["key"]: row for row in read_jsonl(file) if row["score"] is not None}
        keys = [judgement_key(grading.messages, self.judge.model) for grading in gradings]
        judged = {
            number: Judgement(kept[key]["score"], kept[key]["reply"], kept[key]["attempts"])
            for number, key in enumerate(keys)
            if key in kept
        }
        new = [number for number in range(len(gradings)) if number not in judged]
        if new:
            tell(self._cost_line(part, [gradings[number].messages for number in new], len(judged)))
            self._check_cost(part, [gradings[number].messages for number in new])

        def judge(number: int) -> Judgement:
            found = self.judge.judge(gradings[number].messages)
            # Here and not where it is read: it is paid for, and this thread asks nothing before it is on the disk.
            append_line(
                file, json.dumps(self._line(keys[number], weights, gradings[number], found), ensure_ascii=False)
            )
            return found

        with ThreadPoolExecutor(self.at_once) as pool:
            futures = {pool.submit(judge, number): number for number in new}
            try:
                for future in as_completed(futures):
                    judged[futures[future]] = future.result()
                    if on_progress is not None:
                        on_progress(f"{part.title}, judged", len(judged), len(gradings))
            except BaseException:
                self.judge.give_up()
                for future in futures:
                    future.cancel()
                raise
        return [(grading, judged[number]) for number, grading in enumerate(gradings)]

    def _line(self, key: str, weights: str, grading: Grading, judgement: Judgement) -> dict[str, Any]:
        """Returns the record of a judgement for the file."""
        return {
            "key": key,
            "weights": weights,
            "judge": self.judge.model,
            "prompts": PROMPTS,
            "question": grading.question,
            "category": grading.category,
            "turn": grading.turn,
            **judgement._asdict(),
        }

    def _cost_line(self, part: ChatQuestions, prompts: Sequence[list[dict[str, str]]], done: int) -> str:
        cost = estimated_cost(prompts, self.judge.new_tokens, self.price_in, self.price_out)
        money = "no price is given" if cost.dollars is None else f"at most about {cost.dollars:.2f} dollars"
        before = f" ({done:,} are there from before)" if done else ""
        return (
            f"  {part.title}: {amount(cost.requests, 'judgement')} by {self.judge.model}{before}, about "
            f"{cost.tokens_in:,} "
            f"tokens in and up to {cost.tokens_out:,} out; {money}"
        )

    def _check_cost(self, part: ChatQuestions, prompts: Sequence[list[dict[str, str]]]) -> None:
        """Checks the estimated cost.

        Raises:
            ValueError: the estimate is above `most_dollars`.
        """
        dollars = estimated_cost(prompts, self.judge.new_tokens, self.price_in, self.price_out).dollars
        if self.most_dollars is not None and dollars is not None and dollars > self.most_dollars:
            raise ValueError(
                f"judging {part.title} would cost about {dollars:.2f} dollars, above the judge's most_dollars of "
                f"{self.most_dollars:.2f}: raise it, or lower data.{part.benchmark}.limit; the answers are in "
                f"{part.file('answers')}"
            )


def gradings_of(part: ChatQuestions, records: Sequence[dict[str, Any]]) -> list[Grading]:
    """Returns the gradings of each turn of each question, in the order of the questions."""
    gradings = []
    for question, record in zip(part.questions, records, strict=True):
        for turn, answer in enumerate(record["answers"]):
            said = question.messages(record["answers"][:turn])
            reference = question.references[turn] if turn < len(question.references) else None
            messages = grading_messages(said, answer, reference, question.checklist)
            gradings.append(Grading(question.id, question.category, turn, messages))
    return gradings


def graded_rows(
    part: ChatQuestions, row: Measured, graded: Sequence[tuple[Grading, Judgement]], judge: str
) -> list[Measured]:
    """Returns the rows of the report: for MT-Bench one for each turn, then their average.

    Answers without a grade are only counted in a note; they do not enter the scores.
    """
    notes = [*row.notes, f"graded by {judge} in the words of {PROMPTS}, which are not the paper's"]
    without = [judgement for _, judgement in graded if judgement.score is None]
    if without:
        why = ", ".join(sorted({str(judgement.problem) for judgement in without}))
        notes.append(f"{len(without):,} of {len(graded):,} answers have no grade and count nowhere ({why})")

    def of(name: str, title: str, scores: Sequence[float], more: dict[str, Any]) -> Measured:
        found = Measured("chat", name, title, row.setting, percent=False, notes=notes, more=more)
        if scores:
            found.estimate = mean_of(scores)
        else:
            found.not_run = "no answer could be graded"
        return found

    scored = [(grading, judgement.score) for grading, judgement in graded if judgement.score is not None]
    rows = []
    turns = sorted({grading.turn for grading, _ in graded})
    if len(turns) > 1:
        for turn in turns:
            scores = [score for grading, score in scored if grading.turn == turn]
            rows.append(of(f"{part.benchmark}_turn_{turn + 1}", f"{part.title}, turn {turn + 1}", scores, {}))
    by_category: dict[str, list[float]] = {}
    for grading, score in scored:
        by_category.setdefault(grading.category, []).append(score)
    more = {
        "judge": judge,
        "prompts": PROMPTS,
        "ungraded": len(without),
        "by_category": {
            name: {"score": statistics.fmean(scores), "n": len(scores)} for name, scores in sorted(by_category.items())
        },
    }
    total = of(part.benchmark, part.title, [score for _, score in scored], more)
    total.records = [
        {
            **record,
            "judgements": [judgement._asdict() for grading, judgement in graded if grading.question == question.id],
        }
        for question, record in zip(part.questions, row.records, strict=True)
    ]
    return [*rows, total]
