"""Reports what a fine-tuning run is going to do and what it has done."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from lightning_danube.callbacks.progress import say
from lightning_danube.callbacks.run_summary import RunSummary, report_evaluation, reports_fit, write_summary
from lightning_danube.chat.data import ChatData
from lightning_danube.chat.summary import (
    Answers,
    answers_table,
    chat_fit_summary,
    chat_length_line,
    chat_result_text,
    model_line,
    source_lines,
)
from lightning_danube.training.contract import data_of
from lightning_danube.training.position import steps_ahead
from lightning_danube.training.run_facts import metrics_of_sources, run_facts_of


class ChatSummary(RunSummary):
    """Prints the plan and the result of a fine-tuning run and writes `summary.json`.

    The losses and answers before training need the trainer's check of validation: `num_sanity_val_steps: -1`.

    Args:
        questions: answered before training and after each validation, with the likeliest token each time. TensorBoard
            shows the answers side by side, and the first and last answers are printed at the end.
        max_new_tokens: most tokens of such an answer.
    """

    def __init__(self, questions: list[str] | None = None, max_new_tokens: int = 48) -> None:
        super().__init__()
        self._answers = Answers(questions or [], max_new_tokens)
        self._before: dict[str, float] = {}
        self._validated_step = 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        data = chat_data_of(trainer)
        length = chat_length_line(data, steps_ahead(trainer, data.total_steps), str(trainer.log_dir))
        say(trainer, "\n".join([model_line(pl_module), *source_lines(data.reports(), "conversations"), length]))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            self._before = metrics_of_sources(trainer.callback_metrics)
            self._ask(trainer, pl_module)
            self._answers.before = self._answers.latest
        elif trainer.state.fn == "fit":
            self._validated_step = trainer.global_step
            self._ask(trainer, pl_module)
        elif trainer.state.fn == "validate":
            self._report_evaluation(trainer, pl_module, chat_data_of(trainer).validation_conversations)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._ask(trainer, pl_module)
        if reports_fit(trainer):
            data = chat_data_of(trainer)
            summary = chat_fit_summary(
                pl_module,
                run_facts_of(pl_module),
                data,
                self._trained(trainer),
                before=self._before,
                after=metrics_of_sources(trainer.callback_metrics),
                validated_step=self._validated_step,
                answers=self._answers,
            )
            say(trainer, chat_result_text(summary, list(data.sources), write_summary(trainer, summary)))

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._report_evaluation(trainer, pl_module, None)

    def _report_evaluation(self, trainer: Trainer, task: LightningModule, limit: int | None) -> None:
        losses, tokens = metrics_of_sources(trainer.callback_metrics), chat_data_of(trainer).evaluation_tokens(limit)
        # The checkpoint that is evaluated, or the model that the task begins with.
        weights = str(trainer.ckpt_path or task.weights)
        summary = {"weights": weights, "precision": trainer.precision, "val_loss": losses, "val_tokens": tokens}
        report_evaluation(trainer, summary, answers_table(losses, tokens))

    def _ask(self, trainer: Trainer, task: LightningModule) -> None:
        """Has the model answer at this step and shows the answers, if rank zero holds the whole model."""
        whole = isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy)
        if self._answers.questions and whole and trainer.is_global_zero and self._answers.step != trainer.global_step:
            decoder: Any = task.decoder
            with torch.no_grad(), trainer.precision_plugin.forward_context():
                self._answers.ask(decoder, chat_data_of(trainer).tokenizer, trainer.global_step)
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger):
                    for number, card in enumerate(self._answers.cards(), start=1):
                        logger.experiment.add_text(f"answers/{number}", card, trainer.global_step)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "before": self._before, "answers_before": self._answers.before}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._before, self._answers.before = state_dict["before"], state_dict["answers_before"]


def chat_data_of(trainer: Trainer) -> ChatData:
    """Returns the run's data module.

    Raises:
        ValueError: the run has other data.
    """
    return data_of(trainer, ChatData, "ChatSummary reports on ChatData: remove it, or use that data module")
