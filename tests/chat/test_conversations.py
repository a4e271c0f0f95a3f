import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lightning_danube.chat.conversations import Conversation, ConversationSource, read_conversations
from lightning_danube.text.reading import BadRow
from tests.rows import write_rows

USER, ASSISTANT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}
TALK = [USER, ASSISTANT, {"role": "user", "content": "And?"}, {"role": "assistant", "content": "Bye."}]


def read(path: Path, **options: Any) -> list[Conversation | BadRow]:
    return list(read_conversations("src", ConversationSource(str(path), **options), path.parent))


def sharegpt(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    return [{"from": names[message["role"]], "value": message["content"]} for message in messages]


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"messages": TALK}, TALK),
        ({"conversations": sharegpt(TALK)}, TALK),
        ({"conversations": TALK}, TALK),
        (
            {"conversations": sharegpt(TALK[:2]), "system": "Be brief."},
            [{"role": "system", "content": "Be brief."}, *TALK[:2]],
        ),
        ({"instruction": "Hi", "input": "", "output": "Hello."}, TALK[:2]),
        (
            {"instruction": "Add.", "input": "1, 2", "response": "3"},
            [{"role": "user", "content": "Add.\n\n1, 2"}, {"role": "assistant", "content": "3"}],
        ),
        ({"prompt": "Hi", "response": "Hello."}, TALK[:2]),
        ({"question": "Hi", "answer": "Hello.", "id": 7}, TALK[:2]),
    ],
)
def test_common_shapes_are_told_apart(tmp_path: Path, row: Any, messages: list[dict[str, str]]) -> None:
    path = write_rows(tmp_path / "a.jsonl", row, row)
    assert read(path) == [Conversation(messages, str(path), 1), Conversation(messages, str(path), 2)]


def test_columns_are_named_where_the_data_call_them_otherwise(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", {"q": "Hi", "best": "Hello.", "response": "Go away."})
    (found,) = read(path, columns={"prompt": "q", "response": "best"})
    assert isinstance(found, Conversation) and found.messages == TALK[:2]


@pytest.mark.parametrize("suffix", [".json", ".jsonl.gz", ".csv", ".parquet"])
def test_every_format_gives_the_same_conversations(tmp_path: Path, suffix: str) -> None:
    rows, path = [{"prompt": "Hi", "response": "Hello."}, {"prompt": "A, b", "response": "C"}], tmp_path / f"a{suffix}"
    if suffix == ".json":
        path.write_text(json.dumps(rows))
    elif suffix == ".jsonl.gz":
        path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    elif suffix == ".csv":
        path.write_text('prompt,response\nHi,Hello.\n"A, b",C\n')
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    first, second = read(path)
    assert isinstance(first, Conversation) and isinstance(second, Conversation)
    assert first.messages == TALK[:2] and second.messages[0]["content"] == "A, b" and second.row == 2


def test_turns_in_parquet_are_turns(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist([{"messages": TALK}]), tmp_path / "a.parquet")
    (found,) = read(tmp_path / "a.parquet")
    assert isinstance(found, Conversation) and found.messages == TALK


SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    ("row", "cause", "message"),
    [
        ({"messages": []}, "no turns", "row 2: the conversation has no turns"),
        ({"messages": "Hi"}, "no turns", "column 'messages' holds str, not a list of turns"),
        ({"messages": [{"content": "Hi"}]}, "no turns", "turn 1 is no object with 'role' and 'content'"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "unknown role", "turn 1 has the role 'tool'; known are"),
        ({"messages": [USER, USER, ASSISTANT]}, "roles out of order", "messages 1 and 2 are both the user's"),
        ({"messages": [SYSTEM, USER, ASSISTANT, ASSISTANT]}, "roles out of order", "messages 3 and 4 are both"),
        ({"messages": [ASSISTANT, USER, ASSISTANT]}, "roles out of order", "message 1 is the assistant's: the user"),
        ({"messages": [USER, SYSTEM, ASSISTANT]}, "roles out of order", "message 2 is the system's, which may only"),
        ({"messages": [USER, {**ASSISTANT, "content": " \n"}]}, "empty answer", "message 2 (assistant) is empty"),
        ({"messages": [USER, {**ASSISTANT, "content": None}]}, "empty message", "turn 2 is empty"),
        ({"messages": [{**USER, "content": ""}, ASSISTANT]}, "empty message", "message 1 (user) is empty"),
        ({"messages": [USER, ASSISTANT, USER]}, "last turn not the assistant's", "the last message is not the assist"),
        ({"messages": [SYSTEM]}, "last turn not the assistant's", "the last message is not the assistant's"),
        ({"messages": [USER, {**ASSISTANT, "content": ["x"]}]}, "not text", "turn 2 is list, not text"),
        ({"messages": [USER, {**ASSISTANT, "content": "\ud800"}]}, "not text", "half a surrogate pair"),
        ([1, 2], "not an object", "row 2: expected an object, found list"),
    ],
)
def test_a_row_to_learn_nothing_from_is_named(tmp_path: Path, row: Any, cause: str, message: str) -> None:
    path = write_rows(tmp_path / "a.jsonl", {"messages": TALK}, row)
    _, bad = read(path)
    assert isinstance(bad, BadRow) and bad.cause == cause and bad.row == 2
    assert bad.message.startswith(f"{path}, row 2: ") and message in bad.message


def test_a_line_that_is_no_json_is_a_bad_row(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": TALK}) + "\n{broken\n")
    _, bad = read(tmp_path / "a.jsonl")
    assert isinstance(bad, BadRow) and bad.cause == "not JSON" and "row 2" in bad.message


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"text": "Hi"}], {}, "row 1: no known shape of conversation in the columns text: say shape"),
        ([{"text": "Hi"}], {"shape": "pairs"}, "the shape 'pairs' needs prompt/question/user and response/completion"),
        (
            [{"prompt": "Hi", "response": "x"}],
            {"columns": {"prompt": "q"}},
            "there is no column 'q' for 'prompt', only",
        ),
        ([], {}, "holds no rows"),
    ],
)
def test_a_source_without_conversations_is_refused(
    tmp_path: Path, rows: list[Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        read(write_rows(tmp_path / "a.jsonl", *rows), **options)


def test_plain_text_and_documents_are_no_conversations(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Hi")
    with pytest.raises(ValueError, match="plain text, which has no columns"):
        read(tmp_path / "a.txt")
    with pytest.raises(ValueError, match="documentation:web holds documents, not conversations: documentation:instr"):
        list(read_conversations("src", ConversationSource("documentation:web"), tmp_path))


def test_a_part_of_a_large_set_is_enough(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", *[{"messages": TALK}] * 5)
    assert [one.row for one in read(path, max_conversations=3)] == [1, 2, 3]
    with pytest.raises(ValueError, match="max_conversations is 0: it must be at least 1"):
        ConversationSource("a.jsonl", max_conversations=0)


def test_an_unknown_part_is_refused() -> None:
    with pytest.raises(ValueError, match="the part 'promt': the parts of the shape 'pairs' are prompt, response, syst"):
        ConversationSource("a.jsonl", shape="pairs", columns={"promt": "q"})
    with pytest.raises(ValueError, match="the part 'promt': the parts are conversations, input"):
        ConversationSource("a.jsonl", columns={"promt": "q"})
