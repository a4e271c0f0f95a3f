"""The data of text classification: labelled texts in three splits. The state of the batches is only the number of
steps."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from lightning_danube.classification.labelled_texts import (
    PACKAGE_SOURCES,
    PACKAGES,
    LabelledText,
    LabelledTexts,
    most_frequent,
    ordered,
    read_labelled_texts,
    same_text,
    split_off,
    stratified,
)
from lightning_danube.classification.settings import SPLITS, ClassificationSettings
from lightning_danube.inspection.shown import ShownExample, ShownSource, causes_of, fit_stops_at, shown_tokens
from lightning_danube.text.corpora import local_files
from lightning_danube.text.reading import BadRow
from lightning_danube.tokens.tokenizer import begin_token
from lightning_danube.training.contract import IGNORE_INDEX
from lightning_danube.training.loaders import StepRows
from lightning_danube.training.passes import bucketed_pass
from lightning_danube.training.planned_data import PlannedData
from lightning_danube.training.position import replicas_of

NO_CLASS = -1
SHOWN_CLASSES = 8


@dataclass(frozen=True)
class EncodedTexts:
    """Concatenated texts: `ids` (tokens,), `ends` (texts + 1,), `classes` (texts,), which is NO_CLASS where unknown."""

    ids: NDArray[np.int32]
    ends: NDArray[np.int64]
    classes: NDArray[np.int64]
    cut: int
    """Number of texts that were cut to fit the context."""

    def __len__(self) -> int:
        return len(self.classes)

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        result: NDArray[np.int64] = np.diff(self.ends)
        return result

    def batch(self, numbers: Sequence[int | None]) -> dict[str, Any]:
        """Returns texts as tensors: input_ids and attention_mask (B, T), classes and rows (B,).

        Texts are padded at their ends to the longest text. None stands for an empty row, which is not counted.
        """
        length = max([int(self.lengths[number]) for number in numbers if number is not None], default=1)
        ids = torch.zeros(len(numbers), length, dtype=torch.int64)
        mask = torch.zeros(len(numbers), length, dtype=torch.int64)
        classes = torch.full((len(numbers),), IGNORE_INDEX)
        rows = torch.full((len(numbers),), -1)
        for place, number in enumerate(numbers):
            if number is None:
                continue
            start, end = int(self.ends[number]), int(self.ends[number + 1])
            ids[place, : end - start] = torch.from_numpy(self.ids[start:end].astype(np.int64))
            mask[place, : end - start] = 1
            rows[place] = number
            if self.classes[number] != NO_CLASS:
                classes[place] = int(self.classes[number])
        return {"input_ids": ids, "attention_mask": mask, "classes": classes, "rows": rows}


class ClassificationData(ClassificationSettings, PlannedData):
    """Labelled texts, for `TextClassification`. `ClassificationSettings` explains the arguments."""

    stands_for = "train means the training texts and everything that encodes them"

    def initialize(self) -> None:
        super().initialize()
        self.labels: list[str] = []
        """The classes, by number."""
        self.splits: dict[str, list[LabelledText]] = {}
        self.rejected: list[BadRow] = []
        self.other_classes = 0
        """Number of texts left out because of `most_frequent_classes`."""
        self.encoded: dict[str, EncodedTexts] = {}

    # --- splits -------------------------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        if any(source.path == PACKAGES for source in self.sources.values()):
            for name in PACKAGE_SOURCES:
                local_files(name, LabelledTexts(f"documentation:{name}").texts("train"), self.cache_dir)

    def setup(self, stage: str) -> None:
        """Reads and encodes the texts and, for training, plans the epochs.

        Raises:
            ValueError: a source cannot be read or holds bad rows, there are no two classes, a split is empty, or the
                batch does not divide over the devices.
        """
        if stage == "predict" and "predict" in self.sources:
            # The checkpoint holds the classes, so the training texts are not needed.
            self.splits["predict"] = self._read("predict")
            self.encoded["predict"] = self._encode(self.splits["predict"])
            return
        if not self.splits:
            self._make_splits()
            self.encoded = {split: self._encode(texts) for split, texts in self.splits.items()}
        if stage != "fit":
            return
        train = self.encoded["train"]
        self.passes = [
            bucketed_pass(train.lengths, self.context_length, self.batch_rows, self.seed, number)
            for number in range(self.epochs)
        ]

    def _make_splits(self) -> None:
        splits = {role: self._read(role) for role in SPLITS if role in self.sources}
        if self.most_frequent_classes is not None:
            kept = most_frequent(splits["train"], self.most_frequent_classes)
            for role, texts in splits.items():
                splits[role] = [text for text in texts if text.label in kept]
                self.other_classes += len(texts) - len(splits[role])
        self.labels = ordered([str(text.label) for text in splits["train"]])
        if len(self.labels) < 2:
            raise ValueError(
                f"data.train: all {len(splits['train']):,} texts have the label {self.labels[0]!r}: it takes two "
                "classes to tell"
            )
        for role in splits.keys() - {"train"}:
            splits[role] = [text for text in splits[role] if self._is_known(text)]
        self._keep_apart(splits)
        for role, share in self.shares.items():
            if role not in splits:
                splits["train"], splits[role] = split_off(splits["train"], share, seed=self.seed, stream=role)
                if not splits[role]:
                    raise ValueError(
                        f"data.train has too few texts ({len(splits['train']):,}) to split off a share of {share} for "
                        f"{role}: raise data.{role}_share, or give data.{role}"
                    )
        for role, most in self.max_texts.items():
            texts = splits[role]
            if len(texts) > most:
                splits[role] = [texts[n] for n in stratified(texts, most, seed=self.seed, stream=f"{role} limit")]
        for role, texts in splits.items():
            if not texts:
                raise ValueError(f"data.{role}: no text is left of {self.sources[role].path}")
        if len({text.label for text in splits["train"]}) < 2:
            raise ValueError(f"data.max_texts.train is {self.max_texts['train']}: that leaves a single class; raise it")
        self.splits = {role: splits[role] for role in SPLITS}

    def _read(self, role: str) -> list[LabelledText]:
        label_column = None if role == "predict" else self.label_column
        found = read_labelled_texts(role, self.sources[role], self.text_column, label_column, self.cache_dir)
        texts = []
        for row in found:
            if isinstance(row, BadRow):
                self._reject(row)
            else:
                texts.append(row)
        if not texts:
            raise ValueError(f"data.{role}: {self.sources[role].path} holds no text to use")
        return texts

    def _reject(self, row: BadRow) -> None:
        """Records a bad row as left out.

        Raises:
            ValueError: the row is bad, and the user has not chosen to skip bad rows.
        """
        if self.on_bad_row == "error":
            raise ValueError(f"{row.message}; data.on_bad_row: skip leaves such rows out")
        self.rejected.append(row)

    def _is_known(self, text: LabelledText) -> bool:
        if text.label in self._numbers:
            return True
        known = ", ".join(self.labels[:8]) + (" …" if len(self.labels) > 8 else "")
        message = f"{text.place}: the label {text.label!r} does not occur in training, where there are {known}"
        self._reject(BadRow(text.file, text.row, "unknown label", message))
        return False

    def _keep_apart(self, splits: dict[str, list[LabelledText]]) -> None:
        """Removes from training the texts that are also in another split, and from validation those also in test.

        A score on texts seen in training would be too good. The test split stays complete, as others use it.
        """
        for role, others in (("train", ("test", "validation")), ("validation", ("test",))):
            there: dict[str, LabelledText] = {}
            for other in others:
                for text in splits.get(other, ()):
                    there.setdefault(same_text(text.text), text)
            if there and role in splits:
                splits[role] = [text for text in splits[role] if not self._stands_elsewhere(text, there)]

    def _stands_elsewhere(self, text: LabelledText, there: dict[str, LabelledText]) -> bool:
        copy = there.get(same_text(text.text))
        if copy is None:
            return False
        message = f"{text.place}: the same text is in {copy.place}, so a score on it would be too good"
        self._reject(BadRow(text.file, text.row, "is in another split", message))
        return True

    @property
    def _numbers(self) -> dict[str | None, int]:
        return {label: number for number, label in enumerate(self.labels)}

    def class_counts(self) -> dict[str, dict[str, int]]:
        """Returns label → split → number of texts."""
        counts = {split: Counter(text.label for text in texts) for split, texts in self.splits.items()}
        return {label: {split: counts[split][label] for split in counts} for label in self.labels}

    def causes(self) -> dict[str, int]:
        """Returns cause → number of rows left out."""
        return dict(Counter(row.cause for row in self.rejected))

    # --- tokens -------------------------------------------------------------------------------------------------------

    def _encode(self, texts: Sequence[LabelledText]) -> EncodedTexts:
        """Encodes texts and cuts them to the context. Text that spells a special token stays text."""
        bos, backend = begin_token(self.tokenizer), self.tokenizer.backend_tokenizer
        head = [] if bos is None or not self.begin else [bos]
        room, cut = self.context_length - len(head), 0
        kept = slice(room) if self.keep == "start" else slice(-room, None)
        parts: list[NDArray[np.int32]] = []
        remaining = iter(texts)
        backend.encode_special_tokens = True
        try:
            # Texts are encoded in parts, because encodings take many times the memory of their ids.
            while part := list(islice(remaining, 1000)):
                for encoding in backend.encode_batch_fast([text.text for text in part], add_special_tokens=False):
                    cut += len(encoding.ids) > room
                    parts.append(np.array([*head, *encoding.ids[kept]], np.int32))
        finally:
            backend.encode_special_tokens = False
        ends = np.cumsum([0, *(len(ids) for ids in parts)], dtype=np.int64)
        numbers = self._numbers
        classes = np.array([numbers.get(text.label, NO_CLASS) for text in texts], np.int64)
        return EncodedTexts(np.concatenate(parts), ends, classes, cut)

    # --- what `inspect` shows -----------------------------------------------------------------------------------------

    def shown_sources(self, examples: int, rows: int) -> Iterator[ShownSource]:
        """Yields what `inspect` shows of each split. All rows are read, because the splits need them; at most `rows`
        texts of each split become tokens."""
        stops, self.on_bad_row = self.on_bad_row == "error", "skip"
        self.prepare_data()
        try:
            self._make_splits()
            splits = dict(self.splits)
            if "predict" in self.sources:
                splits["predict"] = self._read("predict")
        except ValueError as error:
            if not self.rejected:
                raise
            shown = ShownSource("train", "texts", self.sources["train"].path, len(self.rejected), warnings=[str(error)])
            shown.left_out, shown.places = causes_of(self.rejected)
            yield shown
            return
        # Rows are listed with the first split that was read from their file.
        listed: set[int] = set()
        for split, texts in splits.items():
            files = {text.file for text in texts}
            left_out = [row for row in self.rejected if row.file in files and id(row) not in listed]
            listed.update(map(id, left_out))
            shown = self._shown_split(split, texts, self._encode(texts[:rows]), left_out, examples)
            if stops and left_out:
                shown.warnings.append(fit_stops_at(left_out[0], "data.on_bad_row", shown.kept))
            yield shown

    def _shown_split(
        self,
        split: str,
        texts: Sequence[LabelledText],
        encoded: EncodedTexts,
        left_out: Sequence[BadRow],
        examples: int,
    ) -> ShownSource:
        source = self.sources.get(split)
        shown = ShownSource(
            split,
            "texts",
            "" if source is None else source.path,
            read=len(texts) + len(left_out),
            complete=True,
            kept=len(texts),
            lengths=encoded.lengths.tolist(),
            limit=self.context_length,
            over_limit=("cut, and the " + self.keep + " kept", encoded.cut),
            marks=None,
            tokens=len(encoded.ids),
        )
        if source is None:
            shown.notes.append("split off the training texts")
        shown.left_out, shown.places = causes_of(left_out)
        if split != "predict":
            counts = Counter(str(text.label) for text in texts).most_common()
            named = ", ".join(f"{label} {100 * count / len(texts):.1f} %" for label, count in counts[:SHOWN_CLASSES])
            more = f" and {len(counts) - SHOWN_CLASSES:,} more" if len(counts) > SHOWN_CLASSES else ""
            shown.notes.append(f"classes: {named}{more}")
        if split == "train" and self.other_classes:
            shown.notes.append(f"texts of other classes, left out of all splits: {self.other_classes:,}")
        if split in self.max_texts:
            shown.notes.append(f"chosen by data.max_texts.{split} = {self.max_texts[split]:,}")
        if len(encoded) < len(texts):
            shown.notes.insert(0, f"tokens and lengths are those of the first {len(encoded):,} texts (--rows)")
        for number in range(min(examples, len(encoded))):
            batch = encoded.batch([number])
            ids = batch["input_ids"][0][batch["attention_mask"][0].bool()].tolist()
            label, kind = texts[number].label, int(batch["classes"][0])
            title = texts[number].place + (f", class {kind}: {label}" if label is not None else "")
            shown.examples.append(ShownExample(title, shown_tokens(self.tokenizer, ids)))
        return shown

    # --- length -------------------------------------------------------------------------------------------------------

    @property
    def batch_tokens(self) -> int:
        """Returns the mean number of tokens of an optimizer step, without padding, since steps differ in length."""
        # `total_steps` comes first: before setup it raises an AttributeError, which tells the parser that the length is
        # unknown.
        steps = self.total_steps
        return -(-int(self.encoded["train"].ends[-1]) * self.epochs // steps)

    def most_tokens(self) -> int | None:
        texts = self.max_texts.get("train")
        # The mean tokens of a step are rounded up.
        return None if texts is None else self.epochs * texts * (self.context_length + 1)

    def tokens_of_examples(self) -> NDArray[np.int64]:
        return self.encoded["train"].lengths

    # --- state --------------------------------------------------------------------------------------------------------

    def order(self) -> dict[str, Any]:
        train = self.encoded["train"]
        digest = hashlib.sha256()
        for array in (train.ids, train.ends, train.classes):
            digest.update(array.tobytes())
        return {"seed": self.seed, self.batch_key: self.batch_rows, "train": digest.hexdigest()[:16]}

    # --- loaders ------------------------------------------------------------------------------------------------------

    def train_dataloader(self) -> DataLoader[Any]:
        texts = self.encoded["train"]
        return self.training_loader(TextRows(texts), np.ones(len(texts), np.int64))

    def val_dataloader(self) -> DataLoader[Any]:
        return self._evaluation_loader("validation")

    def test_dataloader(self) -> DataLoader[Any]:
        return self._evaluation_loader("test")

    @property
    def predicted(self) -> str:
        """Returns the name of the split that `predict` classifies."""
        return "predict" if "predict" in self.sources else "test"

    def described(self, row: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns the place of a text that `predict` classifies, its `id` if it has one, and the text; and its
        `true_label` if the label is known."""
        text = self.splits[self.predicted][row]
        known = {} if text.id is None else {"id": text.id}
        place = {"file": text.file, "row": text.row, **known, "text": text.text}
        return place, {} if text.label is None else {"true_label": text.label}

    def predict_dataloader(self) -> DataLoader[Any]:
        # In the order of the file, so that predictions can be compared with it line by line.
        return self._evaluation_loader(self.predicted, longest_first=False)

    def _evaluation_loader(self, split: str, longest_first: bool = True) -> DataLoader[Any]:
        """Returns the loader of a split. Its batches are filled by places, because short texts leave a GPU idle. All
        replicas have equally many batches; the last may have empty rows."""
        replicas, replica = replicas_of(self.trainer)
        texts = self.encoded[split]
        order: list[int] = list(range(len(texts)))
        if longest_first:
            order = np.argsort(-texts.lengths, kind="stable").tolist()
        batches = filled_batches(order, texts.lengths, self.evaluation_places, replicas)
        return DataLoader(TextBatches(texts, [batch[replica::replicas] for batch in batches]), batch_size=None)

    @property
    def evaluation_places(self) -> int:
        """Returns the most places, padding included, of a batch that is evaluated: as many as training may hold."""
        return self.micro_batch_size * self.context_length


def filled_batches(
    order: Sequence[int], lengths: NDArray[np.int64], places: int, replicas: int
) -> list[list[int | None]]:
    """Returns batches of the texts in their order, as full as `places` of each replica allow.

    A batch has equally many rows for each replica, which takes every `replicas`-th; None stands for an empty row.
    """
    batches: list[list[int | None]] = []
    width = 0
    for first in range(0, len(order), replicas):
        together: list[int | None] = [*order[first : first + replicas]]
        together += [None] * (replicas - len(together))
        width = max(width, *(int(lengths[number]) for number in together if number is not None))
        if batches and (len(batches[-1]) // replicas + 1) * width <= places:
            batches[-1] += together
        else:
            batches.append(together)
            width = max(int(lengths[number]) for number in together if number is not None)
    return batches


class TextRows(Dataset[Any]):
    """Makes micro-batches from the numbers of their texts, with `step_labels`, the text count of the optimizer step."""

    def __init__(self, texts: EncodedTexts) -> None:
        self.texts = texts

    def __getitems__(self, rows: StepRows) -> dict[str, Any]:
        numbers = [row[0] if row else None for row in rows]
        return self.texts.batch(numbers) | {"step_labels": rows.step_labels}


class TextBatches(Dataset[Any]):
    """Micro-batches of a split that is evaluated."""

    def __init__(self, texts: EncodedTexts, batches: list[list[int | None]]) -> None:
        self.texts, self.batches = texts, batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return self.texts.batch(self.batches[number])
