"""Reports what a fine-tuning run is going to do and what it has done."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

from lightning_danube.callbacks.progress import say
from lightning_danube.callbacks.summaries.run import RunSummary, report_evaluation, reports_fit, write_summary
from lightning_danube.chat.data import ChatData
from lightning_danube.chat.summary import (
    Answers,
    ChatLosses,
    answers_table,
    chat_fit_summary,
    chat_length_line,
    chat_result_text,
    model_line,
    source_lines,
)
from lightning_danube.training.contract import data_of
from lightning_danube.training.position import holds_whole_model, place_in_tensorboard, steps_ahead, tensorboards
from lightning_danube.training.run_facts import metrics_of_sources, run_facts_of
from lightning_danube.training.trackers.loss_curve import curve_of


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
        self._losses = ChatLosses()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        data = chat_data_of(trainer)
        length = chat_length_line(data, steps_ahead(trainer, data.total_steps), str(trainer.log_dir))
        say(trainer, "\n".join([model_line(pl_module), *source_lines(data.reports(), "conversations"), length]))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not curve_of(pl_module).is_brief:
            self._ask(trainer, pl_module)
            if trainer.sanity_checking and trainer.global_step == 0:
                self._losses.before = metrics_of_sources(trainer.callback_metrics)
                self._answers.before = self._answers.latest
            else:
                self._losses.step = trainer.global_step
        elif trainer.state.fn == "validate":
            self._report_evaluation(trainer, pl_module)

    def _report_fit(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._ask(trainer, pl_module)
        if reports_fit(trainer):
            data = chat_data_of(trainer)
            self._losses.after = metrics_of_sources(trainer.callback_metrics)
            run = (run_facts_of(pl_module), data, self._trained(trainer))
            summary = chat_fit_summary(pl_module, *run, self._losses, self._answers)
            say(trainer, chat_result_text(summary, list(data.sources), write_summary(trainer, summary)))

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._report_evaluation(trainer, pl_module)

    def _report_evaluation(self, trainer: Trainer, task: LightningModule) -> None:
        losses, tokens = metrics_of_sources(trainer.callback_metrics), run_facts_of(task).held_out_counts
        # The checkpoint that is evaluated, or the model that the task begins with.
        facts = {"weights": str(trainer.ckpt_path or task.weights), "precision": trainer.precision}
        report_evaluation(trainer, {**facts, "val_loss": losses, "val_tokens": tokens}, answers_table(losses, tokens))

    def _ask(self, trainer: Trainer, task: Any) -> None:
        """Has the model answer at this step and shows the answers, if rank zero holds the whole model."""
        if self._answers.questions and holds_whole_model(trainer) and self._answers.step != trainer.global_step:
            with torch.no_grad(), trainer.precision_plugin.forward_context():
                self._answers.ask(task.decoder, chat_data_of(trainer).tokenizer, trainer.global_step)
            for tensorboard in tensorboards(trainer):
                self._answers.show(tensorboard, place_in_tensorboard(trainer))

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "before": self._losses.before, "answers_before": self._answers.before}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._losses.before, self._answers.before = state_dict["before"], state_dict["answers_before"]


def chat_data_of(trainer: Trainer) -> ChatData:
    """Returns the run's data module.

    Raises:
        ValueError: the run has other data.
    """
    return data_of(trainer, ChatData, "ChatSummary reports on ChatData: remove it, or use that data module")
