"""The settings of text classification, without Lightning and without PyTorch.

A wrong setting is refused before anything large is imported. `ClassificationData` and `TextClassification` add the code
that trains.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from lightning_danube.classification.labelled_texts import LabelledTexts
from lightning_danube.files import default_cache_dir
from lightning_danube.options import check_processes
from lightning_danube.tokens.tokenizer import MISTRAL
from lightning_danube.training.optim.tuning import TuningSettings
from lightning_danube.weights.lora import Lora

SPLITS = ("train", "validation", "test")
Keep = Literal["start", "end"]
Head = Literal["hidden", "logits"]


class ClassificationSettings:
    """Labelled texts, for `TextClassification`.

    Args:
        train, validation, test: where the texts of each split are: a path, or a mapping of the options of
            LabelledTexts. A split that is not given is split off the training texts.
        predict: texts to classify with `predict`, with or without labels; if not given, the texts of the test split.
        text_column: the column that holds the text, or a pattern of several columns, such as "{title} {abstract}".
        label_column: the column that holds the label, a word or a whole number.
        context_length: most tokens of a text.
        keep: the part of a longer text that is kept: its "start" or its "end".
        begin: put the tokenizer's bos token before each text, as pre-training did; H2O LLM Studio does not.
        batch_texts: texts of one optimizer step over all devices and accumulated micro-batches; the texts of a step
            have similar lengths.
        micro_batch_size: texts a device holds at once in training. Validation, test and `predict` hold as many tokens
            as these texts may have, so more of the texts that are shorter.
        tokenizer: "danube-small", "mistral", a directory, a hub id, or a model, whose tokenizer is then used.
        epochs: how often the run reads all training texts.
        validation_share, test_share: share of each class of the training texts that is split off for a split that is
            not given.
        most_frequent_classes: use only the texts of this many classes, the most frequent ones.
        max_texts: split → most texts, chosen by the seed and stratified by class, if a split is larger than needed.
        on_bad_row: "error" stops at a bad row and names its file and row; "skip" leaves bad rows out, counts them by
            cause and lists them in rejected.jsonl in the run's directory. A row is bad without text or label, with a
            label that training lacks, or if it is a training text that is also in another split.
        seed: seed of the splits and the order.
        workers: loader processes.
        cache_dir: directory of the embedded texts.

    Raises:
        ValueError: an argument is wrong; the message names the key.
    """

    batch_key: ClassVar[str] = "batch_texts"

    def __init__(
        self,
        train: str | dict[str, str],
        *,
        validation: str | dict[str, str] | None = None,
        test: str | dict[str, str] | None = None,
        predict: str | dict[str, str] | None = None,
        text_column: str = "text",
        label_column: str = "label",
        context_length: int = 512,
        keep: Keep = "start",
        begin: bool = True,
        batch_texts: int = 8,
        micro_batch_size: int = 8,
        tokenizer: str = MISTRAL,
        epochs: int = 1,
        validation_share: float = 0.1,
        test_share: float = 0.1,
        most_frequent_classes: int | None = None,
        max_texts: dict[str, int] | None = None,
        on_bad_row: Literal["error", "skip"] = "error",
        seed: int = 0,
        workers: int = 0,
        cache_dir: str | None = None,
    ) -> None:
        numbers = {
            "context_length": context_length,
            "batch_texts": batch_texts,
            "micro_batch_size": micro_batch_size,
            "epochs": epochs,
        } | {f"max_texts.{split}": most for split, most in (max_texts or {}).items()}
        for name, value in numbers.items():
            if value < 1:
                raise ValueError(f"data.{name} is {value}: it must be at least 1")
        for name, share in (("validation_share", validation_share), ("test_share", test_share)):
            if not 0 < share < 1:
                raise ValueError(f"data.{name} is {share}: give a share between 0 and 1, such as 0.1")
        if most_frequent_classes is not None and most_frequent_classes < 2:
            raise ValueError(f"data.most_frequent_classes is {most_frequent_classes}: at least two classes are needed")
        if unknown := sorted(set(max_texts or {}) - set(SPLITS)):
            raise ValueError(f"data.max_texts names {', '.join(unknown)}: the splits are {', '.join(SPLITS)}")
        check_processes(workers, "data.workers")
        given = {"train": train, "validation": validation, "test": test, "predict": predict}
        self.sources = {role: LabelledTexts.named(role, source) for role, source in given.items() if source is not None}
        self.text_column, self.label_column = text_column, label_column
        self.context_length, self.epochs = context_length, epochs
        self.keep: Keep = keep
        self.begin = begin
        self.shares = {"test": test_share, "validation": validation_share}
        self.most_frequent_classes, self.max_texts = most_frequent_classes, max_texts or {}
        self.on_bad_row, self.seed = on_bad_row, seed
        self.cache_dir = Path(cache_dir).expanduser() if cache_dir else default_cache_dir()
        self.tokenizer_given, self.workers = tokenizer, workers
        self.batch_rows, self.micro_batch_size = batch_texts, micro_batch_size
        super().__init__()  # of the data module that inherits from these settings


@dataclass(frozen=True)
class ClassifierSettings(TuningSettings):
    """The arguments of `TextClassification` and their defaults. `TextClassification` explains the arguments.

    Raises:
        ValueError: the head's learning rate is not above 0, or the optimizer is only for training from random weights.
    """

    lora: Lora = Lora()  # noqa: RUF009  (frozen)
    head: Head = "hidden"
    head_learning_rate: float | None = None

    def __post_init__(self) -> None:
        if self.head_learning_rate is not None and not self.head_learning_rate > 0:
            raise ValueError(f"model.head_learning_rate is {self.head_learning_rate}: it must be above 0")
        super().__post_init__()
