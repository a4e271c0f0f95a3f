"""The data of fine-tuning: conversations are encoded once; the state of the rows is only the number of steps."""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_danube.chat.conversations import Conversation, ConversationSource, NoConversation, read_conversations
from lightning_danube.chat.preferences import Preference
from lightning_danube.chat.rows import DoesNotFit, FittedChat, fit_chat
from lightning_danube.chat.settings import ChatSettings, ConversationSettings
from lightning_danube.files import naming_cached, new_folder, read_json
from lightning_danube.inspection.shown import ShownExample, ShownSource, causes_of, fit_stops_at, shown_tokens
from lightning_danube.model.masks import runs_of
from lightning_danube.terminal import amount, counted
from lightning_danube.text.quality import text_hash
from lightning_danube.text.reading import BadRow
from lightning_danube.tokens.chat_template import ChatEncoder, chat_template_of
from lightning_danube.tokens.shards import files_identity, held_out_below
from lightning_danube.training.contract import IGNORE_INDEX, HeldOutBatch, StepBatch, TokenBatch
from lightning_danube.training.loaders import StepRows, steps_of
from lightning_danube.training.passes import LAYOUTS, Pass
from lightning_danube.training.planned_data import PlannedData
from lightning_danube.training.position import replicas_of

FORMAT = 3
"""Version of how rows become encoded conversations. Those of another version are made again."""
SPLITS = ("train", "validation")
ORIGINS = "origins.json"
"""File with the origins of the held-out examples, beside the encoded conversations."""
SHOWN_BAD_ROWS = 3
TOO_LONG = "too long"
SHOWN_COUNTS = {
    "dropped_turns": "messages left out at the beginning, so that the rest fits",
    "cut_tokens": "tokens cut off at the end",
    "changed_answers": "answers not learned, because the template changes them",
    "answers_not_learned": "answers not learned, because their weight is 0",
    "dropped_leading_answers": "answers left out at the beginning, which answer no question",
}
"""Key of a source's report → what it counts."""


@dataclass(frozen=True)
class EncodedChats:
    """The concatenated conversations of one split: `ids` and `learned` (tokens,), `ends` (conversations + 1,).

    `origins` has the file, row and, if known, `id` of each example, for held-out examples only.
    """

    ids: NDArray[Any]
    learned: NDArray[np.bool_]
    ends: NDArray[np.int64]
    origins: Sequence[dict[str, Any]] = ()

    def __len__(self) -> int:
        return len(self.ends) - 1

    def origins_of(self, rows: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
        """Returns the origin of the example in each row, empty for a row without an example; [] if none is known."""
        return [self.origins[row[0]] if row else {} for row in rows] if self.origins else []

    @cached_property
    def places(self) -> NDArray[np.int64]:
        """Returns the places of each conversation in a row. Its last token takes no place: it is only a label."""
        return np.diff(self.ends) - 1

    @cached_property
    def labels(self) -> NDArray[np.int64]:
        """Returns the number of tokens of each conversation that the loss counts."""
        counted = np.concatenate([[0], np.cumsum(self.learned, dtype=np.int64)])
        # The first token of a conversation is never a label: no place comes before it.
        first = self.learned[self.ends[:-1]] if len(self.ids) else np.zeros(0, dtype=np.int64)
        result: NDArray[np.int64] = np.diff(counted[self.ends]) - first
        return result

    def row(self, chats: Sequence[int], length: int) -> dict[str, Tensor]:
        """Returns one row of `length` places: inputs, labels, and for each place the number of its conversation (from
        1; 0 for none) and the position in the conversation."""
        row = {name: torch.zeros(length, dtype=torch.int64) for name in ("input_ids", "document_ids", "position_ids")}
        row["labels"] = torch.full((length,), IGNORE_INDEX)
        place = 0
        for number, chat in enumerate(chats, start=1):
            start, end = int(self.ends[chat]), int(self.ends[chat + 1])
            ids = torch.from_numpy(self.ids[start:end].astype(np.int64))
            learned = torch.from_numpy(self.learned[start + 1 : end].copy())
            here = slice(place, place + len(ids) - 1)
            row["input_ids"][here] = ids[:-1]
            row["labels"][here] = ids[1:].masked_fill(~learned, IGNORE_INDEX)
            row["document_ids"][here] = number
            row["position_ids"][here] = torch.arange(len(ids) - 1)
            place = here.stop
        return row


def held_out_of_few(topics: Mapping[int, int]) -> int | None:
    """Returns the topic that is held out where none is below the border: the lowest. None if there is only one topic.

    Args:
        topics: hash of a topic → examples about it.
    """
    return min(topics) if len(topics) > 1 else None


class FittedExample(NamedTuple):
    """A row of a source with its encoded conversations: one, or one for each answer of a pair."""

    row: Conversation | Preference
    chats: list[FittedChat]

    @property
    def origin(self) -> dict[str, Any]:
        """Returns the file and the row of the example, and its `id` if it has one."""
        known = {} if self.row.id is None else {"id": self.row.id}
        return {"file": self.row.file, "row": self.row.row, **known}

    @property
    def is_shortened(self) -> bool:
        return any(chat.dropped_turns or chat.cut_tokens for chat in self.chats)


class ConversationData(ConversationSettings, PlannedData):
    """The base class of the data modules of conversations. It encodes the sources once. A subclass defines an
    example: a conversation or a pair."""

    chats_each: ClassVar[int] = 1
    """Number of encoded conversations in an example; they are stored consecutively."""
    sides: ClassVar[tuple[str, ...]] = ("",)
    """What is added to the place of an example for each of its conversations."""
    stands_for = "sources means their files and everything that encodes them"

    def initialize(self) -> None:
        super().initialize()
        self.encoder = ChatEncoder(self.tokenizer)
        self.encoder.check_learnable()
        self._fingerprints: dict[str, str] = {}

    # --- what an example is -------------------------------------------------------------------------------------------

    @abstractmethod
    def read(self, name: str) -> Iterator[Conversation | Preference | BadRow]:
        """Yields the examples of a source, in a fixed order."""

    @abstractmethod
    def fit_example(self, found: Any) -> list[FittedChat]:
        """Returns an example as encoded conversations.

        Raises:
            DoesNotFit: the policy leaves the example out.
            ValueError: the template refuses the example.
        """

    @abstractmethod
    def encoded_by(self) -> list[Any]:
        """Returns the options that decide how an example is encoded."""

    @abstractmethod
    def lengths(self, chats: EncodedChats) -> NDArray[np.int64]:
        """Returns the places that each example takes in a row."""

    @abstractmethod
    def counted(self, chats: EncodedChats) -> NDArray[np.int64]:
        """Returns the number of tokens or pairs of each example that the loss counts."""

    @abstractmethod
    def plan(self, number: int) -> Pass:
        """Returns the plan of one epoch over the examples of `train_chats`."""

    @abstractmethod
    def training_rows(self) -> Dataset[Any]:
        """Returns a data set that makes a micro-batch from the numbers of the examples in its rows."""

    @abstractmethod
    def held_out_rows(self, name: str, chats: EncodedChats, batches: list[list[list[int]]]) -> Dataset[Any]:
        """Returns the micro-batches of a source's held-out examples."""

    # --- encoding -----------------------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        for name in self.sources:
            if not self._directory(name).exists():
                self._encode(name)

    def fingerprint(self, name: str) -> str:
        """Returns a hash of everything that decides a source's encoded conversations.

        The files are hashed when the run begins, since they may change while the run reads the encoded conversations.
        """
        if name not in self._fingerprints:
            self._fingerprints[name] = self._fingerprint_now(name)
        return self._fingerprints[name]

    def _fingerprint_now(self, name: str) -> str:
        source = self.sources[name]
        facts = [
            FORMAT,
            asdict(source),
            self.encoder.fingerprint,
            self.context_length,
            *self.encoded_by(),
            self.held_out,
        ]
        digest = hashlib.sha256(json.dumps(facts).encode())
        digest.update(files_identity(name, source.texts, self.cache_dir))
        return digest.hexdigest()[:12]

    def _directory(self, name: str) -> Path:
        return self.cache_dir / f"{self.example}s" / f"{name}-{self.fingerprint(name)}"

    def _encode(self, name: str) -> None:
        """Encodes a source into a temporary folder beside its final place, which is renamed when it is complete.

        Raises:
            ValueError: the source cannot be read, or holds a row with nothing to learn and rows may not be skipped.
        """
        report, left_out, messages = Counter[str](), Counter[str](), list[str]()
        chats: dict[str, list[FittedChat]] = {split: [] for split in SPLITS}
        origins: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
        hashes: list[int] = []  # of the topic of each chat to learn
        topics = Counter[int]()  # examples to learn of each topic
        for found in self.examples(name):
            if isinstance(found, BadRow):
                if self.stops_at(name, found):
                    raise ValueError(f"source {name!r}: {found.message}; on_bad_row: skip leaves such rows out")
                left_out[found.cause] += 1
                messages += [found.message] * (len(messages) < SHOWN_BAD_ROWS)
                continue
            split = "validation" if self.is_held_out(found.row) else "train"
            chats[split] += found.chats
            origins[split].append(found.origin)
            if split == "train":
                topic = text_hash(found.row.topic)
                hashes += [topic] * len(found.chats)
                topics[topic] += 1
            self._count(report, found)
        if not report[f"{self.example}s"]:
            raise ValueError(f"source {name!r} holds no {self.example} to learn from: {'; '.join(messages)}")
        lowest = held_out_of_few(topics)
        if not chats["validation"] and lowest is not None:
            learned = list(zip(chats["train"], hashes, strict=True))
            chats["validation"] = [chat for chat, topic in learned if topic == lowest]
            chats["train"] = [chat for chat, topic in learned if topic != lowest]
            each = zip(origins["train"], hashes[:: self.chats_each], strict=True)
            origins["validation"] = [origin for origin, topic in each if topic == lowest]
            report[f"{self.example}s_held_out"] = topics[lowest]
        report_of_source = {"source": name, **report, "left_out": left_out, "first_left_out": messages}
        self._write(name, chats, report_of_source, origins["validation"])

    def examples(self, name: str) -> Iterator[FittedExample | BadRow]:
        """Yields all rows of a source, in a fixed order, each encoded or with the reason why it is left out."""
        for found in self.read(name):
            fitted = found if isinstance(found, BadRow) else self._fitted(found)
            if isinstance(fitted, BadRow):
                yield fitted
            else:
                assert not isinstance(found, BadRow)
                yield FittedExample(found, fitted)

    def stops_at(self, name: str, row: BadRow) -> bool:
        """Returns whether a row that is left out ends the run."""
        # The user's policy leaves out an example that is too long, so its length is not an error in the data.
        return self.sources[name].on_bad_row == "error" and row.cause != TOO_LONG

    def is_held_out(self, found: Conversation | Preference) -> bool:
        return text_hash(found.topic) < held_out_below(self.held_out)

    def _count(self, report: Counter[str], found: FittedExample) -> None:
        """Adds an example to the report of its source."""
        report[f"{self.example}s"] += 1
        report[f"{self.example}s_held_out"] += self.is_held_out(found.row)
        report[f"shortened_{self.example}s"] += found.is_shortened
        report["dropped_turns"] += found.chats[0].dropped_turns
        if isinstance(found.row, Conversation):
            report["dropped_leading_answers"] += found.row.dropped
            report["answers_not_learned"] += len(found.row.unlearned)
        for chat in found.chats:
            report["tokens"] += len(chat.ids)
            report["answer_tokens"] += int(chat.learned.sum())
            report["cut_tokens"] += chat.cut_tokens
            report["changed_answers"] += chat.changed_answers

    def _fitted(self, found: Conversation | Preference) -> list[FittedChat] | BadRow:
        where = f"{found.file}, row {found.row}"
        try:
            return self.fit_example(found)
        except DoesNotFit as error:
            return BadRow(found.file, found.row, TOO_LONG, f"{where}: {error}")
        except NoConversation as error:
            return BadRow(found.file, found.row, error.cause, f"{where}: {error}")
        except ValueError as error:
            return BadRow(found.file, found.row, "refused by the template", f"{where}: {error}")

    def _write(
        self,
        name: str,
        chats: dict[str, list[FittedChat]],
        report: dict[str, Any],
        origins: Sequence[dict[str, Any]],
    ) -> None:
        """Writes the encoded examples of a source, its report, and the origins of the held-out examples."""
        with new_folder(self._directory(name)) as building:
            for split, members in chats.items():
                encoded = self._concatenated(members)
                for what, array in {"ids": encoded.ids, "learned": encoded.learned, "ends": encoded.ends}.items():
                    np.save(building / f"{split}-{what}.npy", array)
            (building / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
            (building / ORIGINS).write_text(json.dumps({"validation": origins}), encoding="utf-8")

    def _concatenated(self, chats: Sequence[FittedChat]) -> EncodedChats:
        dtype = np.uint16 if self.vocab_size <= 2**16 else np.uint32
        # The empty array comes first, so that a split without conversations can be concatenated, too.
        return EncodedChats(
            np.concatenate([np.zeros(0, int), *(chat.ids for chat in chats)], dtype=dtype, casting="unsafe"),
            np.concatenate([np.zeros(0, bool), *(chat.learned for chat in chats)]),
            np.cumsum([0, *(len(chat.ids) for chat in chats)], dtype=np.int64),
        )

    def reports(self) -> dict[str, dict[str, Any]]:
        """Returns for each source the examples, the tokens, and what was shortened or left out, by cause."""
        return {name: read_json(self._directory(name) / "report.json") for name in self.sources}

    def setup(self, stage: str) -> None:
        """Opens the encoded conversations and, for training, plans the epochs.

        Raises:
            ValueError: a split is empty, or the batch does not divide over the devices.
        """
        opened = {name: {split: self._open(name, split) for split in SPLITS} for name in self.sources}
        self._validation = {name: splits["validation"] for name, splits in opened.items()}
        for name, chats in self._validation.items():
            if not len(chats):
                # Of several questions, at least one is held out.
                has = amount(len(opened[name]["train"]) // self.chats_each, self.example)
                raise ValueError(f"source {name!r} has {has} {self._one_question}")
        if stage != "fit":
            return
        self.train_chats = joined([splits["train"] for splits in opened.values()])
        if not len(self.train_chats):
            raise ValueError(
                f"all {self.example}s are held out: add {self.example}s on other questions, or lower data.held_out "
                f"(now {self.held_out})"
            )
        self.passes = [self.plan(number) for number in range(self.epochs)]

    def _open(self, name: str, split: str) -> EncodedChats:
        directory = self._directory(name)
        with naming_cached(directory):
            ids, learned, ends = (
                np.load(directory / f"{split}-{what}.npy", mmap_mode="r") for what in ("ids", "learned", "ends")
            )
            origins = read_json(directory / ORIGINS)["validation"] if split == "validation" else ()
            fits = len(ids) == len(learned) == ends[-1] and not (np.diff(ends, prepend=0) < 0).any()
            if not fits or (split == "validation" and len(origins) * self.chats_each != len(ends) - 1):
                raise ValueError("its arrays do not fit together")
            return EncodedChats(ids, learned, np.asarray(ends), origins)

    # --- what `inspect` shows -----------------------------------------------------------------------------------------

    def shown_sources(self, examples: int, rows: int) -> Iterator[ShownSource]:
        for name in self.sources:
            found = self.examples(name)
            taken = list(islice(found, rows))
            yield self._shown_source(name, taken, examples, complete=next(found, None) is None)

    def _shown_source(
        self, name: str, taken: Sequence[FittedExample | BadRow], examples: int, complete: bool
    ) -> ShownSource:
        left_out = [row for row in taken if isinstance(row, BadRow)]
        kept = [row for row in taken if not isinstance(row, BadRow)]
        chats, report = self._concatenated([chat for row in kept for chat in row.chats]), Counter[str]()
        for row in kept:
            self._count(report, row)
        shown = ShownSource(
            name,
            f"{self.example}s",
            self.sources[name].path,
            read=len(taken),
            complete=complete,
            kept=len(kept),
            lengths=[int(length) for length in self.lengths(chats)],
            limit=self.context_length,
            over_limit=("shortened", report[f"shortened_{self.example}s"]),
            marked_tokens=int(chats.labels.sum()),
            tokens=len(chats.ids),
        )
        shown.left_out, shown.places = causes_of(left_out)
        held_out = report[f"{self.example}s_held_out"]
        topics = Counter(text_hash(row.row.topic) for row in kept)
        if complete and not held_out and (lowest := held_out_of_few(topics)) is not None:
            held_out = topics[lowest]
        if kept:
            shown.notes.append(f"held out for validation: {held_out:,} of {len(kept):,}")
        for key, what in SHOWN_COUNTS.items():
            if report[key]:
                shown.notes.append(f"{what}: {report[key]:,}")
        if refused := next((row for row in left_out if self.stops_at(name, row)), None):
            option = f"data.sources.{name}.on_bad_row"
            shown.warnings.append(fit_stops_at(refused, option, len(kept)))
        if complete and len(topics) == 1:
            has = amount(len(kept), self.example)
            shown.warnings.append(f"fit refuses this source, because it has {has} {self._one_question}")
        elif complete and kept and held_out == len(kept):
            change = f"all are held out: lower data.held_out (now {self.held_out})"
            shown.warnings.append(f"fit refuses this source, because {change}")
        first = list(range(min(examples, len(kept))))
        # A shortened example shows what is lost.
        shortened = next((n for n, row in enumerate(kept) if row.is_shortened), None)
        if examples and shortened is not None and shortened not in first:
            first.append(shortened)
        shown.examples = [one for number in first for one in self._shown_examples(chats, number, kept[number])]
        return shown

    @property
    def _one_question(self) -> str:
        """Says why examples that share their first question cannot be split, and what helps."""
        return (
            f"on one question, and training and validation need different questions: add {self.example}s on at least "
            "one other question"
        )

    def _shown_examples(self, chats: EncodedChats, number: int, found: FittedExample) -> Iterator[ShownExample]:
        for side, fitted in enumerate(found.chats):
            chat = number * self.chats_each + side
            row = chats.row([chat], int(chats.places[chat]))
            ids = [*row["input_ids"].tolist(), int(chats.ids[chats.ends[chat + 1] - 1])]
            # The label of a place is the next token, so the first token has none.
            learned = [False, *(row["labels"] != IGNORE_INDEX).tolist()]
            notes = (
                [f"{counted(fitted.dropped_turns, 'of the oldest messages is', 'of the oldest messages are')} left out"]
                if fitted.dropped_turns
                else []
            )
            notes += (
                [f"{counted(fitted.cut_tokens, 'token is', 'tokens are')} cut off at the end"]
                if fitted.cut_tokens
                else []
            )
            notes += [f"answers that the template changes: {fitted.changed_answers}"] if fitted.changed_answers else []
            title = f"{found.row.file}, row {found.row.row}{self.sides[side]}"
            yield ShownExample(title, shown_tokens(self.tokenizer, ids, learned), notes)

    @property
    def batch_tokens(self) -> int:
        """Returns the places of one optimizer step."""
        return self.batch_rows * self.chats_each * self.context_length

    def most_tokens(self) -> int | None:
        limits = [source.limit for source in self.sources.values() if source.limit is not None]
        if len(limits) < len(self.sources):
            return None
        # A row holds at least one example, and the last step of a pass may have empty rows.
        return -(-sum(limits) // self.batch_rows) * self.epochs * self.batch_tokens

    def tokens_of_examples(self) -> NDArray[np.int64]:
        tokens: NDArray[np.int64] = self.train_chats.places.reshape(-1, self.chats_each).sum(1)
        return tokens

    @property
    def held_out_sets(self) -> int:
        return len(self.sources)

    # --- state --------------------------------------------------------------------------------------------------------

    def tokenizer_facts(self) -> dict[str, Any]:
        # The template that this run trains with, even if the tokenizer came without a template.
        return {**super().tokenizer_facts(), "chat_template": chat_template_of(self.tokenizer)}

    def order(self) -> dict[str, Any]:
        return {
            "sources": {name: self.fingerprint(name) for name in self.sources},
            "seed": self.seed,
            self.batch_key: self.batch_rows,
        }

    # --- loaders ------------------------------------------------------------------------------------------------------

    def train_dataloader(self) -> DataLoader[Any]:
        return self.training_loader(self.training_rows(), self.counted(self.train_chats))

    def val_dataloader(self) -> list[DataLoader[Any]]:
        return self._evaluation_loaders(self.validation_examples)

    def test_dataloader(self) -> list[DataLoader[Any]]:
        return self._evaluation_loaders(None)

    def predict_dataloader(self) -> list[DataLoader[Any]]:
        return self._evaluation_loaders(None)

    def _evaluation_loaders(self, limit: int | None) -> list[DataLoader[Any]]:
        """Returns one loader for each source. All replicas have equally many batches; the last may have empty rows."""
        replicas, replica = replicas_of(self.trainer)
        loaders = []
        for name, chats in self._validation.items():
            longest_first = np.argsort(-self.lengths(chats)[: limit or len(chats)], kind="stable").tolist()
            mine: list[list[int]] = [[example] for example in longest_first[replica::replicas]]
            mine += [[] for _ in range(-(-len(longest_first) // replicas) - len(mine))]
            batches = [mine[i : i + self.micro_batch_size] for i in range(0, len(mine), self.micro_batch_size)]
            loaders.append(DataLoader(self.held_out_rows(name, chats, batches), batch_size=None))
        return loaders


class ChatData(ChatSettings, ConversationData):
    """Conversations of several sources, for `SupervisedFineTuning`. `ChatSettings` explains the arguments."""

    def read(self, name: str) -> Iterator[Conversation | BadRow]:
        source = self.sources[name]
        assert isinstance(source, ConversationSource)
        return read_conversations(name, source, self.cache_dir)

    def fit_example(self, found: Conversation) -> list[FittedChat]:
        options = (self.context_length, self.too_long, self.learned, found.unlearned)
        return [fit_chat(self.encoder, found.messages, *options)]

    def encoded_by(self) -> list[Any]:
        return [self.learned, self.too_long]

    def lengths(self, chats: EncodedChats) -> NDArray[np.int64]:
        return chats.places

    def counted(self, chats: EncodedChats) -> NDArray[np.int64]:
        return chats.labels

    def plan(self, number: int) -> Pass:
        lay_out = LAYOUTS[self.layout]
        return lay_out(self.train_chats.places, self.context_length, self.batch_rows, self.seed, number)

    def training_rows(self) -> ChatRows:
        return ChatRows(self.train_chats, self.context_length, packed=self.layout == "packed")

    def held_out_rows(self, name: str, chats: EncodedChats, batches: list[list[list[int]]]) -> HeldOutChats:
        return HeldOutChats(name, chats, batches, self.context_length)

    def order(self) -> dict[str, Any]:
        return super().order() | {"layout": self.layout}

    def fill(self) -> float:
        """Returns the share of the places of all rows that hold a token; the rest is padding."""
        places = sum(len(one.rows) for one in self.passes) * self.context_length
        if self.layout == "bucketed":
            places = sum(
                int(self.train_chats.places[[chat for row in step for chat in row]].max()) * self.batch_rows
                for one in self.passes
                for step in steps_of(one)
            )
        return float(self.train_chats.places.sum()) * self.epochs / places

    def evaluation_tokens(self, limit: int | None) -> dict[str, int]:
        """Returns the number of answer tokens behind each source's held-out loss."""
        return {name: int(chats.labels[: limit or len(chats)].sum()) for name, chats in self._validation.items()}


def joined(parts: Sequence[EncodedChats]) -> EncodedChats:
    """Returns several sources as one. A single source stays on the disk."""
    if len(parts) == 1:
        return parts[0]
    starts = np.cumsum([0, *(len(part.ids) for part in parts)])
    ends = [part.ends[1:] + start for part, start in zip(parts, starts[:-1], strict=True)]
    dtype = np.result_type(*(part.ids.dtype for part in parts))
    return EncodedChats(
        np.concatenate([part.ids.astype(dtype) for part in parts]),
        np.concatenate([part.learned for part in parts]),
        np.concatenate([np.zeros(1, dtype=np.int64), *ends]),
    )


class ChatRows(Dataset[Any]):
    """Makes a micro-batch from the numbers of the conversations in its rows.

    A micro-batch has input_ids, labels and, if packed, document_ids, document_runs and position_ids, (rows, places)
    int64, and `step_labels`, the number of tokens that the loss counts in the whole optimizer step.
    """

    def __init__(self, chats: EncodedChats, context_length: int, packed: bool) -> None:
        self.chats, self.context_length, self.packed = chats, context_length, packed

    def __getitems__(self, rows: StepRows) -> StepBatch:
        return {**batch_of(self.chats, rows, self.context_length, self.packed), "step_labels": rows.step_labels}


class HeldOutChats(Dataset[Any]):
    """Micro-batches of one source's held-out conversations, one conversation in each row."""

    def __init__(self, source: str, chats: EncodedChats, batches: list[list[list[int]]], context_length: int) -> None:
        self.source, self.chats, self.batches, self.context_length = source, chats, batches, context_length

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> HeldOutBatch:
        rows = self.batches[number]
        return {
            **batch_of(self.chats, rows, self.context_length, packed=False),
            "source": self.source,
            "rows": [row[0] if row else -1 for row in rows],
            "origins": self.chats.origins_of(rows),
        }


def batch_of(chats: EncodedChats, rows: Sequence[Sequence[int]], context_length: int, packed: bool) -> TokenBatch:
    """Returns rows as tensors. Rows of one conversation each are padded only to the longest conversation.

    The padding stands after the conversation's end, where causal attention does not see it.
    """
    length = context_length
    if not packed:
        length = max([int(chats.places[chat]) for row in rows for chat in row], default=1)
    tensors = [chats.row(row, length) for row in rows]
    batch: TokenBatch = {
        "input_ids": torch.stack([row["input_ids"] for row in tensors]),
        "labels": torch.stack([row["labels"] for row in tensors]),
    }
    if packed:
        batch["document_ids"] = torch.stack([row["document_ids"] for row in tensors])
        batch["document_runs"] = runs_of(batch["document_ids"])
        batch["position_ids"] = torch.stack([row["position_ids"] for row in tensors])
    return batch
