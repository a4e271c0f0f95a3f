"""Has a judge grade the answers of chat benchmarks."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, NamedTuple

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_danube.callbacks.progress import say
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
from lightning_danube.evaluation.task import Evaluation


class Judge(Callback):
    """Grades the answers of MT-Bench and WildBench by a model behind an OpenAI-compatible chat API; it stands before
    EvaluationReport. What was judged before, in the same words by the same model, is taken over; what could not be
    judged is tried again by the next run.

    Args:
        base_url: of the API, such as "http://localhost:8000/v1".
        model: its name there.
        api_key_variable: environment variable that holds the key.
        requests_per_minute: no more are begun.
        at_once: requests that wait for their answers at the same time.
        attempts: requests for one judgement, until it holds a grade.
        timeout: seconds for an answer.
        new_tokens: most tokens of a judgement.
        price_in, price_out: dollars a million tokens, for the estimate that is printed before anything is sent.
        most_dollars: send nothing if the estimate is above. Needs the prices.

    Raises:
        ValueError: for a mistake in the above.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        api_key_variable: str = "OPENAI_API_KEY",
        requests_per_minute: float | None = None,
        at_once: int = 4,
        attempts: int = 4,
        timeout: float = 120.0,
        new_tokens: int = 512,
        price_in: float | None = None,
        price_out: float | None = None,
        most_dollars: float | None = None,
    ) -> None:
        if at_once < 1:
            raise ValueError(f"the judge's at_once is {at_once}: it must be at least 1")
        if most_dollars is not None and (price_in is None or price_out is None):
            raise ValueError("the judge's most_dollars needs price_in and price_out: dollars a million tokens")
        self.client = ChatJudge(
            base_url,
            model,
            api_key_variable,
            requests_per_minute=requests_per_minute,
            attempts=attempts,
            timeout=timeout,
            new_tokens=new_tokens,
        )
        self.at_once, self.prices, self.most_dollars = at_once, (price_in, price_out), most_dollars

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        part = trainer.datamodule.parts[batch]  # type: ignore[attr-defined]
        if not isinstance(part, ChatQuestions):
            return
        assert isinstance(pl_module, Evaluation)
        row = pl_module.results.pop()
        graded = self._grade(trainer, pl_module, part, gradings_of(part, row.records))
        pl_module.results += graded_rows(part, row, graded, self.client.model)

    def _grade(
        self, trainer: Trainer, task: Evaluation, part: ChatQuestions, gradings: Sequence[Grading]
    ) -> list[tuple[Grading, Judgement]]:
        file = part.file("judgements")
        kept = {row["key"]: row for row in read_jsonl(file) if row["score"] is not None}
        keys = [judgement_key(grading.messages, self.client.model) for grading in gradings]
        new = [number for number, key in enumerate(keys) if key not in kept]
        judged = {
            number: Judgement(kept[key]["score"], kept[key]["reply"], kept[key]["attempts"])
            for number, key in enumerate(keys)
            if key in kept
        }
        if new:
            self._say_what_it_costs(trainer, part, [gradings[number].messages for number in new], len(judged))
        with ThreadPoolExecutor(self.at_once) as pool, file.open("a", encoding="utf-8") as opened:
            futures = {pool.submit(self.client.judge, gradings[number].messages): number for number in new}
            try:
                for future in as_completed(futures):
                    number = futures[future]
                    judgement = judged[number] = future.result()
                    grading = gradings[number]
                    line = {
                        "key": keys[number],
                        "weights": task.weights,
                        "judge": self.client.model,
                        "prompts": PROMPTS,
                        "question": grading.question,
                        "category": grading.category,
                        "turn": grading.turn,
                        **judgement._asdict(),
                    }
                    opened.write(json.dumps(line, ensure_ascii=False) + "\n")
                    opened.flush()
                    task.asked.progress(f"{part.title}, judged", len(judged), len(gradings))
            except BaseException:
                for future in futures:
                    future.cancel()
                raise
        return [(grading, judged[number]) for number, grading in enumerate(gradings)]

    def _say_what_it_costs(
        self, trainer: Trainer, part: ChatQuestions, prompts: Sequence[list[dict[str, str]]], done: int
    ) -> None:
        cost = estimated_cost(prompts, self.client.new_tokens, *self.prices)
        money = "no price is given" if cost.dollars is None else f"at most about {cost.dollars:.2f} dollars"
        before = f" ({done:,} are there from before)" if done else ""
        say(
            trainer,
            f"  {part.title}: {cost.requests:,} judgements by {self.client.model}{before}, about {cost.tokens_in:,} "
            f"tokens in and up to {cost.tokens_out:,} out; {money}",
        )
        if self.most_dollars is not None and cost.dollars is not None and cost.dollars > self.most_dollars:
            raise ValueError(
                f"judging {part.title} would cost about {cost.dollars:.2f} dollars, above the judge's most_dollars of "
                f"{self.most_dollars:.2f}: raise it, or lower data.{part.benchmark}.limit; the answers are in "
                f"{part.file('answers')}"
            )


class Grading(NamedTuple):
    question: str
    category: str
    turn: int
    messages: list[dict[str, str]]


def gradings_of(part: ChatQuestions, records: Sequence[dict[str, Any]]) -> list[Grading]:
    """Each turn of each question, in their order, as the judge is asked about it."""
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
    """The rows of the report: of MT-Bench one a turn and their average. What has no grade counts nowhere but in a
    note."""
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
