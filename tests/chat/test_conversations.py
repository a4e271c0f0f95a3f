import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lightning_danube.chat.conversations import Conversation, ConversationSource, dialogue_of, read_conversations
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
    assert read(path) == [Conversation(messages, str(path), n, id=row.get("id")) for n in (1, 2)]


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
SAID = ["user: Hi", "assistant: Hello."]


@pytest.mark.parametrize(
    ("row", "cause", "message"),
    [
        ({"messages": []}, "no turns", "row 2: the conversation has no turns"),
        ({"messages": "Hi"}, "no turns", "column 'messages' holds str, not a list of turns"),
        ({"messages": [{"content": "Hi"}]}, "no turns", "turn 1 is not an object with 'role' and 'content'"),
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
    with pytest.raises(ValueError, match="the part 'promt': the parts are conversations, history, input"):
        ConversationSource("a.jsonl", columns={"promt": "q"})


# --- what a row may say besides its turns -----------------------------------------------------------------------------


def contents(found: Any) -> list[str]:
    assert isinstance(found, Conversation), found
    return [f"{message['role']}: {message['content']}" for message in found.messages]


@pytest.mark.parametrize(
    ("first", "later", "expected"),
    [
        (
            {"instruction": "Say hello.", "output": "Hello."},
            {"instruction": "Translate.", "input": "the stone", "output": "der Stein"},
            ["user: Translate.\n\nthe stone", "assistant: der Stein"],
        ),
        (
            {"instruction": "Say hello.", "output": "Hello."},
            {"instruction": "Go on.", "context": "One", "response": "Two", "system": "Count."},
            ["system: Count.", "user: Go on.\n\nOne", "assistant: Two"],
        ),
        (
            {"prompt": "Who are you?", "response": "Ann."},
            {"question": "Who?", "answer": "A pirate.", "system_prompt": "Be a pirate."},
            ["system: Be a pirate.", "user: Who?", "assistant: A pirate."],
        ),
        (
            {"messages": TALK},
            {"conversation": TALK[:2], "system": " Be brief.\n"},
            ["system: Be brief.", "user: Hi", "assistant: Hello."],
        ),
        ({"messages": TALK}, {"messages": [SYSTEM, *TALK[:2]], "system": "Be brief."}, ["system: Be brief.", *SAID]),
    ],
)
def test_each_row_is_asked_for_its_optional_parts(tmp_path: Path, first: Any, later: Any, expected: list[str]) -> None:
    _, found = read(write_rows(tmp_path / "a.jsonl", first, later))
    assert contents(found) == expected


def test_a_column_that_a_row_fills_goes_before_one_that_it_leaves_empty(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("instruction,input,context,output\nA,,one,x\nB,two,,y\n")
    assert [contents(found)[0] for found in read(path)] == ["user: A\n\none", "user: B\n\ntwo"]


def test_the_input_keeps_its_indentation(tmp_path: Path) -> None:
    code = "    return 1\n\treturn 2"
    path = write_rows(tmp_path / "a.jsonl", {"instruction": "Explain.", "input": f"\n{code} \n", "output": "No."})
    assert contents(read(path)[0])[0] == f"user: Explain.\n\n{code}"


def test_an_optional_column_that_is_named_may_be_absent_from_the_first_row_but_not_from_all(tmp_path: Path) -> None:
    path = write_rows(
        tmp_path / "a.jsonl",
        {"instruction": "A", "output": "x"},
        {"instruction": "B", "output": "y", "passage": "below"},
    )
    _, found = read(path, columns={"input": "passage"})
    assert contents(found)[0] == "user: B\n\nbelow"
    with pytest.raises(ValueError, match=r"source 'src': no row of .*a\.jsonl has the column 'pasage' for 'input'"):
        read(path, columns={"input": "pasage"})


@pytest.mark.parametrize(
    "history",
    [
        [["What is the capital of France?", "Paris."]],
        [{"role": "user", "content": "What is the capital of France?"}, {"role": "assistant", "content": "Paris."}],
        sharegpt([{"role": "user", "content": "What is the capital of France?"}, {**ASSISTANT, "content": "Paris."}]),
    ],
)
@pytest.mark.parametrize(
    "row", [{"instruction": "And in Italy?", "output": "Rome."}, {"prompt": "And in Italy?", "response": "Rome."}]
)
def test_earlier_turns_of_an_instruction_come_before_it(tmp_path: Path, row: Any, history: Any) -> None:
    path = write_rows(tmp_path / "a.jsonl", {**row, "history": []}, {**row, "history": history, "system": "Be brief."})
    _, found = read(path)
    asked = ["user: What is the capital of France?", "assistant: Paris.", "user: And in Italy?", "assistant: Rome."]
    assert contents(found) == ["system: Be brief.", *asked]


def weighted(*weights: Any, key: str = "weight") -> list[dict[str, Any]]:
    return [{**turn} if weight is None else {**turn, key: weight} for turn, weight in zip(TALK, weights, strict=True)]


@pytest.mark.parametrize(
    ("turns", "unlearned"),
    [
        (weighted(None, 0, None, 1), {1}),
        (weighted(0, False, False, True, key="train"), {1}),
        (weighted(None, 1, None, 0.0, key="loss"), {3}),
        (weighted(None, None, None, None), set()),
        ([SYSTEM, *weighted(None, 0, None, None)], {2}),
    ],
)
def test_a_weight_says_which_answers_are_learned(tmp_path: Path, turns: Any, unlearned: set[int]) -> None:
    rows = [{"messages": turns}, {"system": "Be brief.", "messages": turns}]
    first, second = read(write_rows(tmp_path / "a.jsonl", *rows))
    assert isinstance(first, Conversation) and isinstance(second, Conversation)
    assert first.unlearned == unlearned and all(set(message) == {"role", "content"} for message in first.messages)
    shift = len(second.messages) - len(first.messages)
    assert second.unlearned == {number + shift for number in unlearned}


@pytest.mark.parametrize(
    ("row", "cause", "message"),
    [
        ({"messages": weighted(None, 0.5, None, 1)}, "weights", "turn 2 has weight: 0.5: give 0 or 1, false or true"),
        ({"messages": weighted(1, 1, None, 1)}, "weights", "turn 1 has weight: 1, and only answers are learned"),
        ({"messages": weighted(None, 0, None, 0)}, "nothing to learn", "the weights of the turns exclude every answer"),
        (
            {"messages": [USER, {**ASSISTANT, "tool_calls": [{"type": "function"}]}]},
            "a part of a turn that is not read",
            "turn 2 has 'tool_calls' beside its text: write it into the text, or remove it",
        ),
        (
            {"messages": [USER, {**ASSISTANT, "content": None, "tool_calls": [{"type": "function"}]}]},
            "a part of a turn that is not read",
            "turn 2 has 'tool_calls'",
        ),
        (
            {"messages": [USER, {**ASSISTANT, "reasoning_content": "hm"}]},
            "a part of a turn that is not read",
            "turn 2 has 'reasoning_content'",
        ),
        (
            {"messages": TALK, "tools": [{"type": "function"}]},
            "a column that is not read",
            "column 'tools' would change what is learned: remove it from the row",
        ),
        ({"messages": TALK, "history": [["a", "b"]]}, "a column that is not read", "column 'history'"),
        ({"messages": TALK, "weight": 0.5}, "a column that is not read", "column 'weight'"),
        ({"messages": [SYSTEM, *TALK], "system": "Be long."}, "roles out of order", "message 2 is the system's"),
    ],
)
def test_what_is_not_read_and_changes_the_meaning_is_refused_by_name(
    tmp_path: Path, row: Any, cause: str, message: str
) -> None:
    path = write_rows(tmp_path / "a.jsonl", {"messages": TALK}, row)
    _, bad = read(path)
    assert isinstance(bad, BadRow) and bad.cause == cause
    assert bad.message.startswith(f"{path}, row 2: ") and message in bad.message


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"history": "earlier"}, "the history is str, not a list of [question, answer]"),
        ({"history": [["a"]]}, "item 1 of the history is no [question, answer]"),
        ({"history": [["a", 3]]}, "item 1 of the history is int, not text"),
        ({"functions": "[{}]"}, "column 'functions' would change what is learned"),
        ({"input": 3}, "the input is int, not text"),
    ],
)
def test_parts_of_an_instruction_that_cannot_be_read_are_named(tmp_path: Path, row: Any, message: str) -> None:
    (bad,) = read(write_rows(tmp_path / "a.jsonl", {"instruction": "A", "output": "x", **row}))
    assert isinstance(bad, BadRow) and message in bad.message


def test_empty_fields_change_nothing(tmp_path: Path) -> None:
    """As parquet has them, where one row of many uses a field."""
    turns = [{**turn, "tool_calls": None, "weight": None, "reasoning_content": ""} for turn in TALK]
    row = {"messages": turns, "tools": None, "functions": "[]", "history": [], "weight": 1.0, "system": ""}
    assert read(write_rows(tmp_path / "a.jsonl", row)) == [Conversation(TALK, str(tmp_path / "a.jsonl"), 1)]


# --- data sets as they are published ----------------------------------------------------------------------------------


def test_answers_before_the_first_question_are_left_out_when_asked_for(tmp_path: Path) -> None:
    early = [{**ASSISTANT, "content": "…and so on."}, {**ASSISTANT, "content": "More."}]
    rows = [
        {"conversations": sharegpt([*early, *TALK])},
        {"conversations": sharegpt([SYSTEM, *early[:1], *TALK[:2]])},
        {"messages": [{**early[0], "weight": 0}, TALK[0], {**TALK[1], "weight": 0}, *TALK[2:]]},
        {"conversations": sharegpt(early)},
    ]
    path = write_rows(tmp_path / "a.jsonl", *rows[:2])
    first, second = read(path, drop_leading_answers=True)
    assert first == Conversation(TALK, str(path), 1, dropped=2)
    assert second == Conversation([SYSTEM, *TALK[:2]], str(path), 2, dropped=1)
    refused, _ = read(path)
    assert isinstance(refused, BadRow) and refused.message == (
        f"{path}, row 1: message 1 is the assistant's: the user speaks first; drop_leading_answers: true leaves such "
        "messages out"
    )
    third = read(write_rows(tmp_path / "b.jsonl", rows[2]), drop_leading_answers=True)
    assert third == [Conversation(TALK, str(tmp_path / "b.jsonl"), 1, frozenset({1}), 1)]
    (none,) = read(write_rows(tmp_path / "c.jsonl", rows[3]), drop_leading_answers=True)
    assert isinstance(none, BadRow) and none.cause == "roles out of order"


def said(role: str, text: str, *replies: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "text": text, "replies": list(replies), "lang": "en", **more}


def test_of_a_tree_the_best_ranked_replies_are_taken(tmp_path: Path) -> None:
    second = said("assistant", "second", said("prompter", "not taken"), rank=1)
    first = said(
        "assistant",
        "first",
        said("prompter", "again?", said("assistant", "yes", rank=None), said("assistant", "no", rank=0)),
        said("prompter", "later?", rank=1),
        rank=0,
    )
    gone = said("assistant", "deleted", rank=-1, deleted=True)
    first["replies"][0]["replies"][1]["replies"] = [said("prompter", "nobody answers")]
    rows = [{"message_tree_id": "1", "prompt": said("prompter", "why?", gone, second, first)}]
    rows.append({"message_tree_id": "2", "prompt": said("prompter", "alone?")})
    talk, alone = read(write_rows(tmp_path / "a.jsonl", *rows))
    # "again?" has no rank and comes after "later?", which has one and no answer.
    assert contents(talk) == ["user: why?", "assistant: first"]
    assert isinstance(alone, BadRow) and alone.cause == "no turns"
    del first["replies"][1]
    (talk,) = read(write_rows(tmp_path / "a.jsonl", rows[0]))
    assert contents(talk) == ["user: why?", "assistant: first", "user: again?", "assistant: no"]
    _, bad = read(write_rows(tmp_path / "a.jsonl", rows[0], {"prompt": {**said("prompter", "x"), "replies": [3]}}))
    assert isinstance(bad, BadRow) and "message 2 of the tree is not an object with" in bad.message


def test_a_rank_may_be_larger_than_any_float(tmp_path: Path) -> None:
    """NaN is in no order, and counts as none."""
    path = tmp_path / "a.jsonl"
    replies = [said("assistant", "large", rank=10**400), said("assistant", "first", rank=1)]
    rows = [{"prompt": said("prompter", "why?", said("assistant", "none", rank=float("nan")), *replies)}]
    (talk,) = read(write_rows(path, *rows))
    assert contents(talk) == ["user: why?", "assistant: first"]


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        ("\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: And?\n\nAssistant: Bye.", TALK),
        ("Human:Hi\n\nAssistant: Hello.\n", TALK[:2]),
        ("\n\nHuman: Hi\n\nAssistant:", [USER, {**ASSISTANT, "content": ""}]),
        ("\n\nHuman: Hi\n\nHow?\n\nAssistant: Hello.", [{**USER, "content": "Hi\n\nHow?"}, ASSISTANT]),
        ("\n\nHuman: Hi", None),
        ("Human beings\n\nAssistant: Hello.", None),
        ("\n\nAssistant: Hello.\n\nHuman: Hi", None),
        ("I said\n\nHuman: Hi\n\nAssistant: Hello.", None),
    ],
)
def test_a_dialogue_in_one_text_is_told_by_its_speakers(text: str, messages: Any) -> None:
    assert dialogue_of(text) == messages
