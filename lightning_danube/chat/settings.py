"""The settings of fine-tuning and of DPO, without Lightning and without PyTorch.

A wrong setting is refused before anything large is imported. `ChatData`, `PreferenceData` and `PreferenceTuning` add
the code that trains. `SupervisedFineTuning` has the settings that all tuning tasks share.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from lightning_danube.chat.conversations import ConversationSource
from lightning_danube.chat.preferences import PreferenceSource
from lightning_danube.chat.rows import Learned, Policy
from lightning_danube.files import default_cache_dir
from lightning_danube.options import check_processes, options
from lightning_danube.outside.names import plain_name
from lightning_danube.tokens.tokenizer import MISTRAL
from lightning_danube.training.optim.tuning import TuningSettings


class ConversationSettings:
    """The settings that the data of conversations and the data of preferences share.

    Raises:
        ValueError: an argument is wrong; the message names the key.
    """

    source: ClassVar[type[ConversationSource | PreferenceSource]] = ConversationSource
    example: ClassVar[str] = "conversation"
    batch_key: ClassVar[str] = "batch_rows"

    def __init__(
        self,
        *,
        sources: Mapping[str, ConversationSource] | Mapping[str, PreferenceSource],
        context_length: int,
        batch_rows: int,
        micro_batch_size: int,
        tokenizer: str,
        epochs: int,
        too_long: Policy,
        held_out: float,
        validation_examples: int,
        seed: int,
        workers: int,
        cache_dir: str | None,
    ) -> None:
        numbers = {
            "context_length": context_length,
            self.batch_key: batch_rows,
            "micro_batch_size": micro_batch_size,
            "epochs": epochs,
            f"validation_{self.example}s": validation_examples,
        }
        for name, value in numbers.items():
            if value < 1:
                raise ValueError(f"data.{name} is {value}: it must be at least 1")
        if not sources:
            raise ValueError("data.sources is empty: name at least one")
        if not 0 < held_out < 1:
            raise ValueError(f"data.held_out is {held_out}: give a share between 0 and 1, such as 0.02")
        check_processes(workers, "data.workers")
        for name in sources:
            plain_name(name, "data.sources: the name of a source")
        self.sources = {name: options(self.source, given, f"data.sources.{name}") for name, given in sources.items()}
        self.context_length = context_length
        self.too_long, self.held_out, self.validation_examples = too_long, held_out, validation_examples
        self.epochs, self.seed = epochs, seed
        self.cache_dir = Path(cache_dir).expanduser() if cache_dir else default_cache_dir()
        self.tokenizer_given, self.workers = tokenizer, workers
        self.batch_rows, self.micro_batch_size = batch_rows, micro_batch_size
        super().__init__()  # of the data module that inherits from these settings


class ChatSettings(ConversationSettings):
    """Conversations of several sources, for `SupervisedFineTuning`.

    Args:
        sources: name → source. Each epoch reads all conversations of all sources.
        context_length: places of a row.
        batch_rows: rows of one optimizer step over all devices and accumulated micro-batches.
        micro_batch_size: rows a device holds at once.
        tokenizer: "danube-small", "danube3-chat", a directory, a hub id, or a model, whose tokenizer is then used. If
            the tokenizer has no chat template, Danube's is used.
        epochs: how often the run reads all conversations.
        layout: "packed" puts several conversations into a row, where they do not see each other; "bucketed" puts one
            conversation into a row, and conversations of similar length into a step.
        learned: the answers that the loss counts: "all" answers of a conversation, or the "last" answer.
        too_long: "drop_turns" leaves out the oldest question and answer of a conversation until the rest fits; "cut"
            cuts its end; "skip" leaves it out.
        held_out: share of the conversations kept for validation, chosen by a hash of the first question; at least one
            question.
        validation_conversations: held-out conversations of each source that `fit` and `validate` use; `test` uses all.
        seed: seed of the order.
        workers: loader processes.
        cache_dir: directory of the encoded conversations.

    Raises:
        ValueError: an argument is wrong; the message names the key.
    """

    def __init__(
        self,
        sources: dict[str, ConversationSource],
        context_length: int,
        *,
        batch_rows: int = 8,
        micro_batch_size: int = 8,
        tokenizer: str = MISTRAL,
        epochs: int = 1,
        layout: Literal["packed", "bucketed"] = "packed",
        learned: Learned = "all",
        too_long: Policy = "drop_turns",
        held_out: float = 0.02,
        validation_conversations: int = 64,
        seed: int = 0,
        workers: int = 0,
        cache_dir: str | None = None,
    ) -> None:
        self.layout, self.learned = layout, learned
        self.validation_conversations = validation_conversations
        super().__init__(
            sources=sources,
            context_length=context_length,
            batch_rows=batch_rows,
            micro_batch_size=micro_batch_size,
            tokenizer=tokenizer,
            epochs=epochs,
            too_long=too_long,
            held_out=held_out,
            validation_examples=validation_conversations,
            seed=seed,
            workers=workers,
            cache_dir=cache_dir,
        )


class PreferenceSettings(ConversationSettings):
    """Pairs of a chosen and a rejected answer to the same prompt, for `PreferenceTuning`.

    Args:
        sources: name → source. Each epoch reads all pairs of all sources.
        context_length: most places of a prompt with one of its answers; each pair takes two rows.
        batch_pairs: pairs of one optimizer step over all devices and accumulated micro-batches; the pairs of a step
            have similar lengths.
        micro_batch_size: pairs a device holds at once.
        tokenizer: "danube-small", "danube3-chat", a directory, a hub id, or a model, whose tokenizer is then used. If
            the tokenizer has no chat template, Danube's is used.
        epochs: how often the run reads all pairs.
        too_long: "drop_turns" leaves out the oldest question and answer of a prompt until the prompt fits with both
            answers, and cuts the end of an answer that still does not fit; "cut" cuts the end; "skip" leaves the
            pair out.
        held_out: share of the pairs kept for validation, chosen by a hash of the first question; at least one question.
        validation_pairs: held-out pairs of each source that `fit` and `validate` use; `test` uses all.
        seed: seed of the order.
        workers: loader processes.
        cache_dir: directory of the encoded pairs and their reference log-probabilities.

    Raises:
        ValueError: an argument is wrong; the message names the key.
    """

    source = PreferenceSource
    example = "pair"
    batch_key = "batch_pairs"

    def __init__(
        self,
        sources: dict[str, PreferenceSource],
        context_length: int,
        *,
        batch_pairs: int = 8,
        micro_batch_size: int = 4,
        tokenizer: str = MISTRAL,
        epochs: int = 1,
        too_long: Policy = "drop_turns",
        held_out: float = 0.02,
        validation_pairs: int = 256,
        seed: int = 0,
        workers: int = 0,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__(
            sources=sources,
            context_length=context_length,
            batch_rows=batch_pairs,
            micro_batch_size=micro_batch_size,
            tokenizer=tokenizer,
            epochs=epochs,
            too_long=too_long,
            held_out=held_out,
            validation_examples=validation_pairs,
            seed=seed,
            workers=workers,
            cache_dir=cache_dir,
        )


@dataclass(frozen=True)
class PreferenceTuningSettings(TuningSettings):
    """The arguments of `PreferenceTuning` and their defaults. `PreferenceTuning` explains the arguments.

    Raises:
        ValueError: beta is not above 0, or the optimizer is only for training from random weights.
    """

    beta: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.beta < float("inf"):
            raise ValueError(f"model.beta is {self.beta}: give a number above 0, such as 0.1")
        super().__post_init__()
