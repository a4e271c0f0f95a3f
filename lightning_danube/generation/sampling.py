"""How the next token is drawn: temperature, top-k, top-p, min-p, repetition penalty."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. What is set acts in the order of the fields, as in transformers.

    Args:
        repetition_penalty: divides the positive and multiplies the negative logits of all tokens that the text has,
            prompt included; 1 does nothing.
        temperature: divides the logits; 0 takes the likeliest token, whatever follows below.
        top_k: draw among so many likeliest tokens.
        top_p: draw among the fewest likeliest tokens that hold this share.

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
    """One token a row, (B,), from logits in float32 or float64; `uniforms_B` in (0, 1] say which, where one is drawn.

    A row's token is the one at which the sum of probabilities reaches its number: unlike torch.multinomial, this
    depends on the row's own logits and number, and on nothing else in the batch.
    """
    if sampling.temperature == 0:
        return logits_BV.argmax(dim=-1)
    assert uniforms_B is not None
    probabilities_BC, ids_BC = candidates(logits_BV, sampling)
    sums_BC = probabilities_BC.cumsum(dim=-1)
    # Above 0, so that the first to reach it has a probability; at most all, so that there is one.
    reach_B1 = uniforms_B.to(sums_BC.dtype)[:, None] * sums_BC[:, -1:]
    drawn_B1 = torch.searchsorted(sums_BC, reach_B1)
    return (drawn_B1 if ids_BC is None else ids_BC.gather(-1, drawn_B1))[:, 0]


def candidates(logits_BV: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor | None]:
    """Probabilities to draw with, up to a factor, and whose they are: (B, C) each, the likeliest first, or (B, V) and
    None, in the order of the vocabulary. Ties at the k-th place are cut, where transformers keeps them all."""
    logits_BC, ids_BC = logits_BV / sampling.temperature, None
    if sampling.top_k is not None and sampling.top_k < logits_BV.shape[-1]:
        logits_BC, ids_BC = logits_BC.topk(sampling.top_k)
    elif sampling.top_p is not None and sampling.top_p < 1:
        logits_BC, ids_BC = logits_BC.sort(descending=True, stable=True)
    probabilities_BC = logits_BC.softmax(dim=-1)
    if sampling.top_p is not None and sampling.top_p < 1:
        # A token goes when those before it already hold top_p; before the first there is nothing, so it always stays.
        surplus_BC = probabilities_BC.cumsum(dim=-1) - probabilities_BC >= sampling.top_p
        probabilities_BC = probabilities_BC.masked_fill(surplus_BC, 0.0)
    return probabilities_BC, ids_BC


def penalize(logits_BV: Tensor, seen_BV: Tensor, penalty: float) -> Tensor:
    """Make tokens that were seen less likely, as CTRL does (arXiv 1909.05858), with negative logits taken care of."""
    return torch.where(seen_BV, torch.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty), logits_BV)


def uniforms(seed: int, count: int) -> list[float]:
    """Numbers in (0, 1]; the first ones do not depend on how many are asked for."""
    source = random.Random(seed)
    return [1.0 - source.random() for _ in range(count)]
