"""Conversations cut to the context and laid into rows: which stand together, in which order, the same on every machine.

Like the order of pre-training, the plan of a pass is a pure function of (seed, pass), so going on after a stop needs
nothing but the number of steps done.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_danube.data.chat import ChatEncoder, Message
from lightning_danube.data.mixture import permute

Policy = Literal["drop_turns", "cut", "skip"]
Learned = Literal["all", "last"]
PACKED_TOGETHER = 1024
"""Conversations among which a row's are chosen: enough to fill rows, few enough that who stands together is chance."""
BATCHES_SORTED_TOGETHER = 50


class FittedChat(NamedTuple):
    """A conversation within the context. `ids` has one token more than a row has places: the last is only a label."""

    ids: NDArray[np.int32]
    learned: NDArray[np.bool_]
    dropped_turns: int
    cut_tokens: int


class DoesNotFit(ValueError):
    """Nothing to learn is left of a conversation within the context."""


def fit_chat(
    encoder: ChatEncoder, messages: Sequence[Message], context_length: int, policy: Policy, learned: Learned
) -> FittedChat:
    """A conversation as at most `context_length + 1` tokens.

    "drop_turns" leaves out the oldest question and answer until the rest fits (a system message stays), and cuts the
    end of a single answer that is too long all the same; "cut" cuts the end; "skip" takes only what fits.

    Raises:
        DoesNotFit: by the policy, or no answer is left.
        ValueError: the template refuses the conversation.
    """
    most = context_length + 1
    system = 1 if messages[0]["role"] == "system" else 0
    kept, dropped = list(messages), 0
    encoded = encoder.encode(kept, answers=learned)
    if len(encoded.ids) > most and policy == "skip":
        raise DoesNotFit(f"has {len(encoded.ids)} tokens, {most} fit")
    while len(encoded.ids) > most and policy == "drop_turns" and len(kept) > system + 2:
        del kept[system : system + 2]
        dropped += 2
        encoded = encoder.encode(kept, answers=learned)
    ids, counts = encoded.ids[:most], encoded.learned[:most]
    if not any(counts[1:]):
        raise DoesNotFit(f"has {len(encoded.ids)} tokens, and no answer within the first {most}")
    cut = len(encoded.ids) - len(ids)
    return FittedChat(np.array(ids, np.int32), np.array(counts, bool), dropped, cut)


def fit_pair(
    encoder: ChatEncoder,
    prompt: Sequence[Message],
    answers: Sequence[str],
    context_length: int,
    policy: Policy,
) -> list[FittedChat]:
    """Answers to one prompt, each as a conversation in which only it is learned; turns that have to be left out for one
    of them are left out for all.

    Raises:
        DoesNotFit: by the policy, or what is left of the answers is the same.
        ValueError: the template refuses the conversation, or writes the same for all answers.
    """

    def fit_all(kept: Sequence[Message]) -> list[FittedChat]:
        answered = ([*kept, {"role": "assistant", "content": answer}] for answer in answers)
        return [fit_chat(encoder, messages, context_length, policy, "last") for messages in answered]

    fitted = fit_all(prompt)
    dropped = max(one.dropped_turns for one in fitted)
    if any(one.dropped_turns < dropped for one in fitted):
        system = 1 if prompt[0]["role"] == "system" else 0
        # None of them has to drop more now; what they dropped is counted from the whole prompt.
        fitted = fit_all([*prompt[:system], *prompt[system + dropped :]])
        fitted = [one._replace(dropped_turns=dropped) for one in fitted]
    if all(np.array_equal(one.ids, fitted[0].ids) for one in fitted):
        if any(one.cut_tokens for one in fitted):
            raise DoesNotFit(f"has answers that are the same within the first {context_length + 1} tokens")
        raise ValueError("the chat template writes the same for the chosen and the rejected answer")
    return fitted


@dataclass(frozen=True)
class Pass:
    """One pass over the conversations: rows of the numbers of conversations, padded with empty rows to whole steps."""

    rows: list[list[int]]
    batch_rows: int

    @property
    def steps(self) -> int:
        return len(self.rows) // self.batch_rows


def packed_pass(lengths: NDArray[np.int64], context_length: int, batch_rows: int, seed: int, number: int) -> Pass:
    """Several conversations a row: in each group, the longest first, each into the row that it fills best.

    Args:
        lengths: places that each takes in a row, (n,).
    """
    chats = _shuffled(len(lengths), seed, "conversations", number)
    rows: list[list[int]] = []
    for start in range(0, len(chats), PACKED_TOGETHER):
        group = chats[start : start + PACKED_TOGETHER]
        room: list[tuple[int, int]] = []  # (places left, row), sorted
        for chat in group[np.argsort(-lengths[group], kind="stable")].tolist():
            place = bisect_left(room, (int(lengths[chat]), 0))
            if place == len(room):
                left, row = context_length, len(rows)
                rows.append([])
            else:
                left, row = room.pop(place)
            rows[row].append(chat)
            insort(room, (left - int(lengths[chat]), row))
    return _whole_steps([rows[row] for row in _shuffled(len(rows), seed, "rows", number)], batch_rows)


def bucketed_pass(lengths: NDArray[np.int64], context_length: int, batch_rows: int, seed: int, number: int) -> Pass:
    """One conversation a row, those of a step of similar length, so that little is padding."""
    chats = _shuffled(len(lengths), seed, "conversations", number)
    chunk = batch_rows * BATCHES_SORTED_TOGETHER
    batches: list[NDArray[np.int64]] = []
    for start in range(0, len(chats), chunk):
        part = chats[start : start + chunk]
        part = part[np.argsort(lengths[part], kind="stable")]
        batches += [part[i : i + batch_rows] for i in range(0, len(part), batch_rows)]
    last = [batches.pop()] if len(batches[-1]) < batch_rows else []
    order = _shuffled(len(batches), seed, "batches", number)
    rows = [[int(chat)] for batch in [*(batches[i] for i in order), *last] for chat in batch]
    return _whole_steps(rows, batch_rows)


LAYOUTS: dict[str, Callable[[NDArray[np.int64], int, int, int, int], Pass]] = {
    "packed": packed_pass,
    "bucketed": bucketed_pass,
}


def _shuffled(size: int, seed: int, stream: str, number: int) -> NDArray[np.int64]:
    if not size:
        return np.zeros(0, dtype=np.int64)
    return permute(np.arange(size, dtype=np.int64), size, seed=seed, stream=stream, epoch=number)


def _whole_steps(rows: list[list[int]], batch_rows: int) -> Pass:
    return Pass(rows + [[] for _ in range(-len(rows) % batch_rows)], batch_rows)
