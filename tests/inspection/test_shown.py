"""Tokens with their texts, long stretches, and counts."""

import pytest

from lightning_danube.inspection.shown import (
    ShownSource,
    ShownToken,
    causes_of,
    fit_stops_at,
    histogram,
    sentences_about,
    shortened,
    shown_tokens,
)
from lightning_danube.text.reading import BadRow
from lightning_danube.tokens.tokenizer import load_hf_tokenizer

TEXT = "Rivers  run,\n\tunder é 你好 🙂 <s> stones"


@pytest.mark.parametrize("name", ["danube-small", "mistral", "danube3-chat"])
def test_the_texts_of_the_tokens_are_the_text(name: str) -> None:
    tokenizer = load_hf_tokenizer(name)
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = True  # a special token that a text spells is text
    ids = backend.encode(TEXT, add_special_tokens=False).ids
    backend.encode_special_tokens = False
    shown = shown_tokens(
        tokenizer, [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id], [False, *[True] * len(ids), False]
    )
    first, *inner, last = shown
    # Mistral's pieces begin with a space that is not in the text.
    assert "".join(token.text for token in inner).removeprefix(" ") == TEXT
    assert [token.id for token in inner] == ids
    assert (first.text, first.special, first.marked) == ("<s>", True, False)
    assert (last.text, last.special) == ("</s>", True)
    assert all(token.marked and not token.special for token in inner)


def test_bytes_that_are_no_character_have_no_text_of_their_own() -> None:
    tokenizer = load_hf_tokenizer("danube-small")
    ids = tokenizer("🙂", add_special_tokens=False).input_ids
    assert len(ids) > 1
    assert [token.text for token in shown_tokens(tokenizer, ids)] == [*[""] * (len(ids) - 1), "🙂"]


def test_a_special_token_ends_a_character_that_is_not_complete() -> None:
    tokenizer = load_hf_tokenizer("danube-small")
    encode = tokenizer.backend_tokenizer.encode
    begun = encode("🙂", add_special_tokens=False).ids[:2]
    after = encode("stones", add_special_tokens=False).ids
    shown = shown_tokens(tokenizer, [*begun, tokenizer.eos_token_id, *after])
    assert [token.text for token in shown[:3]] == ["", "", "</s>"]
    assert "".join(token.text for token in shown[3:]).strip() == "stones"


def tokens(*stretches: tuple[int, bool]) -> list[ShownToken]:
    return [ShownToken(number, "x", marked, False) for count, marked in stretches for number in range(count)]


def test_the_ends_of_each_stretch_stay() -> None:
    found = list(shortened(tokens((100, False), (5, True), (50, False)), 20, 10))
    gaps = [one for one in found if isinstance(one, int)]
    assert gaps == [70, 20]
    kept = [one for one in found if not isinstance(one, int)]
    assert len(kept) + sum(gaps) == 155 and sum(token.marked for token in kept) == 5
    assert found[20] == 70 and [token.id for token in kept[20:30]] == list(range(90, 100))


def test_a_stretch_that_nearly_fits_is_shown_whole() -> None:
    assert list(shortened(tokens((32, True)), 20, 10)) == tokens((32, True))


def test_every_length_is_in_one_column() -> None:
    assert histogram([1, 1, 2, 4], 40) == [2, 1, 0, 1]
    counts = histogram(list(range(10, 1010)), 40)
    assert len(counts) == 40 and sum(counts) == 1000 and max(counts) - min(counts) <= 1
    assert histogram([7, 7], 5) == [2]


def test_rows_left_out_are_counted_and_the_first_ones_named() -> None:
    rows = [BadRow("a.jsonl", n, "empty" if n % 3 else "too long", f"a.jsonl, row {n}: …") for n in range(30)]
    counts, places = causes_of(rows)
    assert list(counts.items()) == [("empty", 20), ("too long", 10)]
    assert places == [row.message for row in rows[:8]]
    assert "on_bad_row: skip" in fit_stops_at(rows[0], "data.on_bad_row", 3)
    assert "skip" not in fit_stops_at(rows[0], "data.on_bad_row", 0)


def test_sentences_about_a_source() -> None:
    shown = ShownSource("talk", "conversations", read=10, complete=False, kept=8, lengths=[3, 5, 9], limit=9)
    shown.over_limit, shown.tokens, shown.marked_tokens = ("shortened", 1), 200, 50
    assert sentences_about(shown) == [
        "10 conversations read, 8 kept, 2 left out; more rows follow (--rows)",
        "200 tokens, 50 learned (25.0 %)",
        "lengths in tokens: shortest 3, median 5, longest 9; shortened (9): 1 (33.3 %)",
    ]
    assert not shown.is_empty
    shown.marked_tokens = 0
    assert shown.is_empty
    shown.marks = None  # of a classification, no token is marked
    assert not shown.is_empty
