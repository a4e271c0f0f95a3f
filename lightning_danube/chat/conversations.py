"""Reads conversations from files and data sets: a list of messages for each row, whatever shape the row has.

A message is `{"role": "system" | "user" | "assistant", "content": text}`, the format of chat templates. A row without
an answer to learn is returned as a `BadRow`, which the caller may refuse or skip.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lightning_danube.text.corpora import DOCUMENTATION, Source, local_files
from lightning_danube.text.embedded.made_text import turns_of
from lightning_danube.text.objects import read_objects
from lightning_danube.text.reading import BadRow, read_rows

ChatMessage = dict[str, str]
Shape = Literal["messages", "sharegpt", "instruction", "pairs"]

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "chatbot": "assistant",
}
"""The names that data sets use for the three roles."""

COLUMNS: dict[str, dict[str, tuple[str, ...]]] = {
    "messages": {"messages": ("messages", "conversation", "conversations")},
    "sharegpt": {"conversations": ("conversations", "conversation")},
    "instruction": {"instruction": ("instruction",), "output": ("output", "response", "answer")},
    "pairs": {"prompt": ("prompt", "question", "user"), "response": ("response", "completion", "answer", "assistant")},
}
"""Shape → its required parts → the columns that may hold each part."""

OPTIONAL: dict[str, dict[str, tuple[str, ...]]] = {
    "messages": {},
    "sharegpt": {"system": ("system",)},
    "instruction": {"input": ("input", "context"), "system": ("system",)},
    "pairs": {"system": ("system",)},
}


@dataclass(frozen=True)
class ConversationSource:
    """A source of conversations.

    Args:
        path: "documentation:instruct" (the embedded questions and answers), a file, a directory or a glob of files
            (jsonl, csv, tsv, parquet; plain, .gz or .zst), a directory written by `datasets` `save_to_disk`, or a hub
            id such as "HuggingFaceH4/no_robots".
        shape: "messages" (a list of {role, content}), "sharegpt" (a list of {from, value}), "instruction" (instruction,
            input, output) or "pairs" (prompt, response); if not given, detected from the columns of the first row.
        columns: part → column, for columns with other names: {prompt: question, response: best_answer}.
        name, split, revision: configuration, split and commit of a hub data set.
        max_conversations: read at most this many conversations, if the data set is larger than the run needs.
        on_bad_row: "error" refuses the source at the first row that has no conversation to learn from; "skip" leaves
            such rows out and counts them by cause.
    """

    path: str
    shape: Shape | None = None
    columns: dict[str, str] = field(default_factory=dict)
    name: str | None = None
    split: str = "train"
    revision: str | None = None
    max_conversations: int | None = None
    on_bad_row: Literal["error", "skip"] = "error"

    def __post_init__(self) -> None:
        if self.max_conversations is not None and self.max_conversations < 1:
            raise ValueError(f"max_conversations is {self.max_conversations}: it must be at least 1")
        known = sorted({part for parts in (*COLUMNS.values(), *OPTIONAL.values()) for part in parts})
        if self.shape is not None:
            known = [*COLUMNS[self.shape], *OPTIONAL[self.shape]]
        for part in self.columns:
            if part not in known:
                of = f" of the shape {self.shape!r}" if self.shape else ""
                raise ValueError(f"columns names the part {part!r}: the parts{of} are {', '.join(known)}")

    @property
    def texts(self) -> Source:
        """Returns this place as a source of documents, which finds and identifies the files."""
        return Source(self.path, name=self.name, split=self.split, revision=self.revision)


class Conversation(NamedTuple):
    """Messages, with their file and row. Rows count from 1, as in an editor."""

    messages: list[ChatMessage]
    file: str
    row: int

    @property
    def topic(self) -> str:
        """Returns the first question, which decides whether the conversation is held out."""
        return first_question(self.messages)


def read_conversations(name: str, source: ConversationSource, cache_dir: Path) -> Iterator[Conversation | BadRow]:
    """Yields all rows of a source, in a fixed order.

    Raises:
        ValueError: the source cannot be opened, has no row, or has none of the known shapes.
    """
    found: ConversationFormat | None = None
    taken = 0
    rows = _conversations_of_documentation if source.texts.is_documentation else read_objects
    for file, row, values in rows(name, source.texts, cache_dir):
        if taken == source.max_conversations:
            return
        where = f"{file}, row {row}"
        if isinstance(values, BadRow):
            yield values
        elif not isinstance(values, Mapping):
            yield BadRow(file, row, "not an object", f"{where}: expected an object, found {type(values).__name__}")
        else:
            found = found or conversation_format(values, source, where)
            try:
                messages = found.messages(values)
                check_messages(messages)
            except NoConversation as error:
                yield BadRow(file, row, error.cause, f"{where}: {error}")
            else:
                taken += 1
                yield Conversation(messages, file, row)


def questions_of_documentation(name: str, texts: Source, cache_dir: Path) -> Iterator[tuple[str, int, str]]:
    """Yields (file, row, text of questions and answers) of the embedded questions and answers.

    Raises:
        ValueError: the source names other embedded texts.
    """
    if texts.path != f"{DOCUMENTATION}instruct":
        raise ValueError(
            f"source {name!r}: {texts.path} holds documents, not conversations: {DOCUMENTATION}instruct holds "
            "questions and answers"
        )
    (file,) = local_files(name, texts, cache_dir)
    for row, values in read_rows(file):
        yield file, row, values["text"]


def _conversations_of_documentation(name: str, texts: Source, cache_dir: Path) -> Iterator[tuple[str, int, Any]]:
    for file, row, text in questions_of_documentation(name, texts, cache_dir):
        turns: list[ChatMessage] = []
        for asked, answered in turns_of(text):
            turns += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
        yield file, row, {"messages": turns}


class NoConversation(ValueError):
    """A row has no conversation to learn an answer from. `cause` is one of a few fixed texts, used for counting."""

    def __init__(self, cause: str, message: str) -> None:
        super().__init__(message)
        self.cause = cause


@dataclass(frozen=True)
class ConversationFormat:
    """How the rows of one source hold their conversations."""

    shape: Shape
    columns: Mapping[str, str]

    def messages(self, values: Mapping[str, Any]) -> list[ChatMessage]:
        """Returns the messages of a row.

        Raises:
            NoConversation: the row has no messages, or its values are not messages.
        """
        build: Callable[[Mapping[str, Any]], list[ChatMessage]] = {
            "messages": self._listed,
            "sharegpt": self._listed,
            "instruction": self._instruction,
            "pairs": self._pair,
        }[self.shape]
        return build(values)

    def _listed(self, values: Mapping[str, Any]) -> list[ChatMessage]:
        (part,) = COLUMNS[self.shape]
        turns = values.get(self.columns[part])
        if not isinstance(turns, list):
            found = "nothing" if turns is None else type(turns).__name__
            raise NoConversation("no turns", f"column {self.columns[part]!r} holds {found}, not a list of turns")
        keys = ("role", "content") if self.shape == "messages" else ("from", "value")
        return [*self._system(values), *messages_of(turns, *keys)]

    def _instruction(self, values: Mapping[str, Any]) -> list[ChatMessage]:
        prompt = checked_text(values.get(self.columns["instruction"]), "the instruction")
        given = self._optional(values, "input")
        return [
            *self._system(values),
            {"role": "user", "content": f"{prompt}\n\n{given}" if given else prompt},
            {"role": "assistant", "content": checked_text(values.get(self.columns["output"]), "the output")},
        ]

    def _pair(self, values: Mapping[str, Any]) -> list[ChatMessage]:
        return [
            *self._system(values),
            {"role": "user", "content": checked_text(values.get(self.columns["prompt"]), "the prompt")},
            {"role": "assistant", "content": checked_text(values.get(self.columns["response"]), "the response")},
        ]

    def _system(self, values: Mapping[str, Any]) -> list[ChatMessage]:
        system = self._optional(values, "system")
        return [{"role": "system", "content": system}] if system else []

    def _optional(self, values: Mapping[str, Any], part: str) -> str:
        column = self.columns.get(part)
        value = values.get(column) if column is not None else None
        return "" if value is None else checked_text(value, f"column {column!r}").strip()


def messages_of(turns: Sequence[Any], role_key: str, text_key: str) -> list[ChatMessage]:
    """Returns turns as messages.

    Raises:
        NoConversation: a turn is not a message.
    """
    messages = []
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, Mapping) or role_key not in turn or text_key not in turn:
            raise NoConversation("no turns", f"turn {number} is no object with {role_key!r} and {text_key!r}")
        role = ROLES.get(str(turn[role_key]).lower())
        if role is None:
            raise NoConversation(
                "unknown role",
                f"turn {number} has the role {turn[role_key]!r}; known are {', '.join(sorted(ROLES))}",
            )
        messages.append({"role": role, "content": checked_text(turn[text_key], f"turn {number}")})
    return messages


def checked_text(value: Any, what: str) -> str:
    if value is None:
        raise NoConversation("empty message", f"{what} is empty")
    if not isinstance(value, str):
        raise NoConversation("not text", f"{what} is {type(value).__name__}, not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise NoConversation("not text", f"{what} holds half a surrogate pair, which is no text") from error
    return value


def conversation_format(row: Mapping[str, Any], source: ConversationSource, where: str) -> ConversationFormat:
    """Returns the format of a source, found from one of its rows.

    Raises:
        ValueError: the row has none of the known shapes, or lacks a column that the source names.
    """
    for part, named in source.columns.items():
        if named not in row:
            raise ValueError(f"{where}: there is no column {named!r} for {part!r}, only {', '.join(map(str, row))}")
    shapes: list[Shape] = [source.shape] if source.shape else ["sharegpt", "messages", "instruction", "pairs"]
    for shape in shapes:
        columns: dict[str, str] = {}
        for part, names in (COLUMNS[shape] | OPTIONAL[shape]).items():
            column = source.columns.get(part) or next((name for name in names if name in row), None)
            if column is not None:
                columns[part] = column
        if COLUMNS[shape].keys() <= columns.keys() and (source.shape or _holds(shape, row, columns)):
            return ConversationFormat(shape, columns)
    if source.shape:
        wanted = " and ".join("/".join(names) for names in COLUMNS[source.shape].values())
        raise ValueError(
            f"{where}: the shape {source.shape!r} needs {wanted}, the row has {', '.join(map(str, row))}: name its "
            "columns with columns"
        )
    raise ValueError(
        f"{where}: no known shape of conversation in the columns {', '.join(map(str, row)) or 'none'}: say shape "
        f"({', '.join(COLUMNS)}) and columns"
    )


def _holds(shape: Shape, row: Mapping[str, Any], columns: Mapping[str, str]) -> bool:
    """Returns whether the turns have the keys of the shape. Both shapes may use the column "conversations"."""
    if shape not in ("messages", "sharegpt"):
        return True
    turns = row[columns[next(iter(COLUMNS[shape]))]]
    first = turns[0] if isinstance(turns, list) and turns else None
    return isinstance(first, Mapping) and ("from" if shape == "sharegpt" else "role") in first


def first_question(messages: Sequence[ChatMessage]) -> str:
    return next(message["content"] for message in messages if message["role"] == "user")


def check_messages(messages: list[ChatMessage]) -> None:
    """Checks that there is an answer to learn, and that the roles alternate.

    Raises:
        NoConversation: there is no answer, or the roles do not alternate.
    """
    if not messages:
        raise NoConversation("no turns", "the conversation has no turns")
    for number, message in enumerate(messages, start=1):
        if not message["content"].strip():
            what = "empty answer" if message["role"] == "assistant" else "empty message"
            raise NoConversation(what, f"message {number} ({message['role']}) is empty")
        if message["role"] == "system" and number > 1:
            raise NoConversation("roles out of order", f"message {number} is the system's, which may only come first")
    turns = [message["role"] for message in messages if message["role"] != "system"]
    begin = len(messages) - len(turns) + 1
    if turns and turns[0] != "user":
        raise NoConversation("roles out of order", f"message {begin} is the assistant's: the user speaks first")
    for number, (before, after) in enumerate(pairwise(turns), start=begin + 1):
        if before == after:
            raise NoConversation(
                "roles out of order", f"messages {number - 1} and {number} are both the {after}'s: roles take turns"
            )
    if not turns or turns[-1] != "assistant":
        raise NoConversation("last turn not the assistant's", "the last message is not the assistant's")
