"""Reads preference pairs from files and data sets: a prompt, the chosen answer and the rejected answer.

A prompt is a list of messages that ends with a user's message. A row without such a pair is returned as a `BadRow`,
which the caller may refuse or skip. So is a row with fields that change what is learned and that are not read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lightning_danube.chat.conversations import (
    HISTORY,
    NOT_READ,
    SYSTEM,
    ChatMessage,
    NoConversation,
    check_columns,
    check_messages,
    checked_text,
    column_of,
    dialogue_of,
    first_question,
    history_of,
    messages_of,
    questions_of_documentation,
    turn_keys,
    unlearned_of,
    with_input,
)
from lightning_danube.text.corpora import Source
from lightning_danube.text.embedded.made_text import turns_of
from lightning_danube.text.objects import read_objects
from lightning_danube.text.reading import BadRow, id_of, listed

COLUMNS: dict[str, tuple[str, ...]] = {
    "prompt": ("prompt", "conversations", "question", "instruction"),
    "chosen": ("chosen",),
    "rejected": ("rejected",),
    "system": SYSTEM,
    "input": ("input",),
    "history": HISTORY,
}
"""Part of a pair → the columns that may hold it."""


@dataclass(frozen=True)
class PreferenceSource:
    """A source of preference pairs.

    Args:
        path: "documentation:instruct" (pairs made of the embedded questions and answers), a file, a directory or a glob
            of files (jsonl, json, csv, tsv, parquet; plain, .gz or .zst), a directory written by `datasets`
            `save_to_disk`, or a hub id such as "HuggingFaceH4/ultrafeedback_binarized".
        columns: part → column, for columns with other names: {prompt: question, chosen: best}. The parts are prompt,
            chosen, rejected, system, input, which is added to an instruction, and history, earlier turns as a list of
            [question, answer].
        name, split, revision: configuration, split and commit of a hub data set.
        max_pairs: read at most this many pairs, if the data set is larger than the run needs.
        on_bad_row: "error" refuses the source at the first row that has no pair to learn from; "skip" leaves such rows
            out and counts them by cause.
    """

    path: str
    columns: dict[str, str] = field(default_factory=dict)
    name: str | None = None
    split: str = "train"
    revision: str | None = None
    max_pairs: int | None = None
    on_bad_row: Literal["error", "skip"] = "error"

    def __post_init__(self) -> None:
        if self.max_pairs is not None and self.max_pairs < 1:
            raise ValueError(f"max_pairs is {self.max_pairs}: it must be at least 1")
        for part in self.columns:
            if part not in COLUMNS:
                raise ValueError(f"columns names the part {part!r}: the parts are {', '.join(COLUMNS)}")

    @property
    def limit(self) -> int | None:
        """Returns the most examples that are read of the source."""
        return self.max_pairs

    @property
    def texts(self) -> Source:
        """Returns this place as a source of documents, which finds and identifies the files."""
        return Source(self.path, name=self.name, split=self.split, revision=self.revision)


class Preference(NamedTuple):
    """A pair, with its file and row. Rows count from 1, as in an editor.

    `topic` decides whether the pair is held out, so pairs of one topic are always in the same split. `id` is the row's
    column of that name.
    """

    prompt: list[ChatMessage]
    chosen: str
    rejected: str
    topic: str
    file: str
    row: int
    id: str | int | None = None


def read_preferences(name: str, source: PreferenceSource, cache_dir: Path) -> Iterator[Preference | BadRow]:
    """Yields all pairs of a source, in a fixed order.

    Raises:
        ValueError: the source cannot be opened, has no row, or lacks the columns of a pair.
    """
    pairs = _made_pairs if source.texts.is_documentation else _read_pairs
    taken = 0
    for pair in pairs(name, source, cache_dir):
        if taken == source.max_pairs:
            return
        taken += isinstance(pair, Preference)
        yield pair


def _read_pairs(name: str, source: PreferenceSource, cache_dir: Path) -> Iterator[Preference | BadRow]:
    first = True
    for file, row, values in read_objects(name, source.texts, cache_dir):
        where = f"{file}, row {row}"
        if isinstance(values, BadRow):
            yield values
        elif not isinstance(values, Mapping):
            yield BadRow(file, row, "not an object", f"{where}: expected an object, found {type(values).__name__}")
        else:
            try:
                prompt, chosen, rejected = pair_of(pair_columns(values, source))
            except NoColumns as error:
                if first:
                    raise ValueError(f"{where}: {error}") from error
                yield BadRow(file, row, error.cause, f"{where}: {error}")
            except NoConversation as error:
                yield BadRow(file, row, error.cause, f"{where}: {error}")
            else:
                yield Preference(prompt, chosen, rejected, first_question(prompt), file, row, id_of(values))
            first = False


class NoColumns(NoConversation):
    """A row lacks the columns of a pair. If it is the first row, the whole source is refused."""


def pair_columns(row: Mapping[str, Any], source: PreferenceSource) -> dict[str, Any]:
    """Returns part of a pair → value of its column. Each row is checked, since many files omit a row's empty columns.

    Raises:
        NoColumns: a named column, or the column of an answer, is missing.
        NoConversation: the row fills a column that is not read and changes what is learned.
    """
    shown = listed(row)
    check_columns(row, NOT_READ, source.columns)
    for part, named in source.columns.items():
        if named not in row:
            raise NoColumns("other columns", f"there is no column {named!r} for {part!r}, only {shown}")
    found = {part: column_of(names, row) for part, names in COLUMNS.items()}
    columns = {part: column for part, column in found.items() if column is not None} | source.columns
    # "input" is a part only beside "instruction". In other data sets a column of this name repeats the prompt.
    if "input" not in source.columns and columns.get("prompt") != "instruction":
        columns.pop("input", None)
    if not {"chosen", "rejected"} <= columns.keys():
        raise NoColumns(
            "other columns",
            f"a pair needs chosen and rejected, the row has {shown}: name its columns with columns",
        )
    return {part: row[column] for part, column in columns.items()}


def pair_of(parts: Mapping[str, Any]) -> tuple[list[ChatMessage], str, str]:
    """Returns (prompt, chosen answer, rejected answer) from the values of a row.

    The answers are texts, single turns or lists of turns. If they hold whole conversations (lists of turns, or texts
    "Human: … Assistant: …"), their common beginning is the prompt, and the row's own prompt has to repeat a part of it.

    Raises:
        NoConversation: the values are not a pair to learn from.
    """
    for side in ("chosen", "rejected"):
        if not parts[side]:
            raise NoConversation("empty answer", f"the {side} answer is empty")
    chosen, rejected = (_answer(parts, side) for side in ("chosen", "rejected"))
    history = history_of(parts.get("history"))
    if chosen == rejected:
        raise NoConversation("equal answers", "the chosen and the rejected answer are the same")
    begins = {turns[0]["role"] != "assistant" for turns in (chosen, rejected) if turns}
    if begins == {True}:
        common = next(
            (n for n, (one, other) in enumerate(zip(chosen, rejected, strict=False)) if one != other),
            min(len(chosen), len(rejected)),
        )
        prompt, chosen, rejected = chosen[:common], chosen[common:], rejected[common:]
        if any(turns and turns[0]["role"] != "assistant" for turns in (chosen, rejected)):
            raise NoConversation("different prompts", "the chosen and the rejected answer are to different prompts")
        if not _repeats(parts.get("prompt"), prompt):
            raise NoConversation("different prompts", "the prompt is not among the turns before the two answers")
        if history:
            raise NoConversation(
                "different prompts", "there is a history beside whole conversations: remove one of them"
            )
    else:
        prompt = _prompt(parts.get("prompt"))
        if prompt:
            prompt[-1]["content"] = with_input(prompt[-1]["content"], parts.get("input"))
            prompt = [*history, *prompt]
    system = parts.get("system")
    if system is not None and checked_text(system, "the system message").strip() and prompt[:1] != [_system(system)]:
        prompt = [_system(system), *prompt]
    if not prompt:
        raise NoConversation(
            "no prompt", "there is no prompt: name its column with columns, or give whole conversations"
        )
    if prompt[-1]["role"] != "user":
        raise NoConversation("last turn not the user's", "the last message of the prompt is not the user's")
    for side, turns in (("chosen", chosen), ("rejected", rejected)):
        if [turn["role"] for turn in turns] != ["assistant"]:
            raise NoConversation(
                "not one answer", f"the {side} answer is {len(turns)} turns, not one of the assistant after the prompt"
            )
        check_messages([*prompt, *turns])
    one, other = chosen[0]["content"], rejected[0]["content"]
    if one.strip() == other.strip():
        raise NoConversation("equal answers", "the chosen and the rejected answer are the same")
    return prompt, one, other


def _system(text: str) -> ChatMessage:
    return {"role": "system", "content": text.strip()}


def _answer(parts: Mapping[str, Any], side: str) -> list[ChatMessage]:
    value = parts[side]
    dialogues = [dialogue_of(parts[one]) if isinstance(parts[one], str) else None for one in ("chosen", "rejected")]
    if all(dialogues):
        return dialogues[side == "rejected"] or []
    turns = _turns(value, "assistant", f"the {side} answer")
    listed_turns = value if isinstance(value, list) else [value]
    if len(turns) - 1 in unlearned_of(listed_turns):
        raise NoConversation("weights", f"the {side} answer has the weight 0, so the pair has nothing to learn")
    return turns


def _prompt(value: Any) -> list[ChatMessage]:
    """Returns the turns of a prompt. A text may be a dialogue that ends where the assistant's answer is to begin."""
    dialogue = dialogue_of(value) if isinstance(value, str) else None
    if dialogue and dialogue[-1] == {"role": "assistant", "content": ""}:
        return dialogue[:-1]
    return _turns(value, "user", "the prompt")


def _repeats(given: Any, prompt: list[ChatMessage]) -> bool:
    """Returns whether the prompt's column says what the turns say. A text may hold more, such as a template."""
    if not given:
        return True
    asked = [_words(message["content"]) for message in prompt if message["role"] == "user"]
    if isinstance(given, str):
        text = _words(checked_text(given, "the prompt"))
        return any(text in one or one in text for one in asked)
    said = [_words(turn["content"]) for turn in _turns(given, "user", "the prompt") if turn["role"] == "user"]
    return all(one in asked for one in said)


def _words(text: str) -> str:
    return " ".join(text.split())


def _turns(value: Any, role: str, what: str) -> list[ChatMessage]:
    """Returns a text, a turn or a list of turns as messages. A text gets the given role."""
    if value is None:
        return []
    if isinstance(value, str):
        return [{"role": role, "content": checked_text(value, what)}]
    turns = value if isinstance(value, list) else [value]
    if not all(isinstance(turn, Mapping) for turn in turns):
        raise NoConversation("no turns", f"{what} is {type(value).__name__}, neither text nor turns")
    try:
        return messages_of(turns, *turn_keys(turns))
    except NoConversation as error:
        raise NoConversation(error.cause, f"{what}: {error}") from error


def _made_pairs(name: str, source: PreferenceSource, cache_dir: Path) -> Iterator[Preference]:
    """Yields pairs of two consecutive questions on the same topic: the answer to one is rejected for the other.

    Each answer is chosen once and rejected once, in the same split. So a model can tell them apart only by whether the
    answer fits the question.
    """
    for file, row, text in questions_of_documentation(name, source.texts, cache_dir):
        turns = turns_of(text)
        for first, second in zip(turns[::2], turns[1::2], strict=False):
            for (asked, right), (_, wrong) in ((first, second), (second, first)):
                if right != wrong:
                    prompt = [{"role": "user", "content": asked}]
                    yield Preference(prompt, right, wrong, turns[0][0], file, row)
