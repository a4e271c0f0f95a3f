"""The plan and the result of a fine-tuning run, as texts and as the content of `summary.json`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule
from transformers import PreTrainedTokenizerBase

from lightning_danube.chat.data import ChatData, ConversationData
from lightning_danube.checkpoints.runs import closing_lines
from lightning_danube.generation.token_stream import generate
from lightning_danube.model import Decoder
from lightning_danube.outside.texts import in_markdown
from lightning_danube.terminal import amount, counted, minutes_and_seconds, text_table
from lightning_danube.tokens.chat_template import encode_chat, end_ids
from lightning_danube.training.run_facts import RunFacts, Trained, rate, trained_parameters
from lightning_danube.training.trackers import text_tag

AnswerLosses = Mapping[str, float]
"""Source → held-out loss in nats/token."""


@dataclass
class ChatLosses:
    """Held-out losses before training, and the latest ones with the optimizer steps done before them."""

    before: AnswerLosses = field(default_factory=dict)
    after: AnswerLosses = field(default_factory=dict)
    step: int = 0


# --- answers ----------------------------------------------------------------------------------------------------------


class Answers:
    """A model's answers to fixed questions before and during training, by greedy decoding.

    Args:
        max_new_tokens: most tokens of an answer.
    """

    def __init__(self, questions: Sequence[str], max_new_tokens: int) -> None:
        self.questions, self.max_new_tokens = questions, max_new_tokens
        self.before: list[str] = []
        self.latest: list[str] = []
        self.step = -1
        """Optimizer steps done before the latest answers; -1 if there are no answers."""

    def ask(self, decoder: Decoder, tokenizer: PreTrainedTokenizerBase, step: int) -> None:
        """Asks the model each question, and keeps the answers.

        Raises:
            ValueError: a question fills the context.
        """
        self.latest = [self._answer(decoder, tokenizer, question) for question in self.questions]
        self.step = step

    def _answer(self, decoder: Decoder, tokenizer: PreTrainedTokenizerBase, question: str) -> str:
        ids = encode_chat(tokenizer, [{"role": "user", "content": question}], add_generation_prompt=True)
        room = decoder.config.max_position_embeddings - len(ids)
        if room < 1:
            raise ValueError(f"the question {question!r} has {len(ids)} tokens, more than the context holds")
        (new,) = generate(decoder, [ids], min(self.max_new_tokens, room), eos_ids=end_ids(tokenizer))
        return str(tokenizer.decode(new, skip_special_tokens=True))

    def cards(self) -> list[str]:
        """Returns for each question the first and the latest answer side by side, in Markdown."""
        cards = []
        for number, (question, answer) in enumerate(zip(self.questions, self.latest, strict=True)):
            columns = {"question": question, f"step {self.step}": answer}
            if self.before:
                columns = {"question": question, "before": self.before[number], **columns}
            cards.append(_markdown_row(columns))
        return cards

    def show(self, tensorboard: Any, place: int) -> None:
        """Writes the cards to TensorBoard, at a place of its horizontal axis."""
        for number, (question, card) in enumerate(zip(self.questions, self.cards(), strict=True), start=1):
            tensorboard.add_text(text_tag("answers", number, question), card, place)

    def compared(self) -> list[dict[str, str]]:
        """Returns each question with its first and its latest answer."""
        return [
            {"question": question, "before": first, "after": last}
            for question, first, last in zip(self.questions, self.before, self.latest, strict=False)
        ]


def _markdown_row(columns: Mapping[str, str]) -> str:
    """Returns a table of one row. Texts are escaped, so that they are shown verbatim."""
    cells = [in_markdown(text, line_end="<br>") for text in columns.values()]
    return "\n".join(f"| {' | '.join(row)} |" for row in (list(columns), ["---"] * len(columns), cells))


# --- the plan ---------------------------------------------------------------------------------------------------------


def model_line(task: LightningModule) -> str:
    """Returns the size of the model, and how much of the model trains."""
    config: Any = task.config
    return f"model: {config.parameters:,} parameters, of which {trained_parameters(task):,} train"


NOTES = {
    "dropped_leading_answers": "answers before the first question left out of their conversations",
    "answers_not_learned": "answers not learned, as their weight says",
}
"""Key of a report → what it counts. A count of 0 is not shown."""


def source_lines(reports: Mapping[str, Mapping[str, Any]], examples: str) -> list[str]:
    """Returns a table of the sources, and what was left out of each and why.

    Args:
        reports: source → what was counted when its examples were encoded.
        examples: what the examples are called in the reports: "conversations" or "pairs".
    """
    columns = [examples, f"{examples}_held_out", "tokens", "answer_tokens", f"shortened_{examples}"]
    rows = [
        [name, *(f"{report[key]:,}" for key in columns), f"{sum(report['left_out'].values()):,}"]
        for name, report in reports.items()
    ]
    lines = [text_table(["source", examples, "held out", "tokens", "of answers", "shortened", "left out"], rows)]
    for name, report in reports.items():
        if changed := report.get("changed_answers"):
            lines.append(
                f"{name}: {counted(changed, 'answer is', 'answers are')} not learned, because the chat "
                "template changes them"
            )
        lines += [f"{name}: {count:,} left out: {cause}" for cause, count in report["left_out"].items()]
        lines += [f"  {message}" for message in report["first_left_out"]]
        for key, what in NOTES.items():
            lines += [f"{name}: {report[key]:,} {what}"] if report.get(key) else []
    return lines


def chat_length_line(data: ChatData, steps: str, run: str) -> str:
    """Returns the length of a fine-tuning run, and the run's directory."""
    most = "at most " if data.layout == "bucketed" else ""
    return (
        f"run: {steps} steps of {amount(data.batch_rows, 'row')} of {most}{data.context_length} places, "
        f"{100 * data.fill():.1f} % of them filled, in {amount(data.epochs, 'epoch')}, into {run}"
    )


# --- the result of `fit` ----------------------------------------------------------------------------------------------


def training_summary(
    task: LightningModule, facts: RunFacts, data: ConversationData, trained: Trained
) -> dict[str, Any]:
    """Returns the part of `summary.json` that fine-tuning and preference tuning share."""
    config: Any = task.config
    return {
        "steps": trained.steps,
        "parameters": config.parameters,
        "trained_parameters": trained_parameters(task),
        "precision": trained.precision,
        "seconds": round(trained.seconds, 3),
        "tokens_per_second": rate(data.tokens_of_steps(0, trained.steps), facts.training_seconds),
    }


def chat_fit_summary(
    task: LightningModule,
    facts: RunFacts,
    data: ChatData,
    trained: Trained,
    losses: ChatLosses,
    answers: Answers,
) -> dict[str, Any]:
    """Returns the content of `summary.json` of `fit`."""
    return {
        "weights": getattr(task, "weights", None),
        **training_summary(task, facts, data, trained),
        "fill": round(data.fill(), 4),
        "sources": data.reports(),
        "val_loss_before": losses.before,
        "val_loss": losses.after,
        "val_step": losses.step,
        "val_tokens": facts.held_out_counts or data.evaluation_tokens(data.validation_conversations),
        "answers": answers.compared(),
    }


def chat_result_text(summary: Mapping[str, Any], sources: Sequence[str], run: Path) -> str:
    """Returns the held-out losses and the answers before and after training, and the next command.

    Args:
        summary: the content of `summary.json` of `fit`.
    """
    losses = {"before": summary["val_loss_before"], f"after step {summary['val_step']:,}": summary["val_loss"]}
    rows = [
        [when, *(f"{found[name]:.3f}" if name in found else "–" for name in sources)] for when, found in losses.items()
    ]
    lines = ["", text_table(["held-out answers, nats/token", *sources], rows), ""]
    for answered in summary["answers"]:
        lines += [f"question: {answered['question']}"]
        lines += [f"  {when}: {' '.join(answered[when].split())}" for when in ("before", "after")]
    return "\n".join([*lines, *steps_done(summary, run)])


def steps_done(summary: Mapping[str, Any], run: Path) -> list[str]:
    """Returns how long the run took, where the run is, and the command that chats with its model."""
    done = f"{amount(summary['steps'], 'step')} in {minutes_and_seconds(summary['seconds'])}"
    return closing_lines(done, run, "chat", "--weights", run)


# --- the result of `validate` and `test` ------------------------------------------------------------------------------


def answers_table(losses: AnswerLosses, tokens: Mapping[str, int]) -> str:
    """Returns a table of the held-out loss of each source, and the answer tokens that it was measured on."""
    rows = [[name, f"{tokens[name]:,}", f"{loss:.4f}"] for name, loss in losses.items()]
    return text_table(["held-out answers", "tokens", "nats/token"], rows)
