"""Fits conversations to the context and plans the rows: their content and their order, equal on every machine.

Like the order of pre-training, the plan of an epoch is a pure function of (seed, epoch). So a resumed run needs only
the number of finished steps.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_danube.chat.conversations import NoConversation
from lightning_danube.tokens.chat_template import ChatEncoder, Message, NotLearnable

Policy = Literal["drop_turns", "cut", "skip"]
Learned = Literal["all", "last"]


class FittedChat(NamedTuple):
    """A conversation that fits the context. `ids` has one token more than places: the last token is only a label."""

    ids: NDArray[np.int32]
    learned: NDArray[np.bool_]
    dropped_turns: int
    cut_tokens: int
    changed_answers: int = 0
    """Answers that are not learned, because the template changes them."""


class DoesNotFit(ValueError):
    """A conversation has nothing left to learn within the context."""


def fit_chat(
    encoder: ChatEncoder,
    messages: Sequence[Message],
    context_length: int,
    policy: Policy,
    learned: Learned,
    unlearned: Collection[int] = (),
) -> FittedChat:
    """Returns a conversation as at most `context_length + 1` tokens.

    The loss counts the tokens of all answers or of the last one, without the messages `unlearned` (numbers from 0).

    "drop_turns" leaves out the oldest question and answer until the rest fits (a system message stays), and cuts the
    end of a single answer that is still too long. "cut" cuts the end. "skip" refuses conversations that do not fit.

    Raises:
        DoesNotFit: the policy leaves the conversation out, or no answer is left.
        NoConversation: the last answer alone counts, and it is not learned.
        ValueError: the template refuses the conversation, or changes all answers that count.
    """
    most = context_length + 1
    system = 1 if messages[0]["role"] == "system" else 0
    kept, dropped = list(messages), 0
    answers = [message["role"] == "assistant" and number not in unlearned for number, message in enumerate(kept)]
    if learned == "last":
        answers = [answer and number == len(kept) - 1 for number, answer in enumerate(answers)]
    if not any(answers):
        raise NoConversation(
            "nothing to learn", "the weight of the last answer is 0, and learned: last counts no other"
        )
    encoded = encoder.encode(kept, answers=answers)
    if len(encoded.ids) > most and policy == "skip":
        raise DoesNotFit(f"has {len(encoded.ids)} tokens, {most} fit")
    while len(encoded.ids) > most and policy == "drop_turns" and len(kept) > system + 2:
        del kept[system : system + 2], answers[system : system + 2]
        dropped += 2
        encoded = encoder.encode(kept, answers=answers)
    if any(answers) and not any(encoded.learned):
        raise NotLearnable(encoder.unlearned(kept))
    ids, counts = encoded.ids[:most], encoded.learned[:most]
    if not any(counts[1:]):
        raise DoesNotFit(f"has {len(encoded.ids)} tokens, and no answer within the first {most}")
    cut = len(encoded.ids) - len(ids)
    # Other tokens are between two answers, so each learned answer is a separate stretch.
    stretches = sum(here and not before for before, here in pairwise([False, *encoded.learned]))
    return FittedChat(np.array(ids, np.int32), np.array(counts, bool), dropped, cut, sum(answers) - stretches)


def fit_pair(
    encoder: ChatEncoder,
    prompt: Sequence[Message],
    answers: Sequence[str],
    context_length: int,
    policy: Policy,
) -> list[FittedChat]:
    """Returns one conversation for each answer to a prompt; only the answer is learned.

    Turns that must be left out for one answer are left out for all answers.

    Raises:
        DoesNotFit: the policy leaves the pair out, or the answers are equal after cutting.
        ValueError: the template refuses the conversation, or writes equal texts for all answers.
    """

    def fit_all(kept: Sequence[Message]) -> list[FittedChat]:
        answered = ([*kept, {"role": "assistant", "content": answer}] for answer in answers)
        return [fit_chat(encoder, messages, context_length, policy, "last") for messages in answered]

    fitted = fit_all(prompt)
    dropped = max(one.dropped_turns for one in fitted)
    if any(one.dropped_turns < dropped for one in fitted):
        system = 1 if prompt[0]["role"] == "system" else 0
        # No conversation drops more turns now, so the count of dropped turns is set relative to the whole prompt.
        fitted = fit_all([*prompt[:system], *prompt[system + dropped :]])
        fitted = [one._replace(dropped_turns=dropped) for one in fitted]
    if all(np.array_equal(one.ids, fitted[0].ids) for one in fitted):
        if any(one.cut_tokens for one in fitted):
            raise DoesNotFit(f"has answers that are the same within the first {context_length + 1} tokens")
        raise ValueError("the chat template writes the same for the chosen and the rejected answer")
    return fitted
