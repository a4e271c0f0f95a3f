import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lightning_danube.chat.preferences import Preference, PreferenceSource, read_preferences
from lightning_danube.text.reading import BadRow
from tests.rows import write_rows

ASKED = [{"role": "user", "content": "Hi"}]
LONG = [*ASKED, {"role": "assistant", "content": "Hello."}, {"role": "user", "content": "And?"}]
GOOD, BAD = {"role": "assistant", "content": "Fine."}, {"role": "assistant", "content": "Go away."}
SYSTEM = {"role": "system", "content": "Be brief."}
EARLIER = [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "1"}]
DIALOGUE = "\n\nHuman: One?\n\nAssistant: 1\n\nHuman: Hi\n\nAssistant:"


def good(found: list[Preference | BadRow]) -> list[Preference]:
    assert all(isinstance(pair, Preference) for pair in found), found
    return [pair for pair in found if isinstance(pair, Preference)]


def read(path: Path, **options: Any) -> list[Preference | BadRow]:
    return list(read_preferences("src", PreferenceSource(str(path), **options), path.parent))


def sharegpt(messages: Any) -> Any:
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    if isinstance(messages, dict):
        return {"from": names[messages["role"]], "value": messages["content"]}
    return [sharegpt(message) for message in messages]


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "Hi", "chosen": "Fine.", "rejected": "Go away."}, ASKED),
        ({"question": "Hi", "chosen": "Fine.", "rejected": "Go away.", "input": "Hi"}, ASKED),
        ({"system": "Be brief.", "question": "Hi", "chosen": "Fine.", "rejected": "Go away."}, [SYSTEM, *ASKED]),
        (
            {"instruction": "Add.", "input": "1, 2", "chosen": "Fine.", "rejected": "Go away."},
            [{"role": "user", "content": "Add.\n\n1, 2"}],
        ),
        ({"chosen": [*LONG, GOOD], "rejected": [*LONG, BAD]}, LONG),
        ({"chosen": [SYSTEM, *LONG, GOOD], "rejected": [SYSTEM, *LONG, BAD]}, [SYSTEM, *LONG]),
        # The prompt once more, as many hub sets have it; the lists know better.
        ({"prompt": "Hi", "chosen": [*ASKED, GOOD], "rejected": [*ASKED, BAD]}, ASKED),
        ({"prompt": LONG, "chosen": [GOOD], "rejected": [BAD]}, LONG),
        ({"prompt": "Hi", "chosen": GOOD, "rejected": BAD}, ASKED),
        ({"conversations": sharegpt(LONG), "chosen": sharegpt(GOOD), "rejected": sharegpt(BAD)}, LONG),
        (
            {"conversations": sharegpt([SYSTEM, *ASKED]), "chosen": sharegpt(GOOD), "rejected": sharegpt(BAD)},
            [SYSTEM, *ASKED],
        ),
        ({"chosen": sharegpt([*LONG, GOOD]), "rejected": sharegpt([*LONG, BAD])}, LONG),
        ({"prompt": "Hi", "chosen": "Fine.", "rejected": "Go away.", "system_prompt": "Be brief."}, [SYSTEM, *ASKED]),
        ({"prompt": "Hi", "history": [["One?", "1"]], "chosen": "Fine.", "rejected": "Go away."}, [*EARLIER, *ASKED]),
        (
            {"instruction": "Run.", "input": "\n  code\n", "chosen": "Fine.", "rejected": "Go away."},
            [{"role": "user", "content": "Run.\n\n  code"}],
        ),
        # As Anthropic publishes HH-RLHF: whole dialogues, each as one text.
        ({"chosen": f"{DIALOGUE} Fine.", "rejected": f"{DIALOGUE} Go away."}, [*EARLIER, *ASKED]),
        ({"prompt": DIALOGUE, "chosen": " Fine.", "rejected": " Go away."}, [*EARLIER, *ASKED]),
        # A prompt that repeats a part of the turns, in a template or not.
        ({"prompt": "Question: Hi\nAnswer:", "chosen": [*ASKED, GOOD], "rejected": [*ASKED, BAD]}, ASKED),
        ({"prompt": ASKED, "chosen": [SYSTEM, *ASKED, GOOD], "rejected": [SYSTEM, *ASKED, BAD]}, [SYSTEM, *ASKED]),
        (
            {"prompt": "One?", "chosen": [*EARLIER, *ASKED, GOOD], "rejected": [*EARLIER, *ASKED, BAD]},
            [*EARLIER, *ASKED],
        ),
    ],
)
def test_common_shapes_are_told_apart(tmp_path: Path, row: Any, prompt: list[dict[str, str]]) -> None:
    path = write_rows(tmp_path / "a.jsonl", row, row)
    topic = next(message["content"] for message in prompt if message["role"] == "user")
    found = [pair._replace(chosen=pair.chosen.strip(), rejected=pair.rejected.strip()) for pair in good(read(path))]
    assert found == [Preference(prompt, "Fine.", "Go away.", topic, str(path), number) for number in (1, 2)]


def test_columns_are_named_where_the_data_call_them_otherwise(tmp_path: Path) -> None:
    row = {"q": "Hi", "best": "Fine.", "worst": "Go away.", "chosen": "best"}
    (found,) = read(
        write_rows(tmp_path / "a.jsonl", row), columns={"prompt": "q", "chosen": "best", "rejected": "worst"}
    )
    assert isinstance(found, Preference) and (found.prompt, found.chosen, found.rejected) == (
        ASKED,
        "Fine.",
        "Go away.",
    )


def test_a_row_may_leave_out_what_it_has_not(tmp_path: Path) -> None:
    first, second = read(write_rows(tmp_path / "a.jsonl", PAIR, {**PAIR, "system": "Be brief."}))
    assert isinstance(first, Preference) and isinstance(second, Preference)
    assert first.prompt == ASKED and second.prompt == [SYSTEM, *ASKED]


@pytest.mark.parametrize("suffix", [".json", ".csv", ".parquet"])
def test_every_format_gives_the_same_pairs(tmp_path: Path, suffix: str) -> None:
    rows, path = [{"prompt": "Hi", "chosen": "Fine.", "rejected": "Go, away"}] * 2, tmp_path / f"a{suffix}"
    if suffix == ".json":
        path.write_text(json.dumps(rows))
    elif suffix == ".csv":
        path.write_text('prompt,chosen,rejected\nHi,Fine.,"Go, away"\nHi,Fine.,"Go, away"\n')
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    assert read(path) == [Preference(ASKED, "Fine.", "Go, away", "Hi", str(path), row) for row in (1, 2)]


def test_turns_in_parquet_are_turns(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist([{"chosen": [*LONG, GOOD], "rejected": [*LONG, BAD]}]), tmp_path / "a.parquet")
    (found,) = read(tmp_path / "a.parquet")
    assert isinstance(found, Preference) and found.prompt == LONG


PAIR = {"prompt": "Hi", "chosen": "Fine.", "rejected": "Go away."}


@pytest.mark.parametrize(
    ("row", "cause", "message"),
    [
        ({**PAIR, "rejected": " Fine.\n"}, "equal answers", "the chosen and the rejected answer are the same"),
        ({"chosen": [*ASKED, GOOD], "rejected": [*ASKED, GOOD]}, "equal answers", "answer are the same"),
        ({**PAIR, "chosen": ""}, "empty answer", "the chosen answer is empty"),
        ({**PAIR, "rejected": None}, "empty answer", "the rejected answer is empty"),
        ({**PAIR, "rejected": " \n"}, "empty answer", "message 2 (assistant) is empty"),
        ({**PAIR, "prompt": None}, "no prompt", "there is no prompt: name its column with columns"),
        ({**PAIR, "prompt": "  "}, "empty message", "message 1 (user) is empty"),
        (
            {"prompt": [*ASKED, GOOD], "chosen": [GOOD], "rejected": [BAD]},
            "last turn not the user's",
            "the last message of the prompt is not the user's",
        ),
        (
            {"chosen": [*ASKED, GOOD], "rejected": [{**ASKED[0], "content": "Ho"}, BAD]},
            "different prompts",
            "the chosen and the rejected answer are to different prompts",
        ),
        (
            {"chosen": [*ASKED, GOOD, *ASKED, GOOD], "rejected": [*ASKED, BAD]},
            "not one answer",
            "the chosen answer is 3 turns, not one of the assistant after the prompt",
        ),
        ({"prompt": "Hi", "chosen": [*ASKED, GOOD], "rejected": [BAD]}, "not one answer", "the chosen answer is 2 tur"),
        ({**PAIR, "chosen": 7}, "no turns", "the chosen answer is int, neither text nor turns"),
        (
            {**PAIR, "chosen": [{"content": "x"}]},
            "no turns",
            "the chosen answer: turn 1 is not an object with 'role' and",
        ),
        ({**PAIR, "chosen": {"from": "tool", "value": "x"}}, "unknown role", "the chosen answer: turn 1 has the role"),
        ({**PAIR, "prompt": [*ASKED, *ASKED]}, "roles out of order", "messages 1 and 2 are both the user's"),
        (
            {"prompt": "Ho", "chosen": [*ASKED, GOOD], "rejected": [*ASKED, BAD]},
            "different prompts",
            "the prompt is not among the turns before the two answers",
        ),
        (
            {"prompt": [{**ASKED[0], "content": "H"}], "chosen": [*ASKED, GOOD], "rejected": [*ASKED, BAD]},
            "different prompts",
            "the prompt is not among the turns before the two answers",
        ),
        (
            {"history": [["One?", "1"]], "chosen": [*ASKED, GOOD], "rejected": [*ASKED, BAD]},
            "different prompts",
            "there is a history beside whole conversations: remove one of them",
        ),
        (
            {"chosen": f"{DIALOGUE} Fine.\n\nHuman: Ho\n\nAssistant: No.", "rejected": f"{DIALOGUE} Go away."},
            "not one answer",
            "the chosen answer is 3 turns, not one of the assistant after the prompt",
        ),
        ({"chosen": f"{DIALOGUE} Fine.", "rejected": DIALOGUE}, "empty answer", "message 4 (assistant) is empty"),
        ({**PAIR, "tools": ["one"]}, "a column that is not read", "column 'tools' would change what is learned"),
        (
            {**PAIR, "chosen": {**GOOD, "tool_calls": [1]}},
            "a part of a turn that is not read",
            "turn 1 has 'tool_calls'",
        ),
        (
            {**PAIR, "rejected": [{**BAD, "weight": 0}]},
            "weights",
            "the rejected answer has the weight 0, so the pair has",
        ),
        ({"prompt": "Hi"}, "other columns", "a pair needs chosen and rejected, the row has prompt: name its columns"),
        ([1, 2], "not an object", "row 2: expected an object, found list"),
    ],
)
def test_a_row_to_learn_nothing_from_is_named(tmp_path: Path, row: Any, cause: str, message: str) -> None:
    path = write_rows(tmp_path / "a.jsonl", PAIR, row)
    _, bad = read(path)
    assert isinstance(bad, BadRow) and bad.cause == cause and bad.row == 2
    assert bad.message.startswith(f"{path}, row 2: ") and message in bad.message


def test_a_line_that_is_no_json_is_a_bad_row(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(PAIR) + "\n{broken\n")
    _, bad = read(tmp_path / "a.jsonl")
    assert isinstance(bad, BadRow) and bad.cause == "not JSON" and "row 2" in bad.message


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"prompt": "Hi"}], {}, "row 1: a pair needs chosen and rejected, the row has prompt: name its columns with"),
        ([PAIR], {"columns": {"prompt": "q"}}, "row 1: there is no column 'q' for 'prompt', only prompt, chosen, reje"),
        ([], {}, "holds no rows"),
    ],
)
def test_a_source_without_pairs_is_refused(
    tmp_path: Path, rows: list[Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        read(write_rows(tmp_path / "a.jsonl", *rows), **options)


def test_a_part_of_a_large_set_is_enough(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", *[PAIR] * 5)
    assert [one.row for one in read(path, max_pairs=3)] == [1, 2, 3]
    with pytest.raises(ValueError, match="max_pairs is 0: it must be at least 1"):
        PreferenceSource("a.jsonl", max_pairs=0)


def test_an_unknown_part_is_refused() -> None:
    with pytest.raises(ValueError, match="the part 'promt': the parts are prompt, chosen, rejected, system, input"):
        PreferenceSource("a.jsonl", columns={"promt": "q"})


QUESTIONS = """\
Question: What does `json.dumps` do?
Answer: `dumps` serializes
an object.

Question: Which parameters does `dumps` take?
Answer: It takes `obj`.

Question: What is `json.JSONDecoder`?
Answer: Simple decoder.

Question: Which arguments of `fill` are required?
Answer: None.

Question: Which parameters does `wrap` take?
Answer: None.

Question: In which module is `fill` defined?
Answer: In `textwrap`.
"""


def test_the_embedded_questions_lend_each_other_their_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": QUESTIONS}, {"text": QUESTIONS.partition("\n\n")[0]}, {"text": QUESTIONS.replace("json", "toml")}]
    path = write_rows(tmp_path / "instruct.jsonl", *rows)
    monkeypatch.setattr("lightning_danube.text.corpora.collect_documentation", lambda cache: {"instruct": path})
    source = PreferenceSource("documentation:instruct")
    pairs = [pair for pair in read_preferences("src", source, tmp_path) if isinstance(pair, Preference)]
    assert [(pair.chosen, pair.rejected, pair.row) for pair in pairs[:5]] == [
        ("`dumps` serializes\nan object.", "It takes `obj`.", 1),
        ("It takes `obj`.", "`dumps` serializes\nan object.", 1),
        ("Simple decoder.", "None.", 1),
        ("None.", "Simple decoder.", 1),
        ("None.", "In `textwrap`.", 1),
    ]
    assert len(pairs) == 12 and {pair.row for pair in pairs} == {1, 3}
    assert pairs[1].prompt == [{"role": "user", "content": "Which parameters does `dumps` take?"}]
    # What lends each other its answers must not stand on both sides of the split.
    assert {pair.topic for pair in pairs} == {"What does `json.dumps` do?", "What does `toml.dumps` do?"}
    assert sorted(pair.chosen for pair in pairs) == sorted(pair.rejected for pair in pairs)
    part = PreferenceSource("documentation:instruct", max_pairs=3)
    assert len(list(read_preferences("src", part, tmp_path))) == 3
    with pytest.raises(
        ValueError, match="documentation:web holds documents, not conversations: documentation:instruct"
    ):
        list(read_preferences("src", PreferenceSource("documentation:web"), tmp_path))


def test_embedded_answers_that_are_the_same_are_no_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_rows(
        tmp_path / "instruct.jsonl", {"text": "Question: A?\nAnswer: None.\n\nQuestion: B?\nAnswer: None."}
    )
    monkeypatch.setattr("lightning_danube.text.corpora.collect_documentation", lambda cache: {"instruct": path})
    assert not list(read_preferences("src", PreferenceSource("documentation:instruct"), tmp_path))


@pytest.mark.parametrize(
    "row",
    [
        {"system": " Be brief.\n", "chosen": [SYSTEM, *LONG, GOOD], "rejected": [SYSTEM, *LONG, BAD]},
        {"system": "Be brief.", "prompt": [SYSTEM, *LONG], "chosen": [GOOD], "rejected": [BAD]},
        {"system": "Be brief.", "prompt": LONG, "chosen": GOOD, "rejected": BAD},
    ],
)
def test_a_system_column_that_repeats_the_conversations_own_is_taken_once(tmp_path: Path, row: Any) -> None:
    (found,) = read(write_rows(tmp_path / "a.jsonl", row))
    assert isinstance(found, Preference) and found.prompt == [SYSTEM, *LONG]
