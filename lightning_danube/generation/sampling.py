"""How the next token is drawn: temperature, top-k, top-p, repetition penalty."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. The settings act in the order of the fields, as in transformers.

    Args:
        repetition_penalty: divides the positive and multiplies the negative logits of all tokens in the text, prompt
            included. 1 changes nothing.
        temperature: divides the logits. 0 takes the likeliest token; top_k and top_p then have no effect.
        top_k: draw among this many likeliest tokens.
        top_p: draw among the fewest likeliest tokens whose probabilities sum to at least this share.

    Raises:
        ValueError: a number out of its range.
    """

    repetition_penalty: float = 1.0
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.repetition_penalty < math.inf:
            raise ValueError(f"repetition_penalty is {self.repetition_penalty}; it has to be above 0 (1 does nothing)")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(
                f"temperature is {self.temperature}; it has to be at least 0 (0 takes the likeliest token)"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}; it has to be at least 1, or left out")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it has to be above 0 and at most 1, or left out")


GREEDY = Sampling()


def sample(logits_BV: Tensor, sampling: Sampling, uniforms_B: Tensor | None = None) -> Tensor:
    """One token for each row, (B,).

    A row's token is the first at which the cumulative probability reaches the row's random number. So it depends on
    the row's own logits and number only; with torch.multinomial it would depend on the other rows, too.

    Args:
        logits_BV: float32 or float64.
        uniforms_B: random numbers in (0, 1]; not needed at temperature 0.
    """
    if sampling.temperature == 0:
        return logits_BV.argmax(dim=-1)
    assert uniforms_B is not None
    probabilities_BC, ids_BC = candidates(logits_BV, sampling)
    sums_BC = probabilities_BC.cumsum(dim=-1)
    # Above 0, so that a token of probability 0 is never taken. At most the whole sum, so that some token reaches it.
    reach_B1 = uniforms_B.to(sums_BC.dtype)[:, None] * sums_BC[:, -1:]
    drawn_B1 = torch.searchsorted(sums_BC, reach_B1)
    return (drawn_B1 if ids_BC is None else ids_BC.gather(-1, drawn_B1))[:, 0]


def candidates(logits_BV: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor | None]:
    """The probabilities to draw with, up to a factor, and the token ids they belong to.

    Both are (B, C) with the likeliest token first; or the probabilities are (B, V) in the order of the vocabulary, and
    the ids are None. Exactly top_k tokens are kept, also if others tie with the last; transformers keeps all of these.
    """
    logits_BC, ids_BC = logits_BV / sampling.temperature, None
    if sampling.top_k is not None and sampling.top_k < logits_BV.shape[-1]:
        logits_BC, ids_BC = logits_BC.topk(sampling.top_k)
    elif sampling.top_p is not None and sampling.top_p < 1:
        logits_BC, ids_BC = logits_BC.sort(descending=True, stable=True)
    probabilities_BC = logits_BC.softmax(dim=-1)
    if sampling.top_p is not None and sampling.top_p < 1:
        # A token is dropped when the tokens before it already sum to top_p. The first token always stays.
        surplus_BC = probabilities_BC.cumsum(dim=-1) - probabilities_BC >= sampling.top_p
        probabilities_BC = probabilities_BC.masked_fill(surplus_BC, 0.0)
    return probabilities_BC, ids_BC


def penalize(logits_BV: Tensor, seen_BV: Tensor, penalty: float) -> Tensor:
    """Logits with the seen tokens made less likely, as in CTRL (arXiv 1909.05858). Negative logits are multiplied."""
    return torch.where(seen_BV, torch.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty), logits_BV)


def uniforms(seed: int, count: int) -> list[float]:
    """`count` random numbers in (0, 1]. A larger count gives the same numbers first."""
    source = random.Random(seed)
    return [1.0 - source.random() for _ in range(count)]
