"""What a task may ask of its data, and what a batch holds. A new task or data module is written by reading this page.

Data return numbers and batches. They never write to the trainer: `DecoderTask.setup` does that, in one place.
Parts of an evaluation have a contract of their own: `evaluation/asking.py`.

Shapes: B rows of a micro-batch, T places of a row, P pairs, C choices of a question.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NotRequired, Protocol, TypedDict, TypeVar, runtime_checkable

from lightning.pytorch import Trainer
from torch import Tensor

IGNORE_INDEX = -100
"""The label of a token, or the class of a text, that the loss does not count."""

# --- batches ----------------------------------------------------------------------------------------------------------


class TokenBatch(TypedDict):
    """Rows of tokens. `labels` holds IGNORE_INDEX where the loss does not count."""

    input_ids: Tensor  # (B, T) int64
    labels: Tensor  # (B, T) int64
    document_ids: NotRequired[Tensor]  # (B, T): tokens see only tokens of their own document
    position_ids: NotRequired[Tensor]  # (B, T): the place in the document


class StepBatch(TokenBatch):
    """A micro-batch of training whose optimizer step counts its labels over all micro-batches and devices."""

    step_labels: int


class HeldOutBatch(TokenBatch):
    """Held-out rows of one source, with their numbers; -1 for an empty row."""

    source: str
    rows: list[int]


class PairBatch(StepBatch):
    """Pairs of answers: the rows of a pair follow each other, the chosen answer first, so B is 2 P."""

    reference: Tensor  # (P, 2): log-probabilities that the model began with


class HeldOutPairBatch(HeldOutBatch):
    """Held-out pairs of one source."""

    reference: Tensor  # (P, 2)


class TextBatch(TypedDict):
    """Texts to classify, padded behind their ends. A row is -1, and a class IGNORE_INDEX, where there is none."""

    input_ids: Tensor  # (B, T) int64
    attention_mask: Tensor  # (B, T) int64
    classes: Tensor  # (B,) int64
    rows: Tensor  # (B,) int64
    step_labels: NotRequired[int]


class WindowBatch(TypedDict, total=False):
    """Windows of a text, or the questions of a cloze, whose C choices follow each other, the true one first."""

    input_ids: Tensor  # (B, T) int64
    first: int  # predictions count from this place on
    context_length: int  # of windows
    choices: int  # of questions


# --- data -------------------------------------------------------------------------------------------------------------


@runtime_checkable
class TokenizedData(Protocol):
    """Data that are made of tokens."""

    vocab_size: int
    context_length: int


@runtime_checkable
class TrainingData(TokenizedData, Protocol):
    """Data to train on. Lengths are known after `setup("fit")`; those of a curriculum are known at once."""

    @property
    def batch_tokens(self) -> int:
        """Tokens of one optimizer step over all devices, padding included unless the data say otherwise."""

    @property
    def total_tokens(self) -> int:
        """Tokens of the whole run: what the learning rate goes by."""

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""

    def accumulation(self, replicas: int) -> int:
        """Micro-batches of one optimizer step on each of `replicas` data-parallel replicas.

        Raises:
            ValueError: the step does not divide evenly.
        """


@runtime_checkable
class PairData(Protocol):
    """Pairs of answers, beside the log-probabilities of the model that a run begins with."""

    def prepare_reference(self, model: str, log_probabilities: Callable[[TokenBatch], Tensor]) -> None:
        """Has the log-probabilities of all pairs computed, or reads them where an earlier run left them.

        Args:
            model: name of the weights and the precision, fit for a file's name.
            log_probabilities: batch → (P, 2), of the chosen and the rejected answers.
        """


@runtime_checkable
class LabelledData(TokenizedData, Protocol):
    """Texts with classes."""

    labels: list[str]
    """The classes, by number; empty where the checkpoint knows them."""

    def described(self, row: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns what `predict` says of a text: where it stands, and its `true_label` if that is known."""


Wanted = TypeVar("Wanted")


def data_of(trainer: Trainer, wanted: type[Wanted], problem: str) -> Wanted:
    """Returns the run's data module as what the caller needs.

    Args:
        wanted: a class, or one of the Protocols above.
        problem: what to say of other data. `{data}` stands for the name of their class.

    Raises:
        ValueError: the run has other data, or none.
    """
    data = getattr(trainer, "datamodule", None)
    if not isinstance(data, wanted):
        raise ValueError(problem.format(data=type(data).__name__))
    return data
