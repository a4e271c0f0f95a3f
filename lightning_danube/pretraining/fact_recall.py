"""Measures how many facts of the invented world a model knows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from lightning_danube.model import Decoder
from lightning_danube.text.embedded.world import GROUPS, Question

QUESTIONS_AT_ONCE = 256


def right_answers(
    decoder: Decoder, tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question], device: torch.device
) -> list[bool]:
    """Returns for each question whether the true answer has the highest logit among the question's candidates."""
    right = []
    for begin in range(0, len(questions), QUESTIONS_AT_ONCE):
        asked = questions[begin : begin + QUESTIONS_AT_ONCE]
        prompts = [[tokenizer.bos_token_id, *tokenizer.encode(question.prompt)] for question in asked]
        longest = max(map(len, prompts))
        # The padding comes after the prompt's last token, which therefore does not see it.
        ids = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts], device=device)
        last = torch.tensor([len(prompt) - 1 for prompt in prompts], device=device)
        hidden = decoder.hidden_states(ids)[torch.arange(len(asked), device=device), last]
        logits = decoder.lm_head(hidden).float()
        for row, question in zip(logits.cpu(), asked, strict=True):
            candidates = tokenizer.convert_tokens_to_ids(list(question.candidates))
            right.append(question.candidates[int(row[candidates].argmax())] == question.answer)
    return right


def shares(questions: Sequence[Question], right: Sequence[bool]) -> dict[str, float]:
    """Returns group → share of right answers; "all" is the share over all groups."""
    of = {
        group: [known for question, known in zip(questions, right, strict=True) if question.group == group]
        for group in GROUPS
    }
    return {group: sum(known) / len(known) for group, known in of.items()} | {"all": sum(right) / len(right)}


def commonest_shares(questions: Sequence[Question]) -> dict[str, float]:
    """Returns group → share of right answers if each question gets the most common answer to its kind of question."""
    return shares(questions, [question.commonest == question.answer for question in questions])


def recall_summary(questions: Sequence[Question], known: Mapping[str, float]) -> dict[str, Any]:
    """Returns the shares of known facts, of right guesses and of the most common answers, and the facts per group."""
    return {
        **known,
        "guessing": sum(1 / len(question.candidates) for question in questions) / len(questions),
        "commonest": commonest_shares(questions),
        "n": {group: sum(question.group == group for question in questions) for group in GROUPS}
        | {"all": len(questions)},
    }
