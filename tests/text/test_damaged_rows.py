"""A damaged row between two good ones, for every reader of rows: no exception, and no good row is lost."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lightning_danube.chat.conversations import ConversationSource, read_conversations
from lightning_danube.chat.preferences import PreferenceSource, read_preferences
from lightning_danube.classification.labelled_texts import LabelledTexts, read_labelled_texts
from lightning_danube.text.corpora import Source, documents_and_bad_rows
from lightning_danube.text.reading import BadRow

VALUES = [
    "9" * 4000,
    "9" * 5000,
    "-1e400",
    "NaN",
    "[" * 900 + "]" * 900,
    "[" * 100_000 + "]" * 100_000,
    '{"a":' * 3000 + "1" + "}" * 3000,
    '"\\ud800"',
    '"\\u0000"',
    '""',
    '" \\n "',
    "true",
    "null",
    "0",
    "{}",
    "[]",
    "[null]",
    '{"a": [1]}',
    '[{"role": "user"}]',
    "{",
    "",
]
"""Texts in place of a value: too large, too deep, of another type, nothing, no JSON."""


def documents(path: Path) -> Iterator[Any]:
    return documents_and_bad_rows("src", Source(str(path), on_bad_row="skip"), path.parent)


def conversations(path: Path) -> Iterator[Any]:
    return read_conversations("src", ConversationSource(str(path)), path.parent)


def preferences(path: Path) -> Iterator[Any]:
    return read_preferences("src", PreferenceSource(str(path)), path.parent)


def labels(path: Path) -> Iterator[Any]:
    return read_labelled_texts("train", LabelledTexts(str(path)), "text", "label", path.parent)


TURNS = '[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": %s}]'
ROWS: list[tuple[Callable[[Path], Iterator[Any]], str, str]] = [
    (documents, '{"text": %s}', '"good"'),
    (documents, '{"text": "good", "n": %s}', "1"),
    (conversations, '{"messages": %s}', TURNS % '"Hello."'),
    (conversations, '{"messages": ' + TURNS + "}", '"Hello."'),
    (conversations, '{"messages": [{"role": %s, "content": "Hi"}, {"role": "assistant", "content": "x"}]}', '"user"'),
    (conversations, '{"conversations": [{"from": "human", "value": %s}, {"from": "gpt", "value": "x"}]}', '"Hi"'),
    (conversations, '{"conversations": [%s, {"from": "gpt", "value": "x"}]}', '{"from": "human", "value": "Hi"}'),
    (conversations, '{"prompt": %s, "response": "x"}', '"Hi"'),
    (conversations, '{"prompt": "Hi", "response": %s}', '"x"'),
    (preferences, '{"prompt": %s, "chosen": "a", "rejected": "b"}', '"Hi"'),
    (preferences, '{"prompt": "Hi", "chosen": %s, "rejected": "b"}', '"a"'),
    (preferences, '{"prompt": "Hi", "chosen": [{"role": "assistant", "content": %s}], "rejected": "b"}', '"a"'),
    (labels, '{"text": %s, "label": "a"}', '"x"'),
    (labels, '{"text": "x", "label": %s}', '"a"'),
    (labels, '{"id": %s, "text": "x", "label": "a"}', "3"),
]


@pytest.mark.medium
@pytest.mark.parametrize("form", ["jsonl", "json"])
@pytest.mark.parametrize(("read", "row", "good"), ROWS)
def test_a_damaged_row_is_named_and_costs_no_other_row(
    read: Callable[[Path], Iterator[Any]], row: str, good: str, form: str, tmp_path: Path
) -> None:
    path, whole = tmp_path / f"a.{form}", row % good
    for value in VALUES:
        rows = [whole, row % value, whole]
        path.write_text(f"[{', '.join(rows)}]" if form == "json" else "\n".join(rows) + "\n")
        is_json = _is_json(rows[1])
        try:
            first, *between, last = read(path)
        except ValueError as error:
            # The end of an array's element that is not JSON cannot be found, so no row behind it can.
            assert form == "json" and not is_json and str(path) in str(error) and "\n" not in str(error), value[:40]
            continue
        assert not isinstance(first, BadRow) and not isinstance(last, BadRow), value[:40]
        assert (first.row, last.row) == (1, 3) and first == last._replace(row=1), value[:40]
        for one in between:
            assert one.row == 2, value[:40]
            if isinstance(one, BadRow):
                assert one.message.startswith(f"{path}, row 2: ") and one.cause and "\n" not in one.message
            json.dumps(one, default=list, ensure_ascii=False).encode()  # no half of a surrogate pair is left


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except json.JSONDecodeError:
        return False
    except (ValueError, RecursionError):
        return True
    return True
