"""Has a judge grade the answers of chat benchmarks."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_danube.callbacks.progress import say
from lightning_danube.evaluation.data import EvaluationData
from lightning_danube.evaluation.grading import Grader, graded_rows, gradings_of
from lightning_danube.evaluation.judge import ChatJudge
from lightning_danube.evaluation.parts.chat import ChatQuestions
from lightning_danube.evaluation.task import Evaluation
from lightning_danube.training.contract import data_of


class Judge(Callback):
    """Has a model behind an OpenAI-compatible chat API grade the answers of MT-Bench and WildBench.

    Name it before EvaluationReport. Judgements by the same model in the same words are kept and used again. Answers
    that could not be judged are tried again by the next run.

    Args:
        base_url: of the API, such as "http://localhost:8000/v1".
        model: its name there.
        api_key_variable: environment variable that holds the key.
        requests_per_minute: most requests that begin in a minute.
        at_once: requests that wait for their answers at the same time.
        attempts: requests for one judgement, until it holds a grade.
        timeout: seconds for an answer.
        new_tokens: most tokens of a judgement. A model that thinks first needs them for its thoughts, too.
        price_in, price_out: dollars a million tokens, for the estimate that is printed before anything is sent.
        most_dollars: send nothing if the estimate is above. Needs the prices.

    Raises:
        ValueError: for a mistake in the above.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
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
        limits: dict[str, Any] = {"attempts": attempts, "timeout": timeout, "new_tokens": new_tokens}
        judge = ChatJudge(base_url, model, api_key_variable, requests_per_minute=requests_per_minute, **limits)
        self.grader = Grader(judge, at_once, price_in, price_out, most_dollars)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        problem = "Judge grades the answers of EvaluationData: remove it, or use that data module"
        part = data_of(trainer, EvaluationData, problem).parts[batch]
        if not isinstance(part, ChatQuestions):
            return
        assert isinstance(pl_module, Evaluation)
        row = pl_module.results.pop()
        graded = self.grader.grade(
            part,
            gradings_of(part, row.records),
            pl_module.weights,
            tell=lambda text: say(trainer, text),
            on_progress=pl_module.asked.on_progress,
        )
        pl_module.results += graded_rows(part, row, graded, self.grader.judge.model)
