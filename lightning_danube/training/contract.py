"""The interface between tasks and data, and the content of batches. Read this file before writing either of them.

Data modules return numbers and batches. They never write to the trainer: only `DecoderTask.setup` does that.
Parts of an evaluation have their own interface: `evaluation/asking.py`.

Shapes: B rows of a micro-batch, T positions of a row, P pairs, C choices of a question.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NotRequired, Protocol, TypedDict, TypeVar, runtime_checkable

from lightning.pytorch import Trainer
from torch import Tensor

from lightning_danube.model.masks import Runs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lightning_danube.tokens.tokenizer import DocumentTokenizer

IGNORE_INDEX = -100
"""The label of a token, or the class of a text, that the loss ignores."""

# --- batches ----------------------------------------------------------------------------------------------------------


class TokenBatch(TypedDict):
    """Rows of tokens. `labels` is IGNORE_INDEX where the loss ignores the token."""

    input_ids: Tensor  # (B, T) int64
    labels: Tensor  # (B, T) int64
    document_ids: NotRequired[Tensor]  # (B, T): tokens see only tokens of their own document
    document_runs: NotRequired[Runs | None]  # the same as runs of tokens; None if an id returns later in its row
    position_ids: NotRequired[Tensor]  # (B, T): the position in the document


class StepBatch(TokenBatch):
    """A training micro-batch, and the labels of its whole optimizer step over all micro-batches and devices."""

    step_labels: int


class HeldOutBatch(TokenBatch):
    """Held-out rows of one source, and the numbers of the rows; -1 for an empty row.

    `origins` has the file, row and, if known, `id` of the example in each row, where a row is one example.
    """

    source: str
    rows: list[int]
    origins: NotRequired[list[dict[str, Any]]]


def places_of(batch: HeldOutBatch) -> list[dict[str, Any]]:
    """Returns for each row the file, row and `id` of its example, or its number if a row is not a single example."""
    return batch.get("origins") or [{"row": row} for row in batch["rows"]]


class PairBatch(StepBatch):
    """Pairs of answers. The rows of a pair follow each other, the chosen answer first, so B is 2 P."""

    reference: Tensor  # (P, 2): log-probabilities under the initial model


class HeldOutPairBatch(HeldOutBatch):
    """Held-out pairs of one source."""

    reference: Tensor  # (P, 2)


class TextBatch(TypedDict):
    """Texts to classify, padded at the end. A missing row is -1, and a missing class is IGNORE_INDEX."""

    input_ids: Tensor  # (B, T) int64
    attention_mask: Tensor  # (B, T) int64
    classes: Tensor  # (B,) int64
    rows: Tensor  # (B,) int64
    step_labels: NotRequired[int]


class WindowBatch(TypedDict, total=False):
    """Windows of a text, or cloze questions. The C choices of a question follow each other, the true choice first."""

    input_ids: Tensor  # (B, T) int64
    first: int  # position of the first prediction that counts
    context_length: int  # only for windows
    choices: int  # only for questions


# --- data -------------------------------------------------------------------------------------------------------------


@runtime_checkable
class TokenizedData(Protocol):
    """Data made of tokens."""

    vocab_size: int
    context_length: int


@runtime_checkable
class TrainingData(TokenizedData, Protocol):
    """Data to train on. Lengths are known after `setup("fit")`; the lengths of a curriculum are known earlier."""

    @property
    def batch_tokens(self) -> int:
        """Tokens of one optimizer step over all devices, including padding unless the data module says otherwise."""

    @property
    def total_tokens(self) -> int:
        """Tokens of the whole run; the learning rate depends on this number."""

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""

    def accumulation(self, replicas: int) -> int:
        """Returns the micro-batches of one optimizer step on each of `replicas` data-parallel replicas.

        Raises:
            ValueError: the step does not divide evenly.
        """


@runtime_checkable
class StagedData(Protocol):
    """Training data of stages. Their options decide the length of the run, so it is known before `setup`."""

    @property
    def stages(self) -> Sequence[object]:
        """The stages, in the order of training."""

    @property
    def total_tokens(self) -> int:
        """Tokens of all stages."""

    @property
    def total_steps(self) -> int:
        """Optimizer steps of all stages."""


@runtime_checkable
class CurveData(Protocol):
    """Training data without stages, whose held-out loss has a curve (training/trackers/loss_curve.py)."""

    batch_rows: int
    """Rows of one optimizer step over all devices."""
    micro_batch_size: int
    """Rows that one device processes at once."""

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""

    @property
    def held_out_sets(self) -> int:
        """Sets of rows that have a held-out loss each."""


@runtime_checkable
class DataWithTokenizer(Protocol):
    """Data that keep the tokenizer that made their tokens."""

    @property
    def tokenizer(self) -> DocumentTokenizer | PreTrainedTokenizerBase: ...


@runtime_checkable
class PairData(Protocol):
    """Pairs of answers, with their log-probabilities under the initial model of the run."""

    def prepare_reference(self, model: str, log_probabilities: Callable[[TokenBatch], Tensor]) -> None:
        """Computes the log-probabilities of all pairs, or reads the file of an earlier run.

        Args:
            model: name of the weights and the precision, usable in a file name.
            log_probabilities: batch → (P, 2), the log-probabilities of the chosen and the rejected answers.
        """


@runtime_checkable
class LabelledData(TokenizedData, Protocol):
    """Texts with classes."""

    labels: list[str]
    """The names of the classes, in the order of their numbers; empty if the checkpoint has them."""
    keep: Literal["start", "end"]
    """The part that is kept of a text that exceeds the context."""
    begin: bool
    """Whether texts begin with the tokenizer's bos token."""

    @property
    def evaluation_places(self) -> int:
        """Returns the most places, padding included, of a batch that is evaluated or classified."""

    def described(self, row: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns the fields that `predict` writes about a text: its place, the text, and its `true_label` if known."""


Wanted = TypeVar("Wanted")


def data_of(trainer: Trainer, wanted: type[Wanted], problem: str) -> Wanted:
    """Returns the run's data module, checked to have the type that the caller needs.

    Args:
        wanted: a class, or one of the Protocols above.
        problem: error message for other data. `{data}` stands for the name of their class.

    Raises:
        ValueError: the run has other data, or no data.
    """
    data = getattr(trainer, "datamodule", None)
    if not isinstance(data, wanted):
        raise ValueError(problem.format(data=type(data).__name__))
    return data
