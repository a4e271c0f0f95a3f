"""Known facts are counted right, by group."""

from typing import Any

import pytest
import torch
from torch import nn

from lightning_danube.pretraining.fact_recall import recall_summary, right_answers, shares
from lightning_danube.text.embedded.world import the_world, world_tokenizer


class Remembering(nn.Module):
    """A decoder that knows the answers to some prompts by heart."""

    def __init__(self, answers: dict[tuple[int, ...], int], vocabulary: int) -> None:
        super().__init__()
        self.answers, self.vocabulary = answers, vocabulary
        self.lm_head = nn.Identity()

    def hidden_states(self, ids: torch.Tensor) -> torch.Tensor:
        found = torch.zeros(*ids.shape, self.vocabulary)
        # The likeliest word of all answers no question: only candidates are compared.
        found[..., 1] = 2.0
        for row, prompt in enumerate(ids.tolist()):
            for length in range(1, len(prompt) + 1):
                if tuple(prompt[:length]) in self.answers:
                    found[row, length - 1, self.answers[tuple(prompt[:length])]] = 1.0
        return found


def test_answers_are_counted_by_group() -> None:
    tokenizer: Any = world_tokenizer()
    questions = the_world().questions()
    known = [question for question in questions if question.group == "noisy"]
    answers = {
        (1, *tokenizer.encode(question.prompt)): int(tokenizer.convert_tokens_to_ids(question.answer))
        for question in known
    }
    decoder: Any = Remembering(answers, len(tokenizer))
    right = right_answers(decoder, tokenizer, questions, torch.device("cpu"))
    found = shares(questions, right)
    assert found["noisy"] == 1.0
    # All candidates of an unknown fact have the same logit, and the first candidate is taken.
    first = [q.candidates[0] == q.answer for q in questions if q.group != "noisy"]
    assert found["clean"] + found["both"] == pytest.approx(2 * sum(first) / len(first))
    assert found["all"] == pytest.approx((found["clean"] + found["noisy"] + found["both"]) / 3)
    summary = recall_summary(questions, found)
    assert summary["n"] == {"clean": 136, "noisy": 136, "both": 136, "all": 408}
    assert summary["guessing"] == pytest.approx(0.0232, abs=1e-3)
    # Six of 72 people share a birth year, and so on: 32 of the 408 facts.
    assert summary["commonest"]["all"] == pytest.approx(32 / 408)
