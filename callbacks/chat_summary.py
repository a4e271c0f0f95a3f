"""What a fine-tuning run was and what came of it: held-out loss and answers before and after, and summary.json."""

from __future__ import annotations

import re
import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from lightning_danube.callbacks.progress import say
from lightning_danube.callbacks.summary import last_held_out_losses
from lightning_danube.callbacks.throughput import Throughput
from lightning_danube.chat.data import ChatData
from lightning_danube.files import write_json
from lightning_danube.generation.token_stream import generate
from lightning_danube.terminal import quoted, runnable, text_table
from lightning_danube.tokens.chat_template import encode_chat, end_ids
from lightning_danube.training.position import run_directory, steps_ahead


class ChatSummary(Callback):
    """Prints the plan and the result of a fine-tuning run and writes `summary.json`.

    Before training it needs the trainer's check of validation: `num_sanity_val_steps: -1`.

    Args:
        questions: answered before training and after each validation, with the likeliest token each time, for a person
            to compare: side by side in TensorBoard, and the first and last ones in the end.
        max_new_tokens: most tokens of such an answer.
    """

    def __init__(self, questions: list[str] | None = None, max_new_tokens: int = 48) -> None:
        self.questions, self.max_new_tokens = questions or [], max_new_tokens
        self._before: dict[str, float] = {}
        self._answers_before: list[str] = []
        self._validated_step = 0
        self._answers: tuple[int, list[str]] = (-1, [])
        self._seconds_before = 0.0
        self._began = time.monotonic()

    # --- fit ----------------------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._began = time.monotonic()
        data = chat_data_of(trainer)
        trained = sum(parameter.numel() for parameter in pl_module.parameters() if parameter.requires_grad)
        rows = [
            [
                name,
                f"{report['conversations']:,}",
                f"{report['conversations_held_out']:,}",
                f"{report['tokens']:,}",
                f"{report['answer_tokens']:,}",
                f"{report['shortened_conversations']:,}",
                f"{sum(report['left_out'].values()):,}",
            ]
            for name, report in data.reports().items()
        ]
        header = ["source", "conversations", "held out", "tokens", "of answers", "shortened", "left out"]
        lines = [
            f"model: {pl_module.config.parameters:,} parameters, of which {trained:,} train",  # type: ignore[union-attr]
            text_table(header, rows),
        ]
        for name, report in data.reports().items():
            for cause, count in report["left_out"].items():
                lines.append(f"{name}: {count:,} left out: {cause}")
            lines += [f"  {message}" for message in report["first_left_out"]]
        lines.append(
            f"run: {steps_ahead(trainer, data.total_steps)} steps of {data.batch_rows} rows of {data.context_length} "
            f"places, {100 * data.fill():.1f} % of them filled, in {data.epochs} pass(es), into {trainer.log_dir}"
        )
        say(trainer, "\n".join(lines))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            self._before = last_held_out_losses(trainer)
            self._answers_before = self._answer(trainer, pl_module)
        elif trainer.state.fn == "fit":
            self._validated_step = trainer.global_step
            self._answer(trainer, pl_module)
        elif trainer.state.fn == "validate":
            self._report_evaluation(trainer, pl_module, chat_data_of(trainer).validation_conversations)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        after = last_held_out_losses(trainer)
        answers = self._answer(trainer, pl_module)
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        data, directory = chat_data_of(trainer), run_directory(trainer)
        throughput = next((c for c in trainer.callbacks if isinstance(c, Throughput)), None)  # type: ignore[attr-defined]
        seconds = self._seconds()
        compared = [
            {"question": question, "before": before, "after": said}
            for question, before, said in zip(self.questions, self._answers_before, answers, strict=False)
        ]
        summary = {
            "weights": getattr(pl_module, "weights", None),
            "steps": trainer.global_step,
            "parameters": pl_module.config.parameters,  # type: ignore[union-attr]
            "trained_parameters": sum(p.numel() for p in pl_module.parameters() if p.requires_grad),
            "precision": trainer.precision,
            "seconds": round(seconds, 3),
            "places_per_second": round(trainer.global_step * data.batch_tokens / throughput.seconds, 1)
            if throughput and throughput.seconds
            else None,
            "fill": round(data.fill(), 4),
            "sources": data.reports(),
            "val_loss_before": self._before,
            "val_loss": after,
            "val_step": self._validated_step,
            "val_tokens": data.evaluation_tokens(data.validation_conversations),
            "answers": compared,
        }
        write_json(directory / "summary.json", summary)
        rows = [
            [when, *(f"{losses[name]:.3f}" if name in losses else "–" for name in data.sources)]
            for when, losses in (("before", self._before), (f"after step {self._validated_step:,}", after))
        ]
        lines = ["", text_table(["held-out answers, nats a token", *data.sources], rows), ""]
        for answered in compared:
            lines += [f"question: {answered['question']}"]
            lines += [f"  {when}: {' '.join(answered[when].split())}" for when in ("before", "after")]
        minutes, rest = divmod(round(seconds), 60)
        lines += [
            f"{trainer.global_step:,} steps in {minutes} min {rest:02d} s",
            f"run:  {directory}",
            f"next: {runnable()} chat --weights {quoted(directory)}",
        ]
        say(trainer, "\n".join(lines))

    def _answer(self, trainer: Trainer, pl_module: LightningModule) -> list[str]:
        """Rank zero's answers at this step, where it holds the whole model; written to TensorBoard."""
        whole = isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy)
        if not self.questions or not whole or not trainer.is_global_zero:
            return []
        if self._answers[0] != trainer.global_step:
            answers = [self._answer_one(trainer, pl_module, question) for question in self.questions]
            self._answers = (trainer.global_step, answers)
            self._show(trainer, answers)
        return self._answers[1]

    def _answer_one(self, trainer: Trainer, pl_module: LightningModule, question: str) -> str:
        tokenizer = chat_data_of(trainer).tokenizer
        decoder: Any = pl_module.decoder
        ids = encode_chat(tokenizer, [{"role": "user", "content": question}], add_generation_prompt=True)
        room = decoder.config.max_position_embeddings - len(ids)
        if room < 1:
            raise ValueError(f"the question {question!r} has {len(ids)} tokens, more than the context holds")
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            (new,) = generate(decoder, [ids], min(self.max_new_tokens, room), eos_ids=end_ids(tokenizer))
        return str(tokenizer.decode(new, skip_special_tokens=True))

    def _show(self, trainer: Trainer, answers: list[str]) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                for number, (question, said) in enumerate(zip(self.questions, answers, strict=True), start=1):
                    columns = {"question": question, f"step {trainer.global_step}": said}
                    if self._answers_before:
                        columns = {"question": question, "before": self._answers_before[number - 1], **columns}
                    logger.experiment.add_text(f"answers/{number}", _markdown_table(columns), trainer.global_step)

    def _seconds(self) -> float:
        return self._seconds_before + time.monotonic() - self._began

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self._seconds(), "before": self._before, "answers_before": self._answers_before}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._seconds_before = state_dict["seconds"]
        self._before, self._answers_before = state_dict["before"], state_dict["answers_before"]

    # --- validate and test --------------------------------------------------------------------------------------------

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._report_evaluation(trainer, pl_module, None)

    def _report_evaluation(self, trainer: Trainer, pl_module: LightningModule, limit: int | None) -> None:
        data, losses = chat_data_of(trainer), last_held_out_losses(trainer)
        if not trainer.is_global_zero:
            return
        tokens = data.evaluation_tokens(limit)
        path = run_directory(trainer) / "summary.json"
        summary = {
            "weights": evaluated_weights(trainer, pl_module),
            "precision": trainer.precision,
            "val_loss": losses,
            "val_tokens": tokens,
        }
        write_json(path, summary)
        rows = [[name, f"{tokens[name]:,}", f"{loss:.4f}"] for name, loss in losses.items()]
        say(trainer, text_table(["held-out answers", "tokens", "nats a token"], rows))
        say(trainer, f"written to {path}")


def _markdown_table(columns: dict[str, str]) -> str:
    """One row; what the texts hold is shown, not interpreted."""
    cells = [re.sub(r"([^\w\s])", r"\\\1", text.strip()).replace("\n", "<br>") for text in columns.values()]
    return "\n".join(f"| {' | '.join(row)} |" for row in (list(columns), ["---"] * len(columns), cells))


def evaluated_weights(trainer: Trainer, pl_module: LightningModule) -> str:
    """The checkpoint that is evaluated, or the model that the task begins with."""
    return str(trainer.ckpt_path or pl_module.weights)


def chat_data_of(trainer: Trainer) -> ChatData:
    """
    Raises:
        ValueError: the run has other data.
    """
    data = trainer.datamodule  # type: ignore[attr-defined]
    if not isinstance(data, ChatData):
        raise ValueError("ChatSummary reports on ChatData: remove it, or use that data module")
    return data
