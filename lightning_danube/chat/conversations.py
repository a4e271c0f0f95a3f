"""Reads conversations from files and data sets: a list of messages for each row, whatever shape the row has.

A message is `{"role": "system" | "user" | "assistant", "content": text}`, the format of chat templates. A row without
an answer to learn is returned as a `BadRow`, which the caller may refuse or skip. So is a row with a field that changes
what is learned and that is not read, such as calls of tools.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lightning_danube.text.corpora import DOCUMENTATION, Source, local_files
from lightning_danube.text.embedded.made_text import turns_of
from lightning_danube.text.objects import read_objects
from lightning_danube.text.reading import BadRow, id_of, listed, read_rows

ChatMessage = dict[str, str]
Shape = Literal["messages", "sharegpt", "tree", "instruction", "pairs"]

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
    "tree": {"tree": ("prompt",)},
    "instruction": {"instruction": ("instruction",), "output": ("output", "response", "answer")},
    "pairs": {"prompt": ("prompt", "question", "user"), "response": ("response", "completion", "answer", "assistant")},
}
"""Shape → its required parts → the columns that may hold each part."""

SYSTEM = ("system", "system_prompt")
HISTORY = ("history",)
OPTIONAL: dict[str, dict[str, tuple[str, ...]]] = {
    "messages": {"system": SYSTEM},
    "sharegpt": {"system": SYSTEM},
    "tree": {"system": SYSTEM},
    "instruction": {"input": ("input", "context"), "system": SYSTEM, "history": HISTORY},
    "pairs": {"system": SYSTEM, "history": HISTORY},
}
"""Shape → its optional parts → the columns that may hold each part. Each row is asked, as many files leave out a row's
empty columns."""

NOT_READ = ("tools", "functions")
"""Columns that change what an answer means. A row that fills one is refused."""
NOT_READ_IN_TURNS = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking", "train_detail")
"""Keys of a turn that hold a part of an answer beside its text. A turn that fills one is refused."""
WEIGHTS = ("weight", "train", "loss")
"""Keys of a turn that say whether its answer is learned: 1 or true (as without the key), 0 or false."""


@dataclass(frozen=True)
class ConversationSource:
    """A source of conversations.

    Args:
        path: "documentation:instruct" (the embedded questions and answers), a file, a directory or a glob of files
            (jsonl, csv, tsv, parquet; plain, .gz or .zst), a directory written by `datasets` `save_to_disk`, or a hub
            id such as "HuggingFaceH4/no_robots".
        shape: "messages" (a list of {role, content}), "sharegpt" (a list of {from, value}), "tree" (a prompt with its
            replies, as OpenAssistant publishes them; of the replies to a message the best-ranked one is taken),
            "instruction" (instruction, input, output) or "pairs" (prompt, response); if not given, detected from the
            columns of the first row.
        columns: part → column, for columns with other names: {prompt: question, response: best_answer}.
        name, split, revision: configuration, split and commit of a hub data set.
        max_conversations: read at most this many conversations, if the data set is larger than the run needs.
        drop_leading_answers: leave out the answers at the beginning of a conversation, which answer no question, as in
            the parts of ShareGPT's long conversations; if false, such a conversation is a bad row.
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
    drop_leading_answers: bool = False
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
    def limit(self) -> int | None:
        """Returns the most examples that are read of the source."""
        return self.max_conversations

    @property
    def texts(self) -> Source:
        """Returns this place as a source of documents, which finds and identifies the files."""
        return Source(self.path, name=self.name, split=self.split, revision=self.revision)


class Conversation(NamedTuple):
    """Messages, with their file and row. Rows count from 1, as in an editor.

    `unlearned` has the numbers, from 0, of the answers that the row excludes from the loss. `dropped` is the number of
    answers that were left out at the beginning. `id` is the row's column of that name.
    """

    messages: list[ChatMessage]
    file: str
    row: int
    unlearned: frozenset[int] = frozenset()
    dropped: int = 0
    id: str | int | None = None

    @property
    def topic(self) -> str:
        """Returns the first question, which decides whether the conversation is held out."""
        return first_question(self.messages)


def read_conversations(name: str, source: ConversationSource, cache_dir: Path) -> Iterator[Conversation | BadRow]:
    """Yields all rows of a source, in a fixed order.

    Raises:
        ValueError: the source cannot be opened, has no row, or has none of the known shapes, or no row has a column
            that the source names.
    """
    found: ConversationFormat | None = None
    taken = 0
    unseen = dict(source.columns)
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
            unseen = {part: column for part, column in unseen.items() if column not in values}
            try:
                conversation = _conversation(found, values, source, file, row)
            except NoConversation as error:
                yield BadRow(file, row, error.cause, f"{where}: {error}")
            else:
                taken += 1
                yield conversation
    if found is not None and unseen:
        part, column = next(iter(unseen.items()))
        raise ValueError(f"source {name!r}: no row of {source.path} has the column {column!r} for {part!r}")


def _conversation(
    found: ConversationFormat, values: Mapping[str, Any], source: ConversationSource, file: str, row: int
) -> Conversation:
    messages, unlearned = found.conversation(values)
    begin = sum(message["role"] == "system" for message in messages[:1])
    # The number of answers before the first question.
    early = next((n for n, message in enumerate(messages[begin:]) if message["role"] != "assistant"), 0)
    if early and not source.drop_leading_answers:
        raise NoConversation(
            "roles out of order",
            f"message {begin + 1} is the assistant's: the user speaks first; drop_leading_answers: true leaves such "
            "messages out",
        )
    if early:
        del messages[begin : begin + early]
        unlearned = frozenset(number - early for number in unlearned if number >= begin + early)
    check_messages(messages)
    if not any(message["role"] == "assistant" and number not in unlearned for number, message in enumerate(messages)):
        raise NoConversation("nothing to learn", "the weights of the turns exclude every answer")
    return Conversation(messages, file, row, unlearned, early, id_of(values))


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
    """How the rows of one source hold their conversations.

    Args:
        named: part → column, as the source names them.
    """

    shape: Shape
    named: Mapping[str, str]

    def column(self, part: str, values: Mapping[str, Any]) -> str | None:
        """Returns the column of a row that holds a part; None if the row has none."""
        return self.named.get(part) or column_of((COLUMNS[self.shape] | OPTIONAL[self.shape])[part], values)

    def conversation(self, values: Mapping[str, Any]) -> tuple[list[ChatMessage], frozenset[int]]:
        """Returns the messages of a row, and the numbers of those that are not learned.

        Raises:
            NoConversation: the row has no messages, its values are not messages, or it has fields that are not read.
        """
        not_read = NOT_READ if "history" in OPTIONAL[self.shape] else (*NOT_READ, *HISTORY, "weight")
        check_columns(values, not_read, self.named)
        build: Callable[[Mapping[str, Any]], list[ChatMessage]] = {
            "messages": self._listed,
            "sharegpt": self._listed,
            "tree": self._tree,
            "instruction": self._instruction,
            "pairs": self._pair,
        }[self.shape]
        turns = build(values)
        system = self._system(values)
        # Some data sets repeat the system message of the turns in a separate column.
        begin = [] if turns[:1] == system else system
        unlearned = unlearned_of(self._value(values, next(iter(COLUMNS[self.shape]))))
        return [*begin, *turns], frozenset(len(begin) + number for number in unlearned)

    def _value(self, values: Mapping[str, Any], part: str) -> Any:
        column = self.column(part, values) if part in COLUMNS[self.shape] | OPTIONAL[self.shape] else None
        return None if column is None else values.get(column)

    def _listed(self, values: Mapping[str, Any]) -> list[ChatMessage]:
        (part,) = COLUMNS[self.shape]
        turns = self._value(values, part)
        if not isinstance(turns, list):
            found = "nothing" if turns is None else type(turns).__name__
            column = self.column(part, values) or COLUMNS[self.shape][part][0]
            raise NoConversation("no turns", f"column {column!r} holds {found}, not a list of turns")
        keys = ("role", "content") if self.shape == "messages" else ("from", "value")
        return messages_of(turns, *keys)

    def _tree(self, values: Mapping[str, Any]) -> list[ChatMessage]:
        return messages_of(best_ranked(self._value(values, "tree")), "role", "text")

    def _instruction(self, values: Mapping[str, Any]) -> list[ChatMessage]:
        prompt = checked_text(self._value(values, "instruction"), "the instruction")
        return [
            *history_of(self._value(values, "history")),
            {"role": "user", "content": with_input(prompt, self._value(values, "input"))},
            {"role": "assistant", "content": checked_text(self._value(values, "output"), "the output")},
        ]

    def _pair(self, values: Mapping[str, Any]) -> list[ChatMessage]:
        return [
            *history_of(self._value(values, "history")),
            {"role": "user", "content": checked_text(self._value(values, "prompt"), "the prompt")},
            {"role": "assistant", "content": checked_text(self._value(values, "response"), "the response")},
        ]

    def _system(self, values: Mapping[str, Any]) -> list[ChatMessage]:
        value = self._value(values, "system")
        system = "" if value is None else checked_text(value, "the system message").strip()
        return [{"role": "system", "content": system}] if system else []


def column_of(names: Sequence[str], values: Mapping[str, Any]) -> str | None:
    """Returns the first of the columns that a row fills, else the first that it has; None if it has none of them."""
    there = [name for name in names if name in values]
    return next((name for name in there if values[name] not in (None, "", [])), there[0] if there else None)


def check_columns(values: Mapping[str, Any], not_read: Sequence[str], named: Mapping[str, str]) -> None:
    """Checks that a row fills no column that is not read and changes what is learned.

    Args:
        named: part → column, as the source names them; such a column is read.

    Raises:
        NoConversation: the row fills such a column.
    """
    for column in not_read:
        value = values.get(column)
        changes_nothing = value in (None, "", [], {}, "[]", "{}", "null") or (column == "weight" and value == 1)
        if not changes_nothing and column not in named.values():
            raise NoConversation(
                "a column that is not read", f"column {column!r} would change what is learned: remove it from the row"
            )


def history_of(value: Any) -> list[ChatMessage]:
    """Returns earlier turns, which rows of instructions give as [question, answer] or as turns, as messages.

    Raises:
        NoConversation: the value is not such a list.
    """
    if value is None or value in ("", "[]"):
        return []
    if not isinstance(value, list):
        raise NoConversation("no turns", f"the history is {type(value).__name__}, not a list of [question, answer]")
    if value and all(isinstance(turn, Mapping) for turn in value):
        return messages_of(value, *turn_keys(value))
    messages: list[ChatMessage] = []
    for number, turn in enumerate(value, start=1):
        if not isinstance(turn, list) or len(turn) != 2:
            raise NoConversation("no turns", f"item {number} of the history is no [question, answer]")
        for role, text in zip(("user", "assistant"), turn, strict=True):
            messages.append({"role": role, "content": checked_text(text, f"item {number} of the history")})
    return messages


def with_input(prompt: str, given: Any) -> str:
    """Returns an instruction with its input below. The indentation of the input's first line stays.

    Raises:
        NoConversation: the input is not text.
    """
    text = "" if given is None else checked_text(given, "the input").rstrip().lstrip("\r\n")
    return f"{prompt}\n\n{text}" if text else prompt


def best_ranked(prompt: Any) -> list[Mapping[str, Any]]:
    """Returns the messages of a tree from its prompt to the last answer, by the best-ranked reply to each message.

    Deleted replies are left out. Replies without a rank come after those with a rank, in their order.

    Raises:
        NoConversation: the value is not a tree.
    """
    path: list[Mapping[str, Any]] = []
    message = prompt
    while message is not None:
        if not isinstance(message, Mapping) or not isinstance(message.get("replies") or [], list):
            raise NoConversation(
                "no turns", f"message {len(path) + 1} of the tree is not an object with 'text' and 'replies'"
            )
        path.append(message)
        replies = [one for one in message.get("replies") or [] if not (isinstance(one, Mapping) and one.get("deleted"))]
        message = min(replies, key=_rank, default=None)
    while path and ROLES.get(str(path[-1].get("role")).lower()) == "user":
        path.pop()  # a question that nobody has answered
    return path


def _rank(reply: Any) -> float:
    rank = reply.get("rank") if isinstance(reply, Mapping) else None
    # Not as a float: a whole number may be larger than any. NaN is in no order.
    return rank if isinstance(rank, int | float) and rank == rank else math.inf


_SPEAKER = re.compile(r"\n\n(Human|Assistant):")


def dialogue_of(text: str) -> list[ChatMessage] | None:
    """Returns the messages of a dialogue that is written as one text, as in Anthropic's HH-RLHF; None for other texts.

    Such a text is "Human: … Assistant: …", with an empty line before each speaker.
    """
    begin, *parts = _SPEAKER.split("\n\n" + text.lstrip("\n"))
    if begin or parts[:1] != ["Human"] or "Assistant" not in parts[::2]:
        return None
    turns = zip(parts[::2], parts[1::2], strict=True)
    return [{"role": ROLES[speaker.lower()], "content": said.strip()} for speaker, said in turns]


def turn_keys(turns: Sequence[Any]) -> tuple[str, str]:
    """Returns the keys of role and text in turns."""
    return ("from", "value") if turns and "from" in turns[0] else ("role", "content")


def unlearned_of(turns: Any) -> list[int]:
    """Returns the numbers, from 0, of the answers that their weight excludes from the loss.

    Raises:
        NoConversation: a weight is neither 0 nor 1, or a turn that is not an answer has the weight 1.
    """
    found = []
    for number, turn in enumerate(turns if isinstance(turns, list) else []):
        weights = {key: turn[key] for key in WEIGHTS if isinstance(turn, Mapping) and turn.get(key) is not None}
        if not weights:
            continue
        is_answer = ROLES.get(str(turn.get("role", turn.get("from"))).lower()) == "assistant"
        for key, weight in weights.items():
            if weight not in (0, 1):
                raise NoConversation("weights", f"turn {number + 1} has {key}: {weight!r}: give 0 or 1, false or true")
            if weight and not is_answer:
                raise NoConversation(
                    "weights", f"turn {number + 1} has {key}: {weight!r}, and only answers are learned"
                )
        if is_answer and not all(weights.values()):
            found.append(number)
    return found


def messages_of(turns: Sequence[Any], role_key: str, text_key: str) -> list[ChatMessage]:
    """Returns turns as messages.

    Raises:
        NoConversation: a turn is not a message, or has a key that is not read.
    """
    messages = []
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, Mapping) or role_key not in turn or text_key not in turn:
            raise NoConversation("no turns", f"turn {number} is not an object with {role_key!r} and {text_key!r}")
        role = ROLES.get(str(turn[role_key]).lower())
        if role is None:
            raise NoConversation(
                "unknown role",
                f"turn {number} has the role {turn[role_key]!r}; known are {', '.join(sorted(ROLES))}",
            )
        for key in NOT_READ_IN_TURNS:
            if turn.get(key):
                raise NoConversation(
                    "a part of a turn that is not read",
                    f"turn {number} has {key!r} beside its text: write it into the text, or remove it",
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
        raise NoConversation("not text", f"{what} holds half a surrogate pair, which is not text") from error
    return value


def conversation_format(row: Mapping[str, Any], source: ConversationSource, where: str) -> ConversationFormat:
    """Returns the format of a source, found from one of its rows.

    Raises:
        ValueError: the row has none of the known shapes, or lacks a column that the source names.
    """
    required = {part for parts in COLUMNS.values() for part in parts}
    for part, named in source.columns.items():
        if part in required and named not in row:
            raise ValueError(f"{where}: there is no column {named!r} for {part!r}, only {listed(row)}")
    shapes: list[Shape] = [source.shape] if source.shape else ["sharegpt", "messages", "tree", "instruction", "pairs"]
    for shape in shapes:
        found = ConversationFormat(shape, source.columns)
        there = [name for part in COLUMNS[shape] if (name := found.column(part, row)) is not None]
        if len(there) == len(COLUMNS[shape]) and (source.shape or _holds(shape, [row[name] for name in there])):
            return found
    if source.shape:
        wanted = " and ".join("/".join(names) for names in COLUMNS[source.shape].values())
        raise ValueError(
            f"{where}: the shape {source.shape!r} needs {wanted}, the row has {listed(row)}: name its columns with "
            "columns"
        )
    raise ValueError(
        f"{where}: no known shape of conversation in the columns {listed(row)}: say shape ({', '.join(COLUMNS)}) and "
        "columns"
    )


def _holds(shape: Shape, parts: Sequence[Any]) -> bool:
    """Returns whether the required parts look like the shape. Several shapes may use the same columns."""
    if shape in ("instruction", "pairs"):
        return True
    first = parts[0][0] if isinstance(parts[0], list) and parts[0] else parts[0]
    key = {"sharegpt": "from", "messages": "role", "tree": "replies"}[shape]
    return isinstance(first, Mapping) and key in first


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
