import copy
from collections import Counter

import numpy as np
import pytest

from lightning_danube.chat.conversations import NoConversation
from lightning_danube.chat.rows import DoesNotFit, fit_chat
from lightning_danube.tokens.chat_template import ChatEncoder, Message, NotLearnable, encode_chat
from lightning_danube.tokens.tokenizer import load_hf_tokenizer
from lightning_danube.training.passes import LAYOUTS

TURNS: list[Message] = [
    {"role": role, "content": f"{role} says word number {n}, and some more words after that"}
    for n in range(3)
    for role in ("user", "assistant")
]
MISTRAL = load_hf_tokenizer("mistral")
ENCODER = ChatEncoder(MISTRAL)
WHOLE = encode_chat(MISTRAL, TURNS, False)


def test_what_fits_is_left_as_it_is() -> None:
    chat = fit_chat(ENCODER, TURNS, len(WHOLE) - 1, "drop_turns", "all")
    assert chat.ids.tolist() == WHOLE and chat.dropped_turns == 0 and chat.cut_tokens == 0


def test_the_oldest_turns_are_dropped_and_the_last_answer_stays() -> None:
    chat = fit_chat(ENCODER, TURNS, len(WHOLE) - 2, "drop_turns", "all")
    assert chat.ids.tolist() == encode_chat(MISTRAL, TURNS[2:], False)
    assert chat.dropped_turns == 2 and chat.cut_tokens == 0


def test_a_single_long_answer_is_cut_at_its_end() -> None:
    last = encode_chat(MISTRAL, TURNS[4:], False)
    chat = fit_chat(ENCODER, TURNS, len(last) - 4, "drop_turns", "all")
    assert chat.ids.tolist() == last[:-3]
    assert chat.dropped_turns == 4 and chat.cut_tokens == 3 and chat.learned[-1]


def test_cutting_keeps_the_beginning() -> None:
    chat = fit_chat(ENCODER, TURNS, 60, "cut", "all")
    assert chat.ids.tolist() == WHOLE[:61] and chat.cut_tokens == len(WHOLE) - 61


@pytest.mark.parametrize(("policy", "context"), [("cut", 8), ("drop_turns", 8), ("skip", len(WHOLE) - 2)])
def test_nothing_without_an_answer_is_kept(policy: str, context: int) -> None:
    with pytest.raises(DoesNotFit, match=r"fit$|no answer within the first 9"):
        fit_chat(ENCODER, TURNS, context, policy, "all")  # type: ignore[arg-type]


def test_only_the_last_answer_counts_when_asked_for() -> None:
    every, last = (fit_chat(ENCODER, TURNS, 500, "cut", which) for which in ("all", "last"))
    begin = len(encode_chat(MISTRAL, TURNS[:5], True))
    assert last.learned[begin:].all() and not last.learned[:begin].any()
    assert every.learned[:begin].any() and every.learned[begin:].all()


def test_answers_without_weight_are_read_and_not_learned() -> None:
    every, some = (fit_chat(ENCODER, TURNS, 500, "cut", "all", left_out) for left_out in ((), {1, 5}))
    assert some.ids.tolist() == every.ids.tolist()
    begin, end = (len(encode_chat(MISTRAL, TURNS[:n], n == 3)) for n in (3, 4))
    assert not some.learned[:begin].any() and not some.learned[end:].any()
    assert some.learned[begin:end].tolist() == every.learned[begin:end].tolist() and some.learned[begin:end].any()
    # With its turns, a dropped answer loses its weight.
    shorter = fit_chat(ENCODER, TURNS, len(WHOLE) - 2, "drop_turns", "all", {1, 5})
    assert shorter.dropped_turns == 2 and shorter.learned.any()
    middle = len(encode_chat(MISTRAL, TURNS[2:4], False))
    assert not shorter.learned[middle:].any()


def test_a_last_answer_without_weight_leaves_nothing_to_learn() -> None:
    with pytest.raises(NoConversation, match="the weight of the last answer is 0, and learned: last counts no other"):
        fit_chat(ENCODER, TURNS, 500, "cut", "last", {5})
    assert fit_chat(ENCODER, TURNS, 500, "cut", "last", {1}).learned.any()


def test_answers_that_the_template_changes_are_told_and_none_is_no_matter_of_length() -> None:
    tokenizer = copy.deepcopy(MISTRAL)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content.split('</think>')[-1] if not loop.last else m.content }}</s>{% endfor %}"
    )
    encoder = ChatEncoder(tokenizer)
    thinking = [dict(turn, content="hm</think>" + turn["content"]) for turn in TURNS]
    chat = fit_chat(encoder, thinking, 500, "cut", "all")
    assert chat.changed_answers == 2 and sum(chat.learned) > 0
    assert fit_chat(encoder, thinking, 500, "cut", "last").changed_answers == 0
    assert fit_chat(ENCODER, TURNS, 500, "cut", "all").changed_answers == 0
    tokenizer.chat_template = "{% for m in messages %}{{ m.content | upper }}</s>{% endfor %}"
    with pytest.raises(NotLearnable, match="the chat template changes what message 6 says"):
        fit_chat(ChatEncoder(tokenizer), TURNS, 500, "cut", "all")


def lengths(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(1, 65, count)


@pytest.mark.parametrize("layout", ["packed", "bucketed"])
@pytest.mark.parametrize("count", [1, 7, 1000])
def test_every_conversation_stands_in_a_pass_once(layout: str, count: int) -> None:
    places = lengths(count)
    one = LAYOUTS[layout](places, 64, 8, 3, 0)
    assert Counter(chat for row in one.rows for chat in row) == Counter(range(count))
    assert all(places[row].sum() <= 64 for row in one.rows)
    assert len(one.rows) % 8 == 0 and one.steps == len(one.rows) // 8
    # Empty rows only fill the last step.
    assert all(one.rows[: len(one.rows) - 7])


@pytest.mark.parametrize("layout", ["packed", "bucketed"])
def test_passes_are_shuffled_each_in_its_own_way_and_always_the_same(layout: str) -> None:
    places = lengths(500)
    first, again, second, other_seed = (
        LAYOUTS[layout](places, 64, 8, *seed_and_pass).rows for seed_and_pass in [(3, 0), (3, 0), (3, 1), (4, 0)]
    )
    assert first == again
    assert first != second and first != other_seed


def test_little_is_padding() -> None:
    places = (lengths(2000) + 1) // 2
    packed = LAYOUTS["packed"](places, 64, 8, 0, 0)
    # All but the rows that fill the last step.
    assert places.sum() / ((len(packed.rows) - 7) * 64) > 0.98
    bucketed = LAYOUTS["bucketed"](places, 64, 8, 0, 0)
    steps = [bucketed.rows[i : i + 8] for i in range(0, len(bucketed.rows), 8)]
    padded = sum(8 * max(int(places[row[0]]) for row in step if row) for step in steps)
    assert places.sum() / padded > 0.9
    # One a row in the order of the shuffle would be about half padding.
    assert places.mean() / 32 < 0.6
