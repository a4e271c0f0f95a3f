"""The base class of data whose epochs are planned before the first step. Its state is the number of steps."""

from __future__ import annotations

from abc import abstractmethod
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from lightning.pytorch import LightningDataModule

from lightning_danube.tokens.tokenizer import fingerprint_of, new_token_facts
from lightning_danube.training.contract import TrainingData
from lightning_danube.training.loaders import ResumableLoader, StepSampler, accumulation, steps_of, trains_on_gpu
from lightning_danube.training.position import replicas_of
from lightning_danube.weights.tokenizers import tokenizer_of

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch.utils.data import DataLoader, Dataset

    from lightning_danube.training.passes import Pass


class TokenizedModule(LightningDataModule):
    """A data module whose settings name a tokenizer, which its constructor loads.

    The constructor of the settings comes first: it checks its arguments, and then calls this constructor.
    """

    tokenizer_given: str
    """The name of the tokenizer, as given."""

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer_name, self.tokenizer = tokenizer_of(self.tokenizer_given)
        self.vocab_size = len(self.tokenizer)
        self.initialize()

    def initialize(self) -> None:
        """Sets what the data keep beside their settings. A subclass extends this method instead of the constructor."""


class PlannedData(TokenizedModule):
    """Data whose epochs are planned after `setup`. A resumed run begins with the step after those that are done.

    A subclass sets `passes` in `setup("fit")`, and defines `batch_tokens` and `order`. Its settings set the attributes
    below before they call the constructor.
    """

    batch_rows: int
    """Rows of one optimizer step over all devices and accumulated micro-batches."""
    micro_batch_size: int
    """Rows that a device holds at once."""
    workers: int
    """Loader processes."""
    batch_key: ClassVar[str]
    """The name of `batch_rows` among the options."""
    stands_for: ClassVar[str]
    """What the digests in `order` cover, for the message that refuses other data."""
    passes: list[Pass]

    def initialize(self) -> None:
        super().initialize()
        self.steps_done = 0

    # --- length -------------------------------------------------------------------------------------------------------

    def accumulation(self, replicas: int) -> int:
        """Returns the micro-batches of one optimizer step on each of `replicas` data-parallel replicas.

        Raises:
            ValueError: the step does not divide evenly.
        """
        return accumulation(self.batch_key, self.batch_rows, self.micro_batch_size, replicas)

    @property
    def total_steps(self) -> int:
        return sum(one.steps for one in self.passes)

    @property
    @abstractmethod
    def batch_tokens(self) -> int:
        """Returns the tokens of one optimizer step."""

    @property
    def total_tokens(self) -> int:
        return self.total_steps * self.batch_tokens

    def most_tokens(self) -> int | None:
        """Returns the most tokens that the run can have, from the options alone; None if no option limits them."""
        return None

    @abstractmethod
    def tokens_of_examples(self) -> NDArray[np.int64]:
        """Returns the tokens of each training example that the model reads, without padding: (examples,)."""

    @cached_property
    def _tokens_before(self) -> NDArray[np.int64]:
        """Returns the tokens that the run has read before each step, and at its end: (steps + 1,)."""
        tokens = self.tokens_of_examples()
        steps = [[example for row in rows for example in row] for one in self.passes for rows in steps_of(one)]
        return np.cumsum([0, *(int(tokens[examples].sum()) for examples in steps)], dtype=np.int64)

    def tokens_of_steps(self, first: int, behind: int) -> int:
        """Returns the tokens of the steps from `first`, counted from 0, to the one before `behind`, without padding."""
        return int(self._tokens_before[behind] - self._tokens_before[first])

    @property
    def held_out_sets(self) -> int:
        """Returns the number of sets of held-out rows that have a loss each."""
        return 1

    # --- state --------------------------------------------------------------------------------------------------------

    @abstractmethod
    def order(self) -> dict[str, Any]:
        """Returns everything that decides which rows are in which step: option → its value, or a digest."""

    def tokenizer_facts(self) -> dict[str, Any]:
        """Returns what a checkpoint says of the tokenizer."""
        facts = {"name": self.tokenizer_name, "fingerprint": fingerprint_of(self.tokenizer)}
        return {**facts, **new_token_facts(self.tokenizer)}

    def state_dict(self) -> dict[str, Any]:
        assert self.trainer is not None
        return {"steps": self.trainer.global_step, "tokenizer": self.tokenizer_facts(), "order": self.order()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues after the last step of a checkpoint.

        Raises:
            ValueError: the run began with other data or in another order.
        """
        if self.trainer is None or self.trainer.state.fn != "fit":
            return
        saved, now = state_dict["order"], self.order()
        for key in now:
            if saved[key] != now[key]:
                raise ValueError(
                    f"data.{key} is {now[key]}, the run began with {saved[key]}: set it back ({self.stands_for}), or "
                    "begin a new run without --ckpt_path"
                )
        self.steps_done = int(state_dict["steps"])

    def training_loader(self, rows: Dataset[Any], labels: NDArray[np.int64]) -> DataLoader[Any]:
        """Returns the loader of this replica's micro-batches, from the next step on.

        Args:
            labels: number of labels of each example.
        """
        replicas, replica = replicas_of(self.trainer)
        sampler = StepSampler(
            self.passes,
            labels,
            micro_batch_size=self.micro_batch_size,
            replicas=replicas,
            replica=replica,
            start=self.steps_done,
        )
        return ResumableLoader(rows, sampler, self.workers, on_gpu=trains_on_gpu(self.trainer))


def tokens_of_steps(data: TrainingData, first: int, behind: int) -> int:
    """Returns the tokens that the steps from `first` to the one before `behind` train on, without padding.

    Only rows of planned data have padding.
    """
    return (
        data.tokens_of_steps(first, behind) if isinstance(data, PlannedData) else (behind - first) * data.batch_tokens
    )
