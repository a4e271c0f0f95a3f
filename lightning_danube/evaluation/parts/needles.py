"""Needles in haystacks: tests whether a model finds a number somewhere in a long text."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_danube.evaluation.asking import AskedModel, Part, shown_prompts
from lightning_danube.evaluation.results import Measured, mean_of
from lightning_danube.evaluation.settings import NeedleOptions
from lightning_danube.inspection.shown import ShownSource
from lightning_danube.text.corpora import read_documents
from lightning_danube.tokens.tokenizer import begin_token, encode_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ANSWER_TOKENS = 8
CITIES = ("Lisbon", "Oslo", "Lima", "Kyoto", "Accra", "Quito", "Riga", "Hanoi", "Tunis", "Perth", "Porto", "Bergen")


@dataclass(frozen=True)
class Needle:
    prompt_ids: list[int]
    answer: str
    depth: float


@dataclass(frozen=True)
class Needles(Part):
    """The part of an evaluation that holds all prompts of one length."""

    length: int
    needles: list[Needle]

    new_tokens = ANSWER_TOKENS

    @property
    def title(self) -> str:
        return f"needle in {self.length:,} tokens"

    def is_found(self, needle: Needle, text: str) -> bool:
        """Returns whether the model's text begins with the number."""
        return text.strip().startswith(needle.answer)

    def by_depth(self, found: Sequence[bool]) -> dict[float, float]:
        depths: dict[float, list[bool]] = {}
        for needle, one in zip(self.needles, found, strict=True):
            depths.setdefault(needle.depth, []).append(one)
        return {depth: sum(ones) / len(ones) for depth, ones in depths.items()}

    def shown(self, examples: int, tokenizer: PreTrainedTokenizerBase) -> ShownSource:
        def notes(number: int) -> list[str]:
            needle = self.needles[number]
            return [f"the answer begins with {needle.answer}; the needle is at {needle.depth:.0%} of the text"]

        prompts = [needle.prompt_ids for needle in self.needles]
        return shown_prompts(self.title, "", prompts, notes, examples, tokenizer)

    def measure(self, model: AskedModel) -> list[Measured]:
        prompts = [needle.prompt_ids for needle in self.needles]
        texts = model.continuations(self.title, prompts, self.new_tokens, [])
        found = [self.is_found(needle, text) for needle, text in zip(self.needles, texts, strict=True)]
        name, title = f"needle_{self.length}", f"{self.length:,} tokens"
        row = Measured("needle", name, title, "number said first", mean_of(list(map(float, found))))
        row.more = {"by_depth": self.by_depth(found)}
        row.records = [
            {"depth": needle.depth, "answer": needle.answer, "said": text, "found": one}
            for needle, text, one in zip(self.needles, texts, found, strict=True)
        ]
        return [row]


def make_needles(
    options: NeedleOptions, context: int, seed: int, tokenizer: PreTrainedTokenizerBase, cache_dir: Path
) -> list[Needles]:
    """Returns a part for each length.

    Raises:
        ValueError: a length is too short for the sentence, or the haystack is too short.
    """
    lengths = sorted(options.lengths or [2**k for k in range(7, 32) if 2**k <= context])
    if not lengths:
        raise ValueError(f"data.needle: the context of {context:,} tokens is too short: give lengths")
    # The context must hold the answer, too.
    if lengths[-1] > context:
        raise ValueError(f"data.needle.lengths has {lengths[-1]:,}, beyond data.context_length of {context:,}")
    hay: list[int] = []
    for document in read_documents("haystack", options.haystack, cache_dir):
        hay += encode_text(tokenizer, document.text + "\n\n")
        if len(hay) >= lengths[-1]:
            break
    else:
        if len(hay) < lengths[-1]:
            raise ValueError(f"data.needle.haystack has {len(hay):,} tokens, fewer than {lengths[-1]:,}")
    return [
        Needles(
            length,
            [
                _needle(length, depth, random.Random(f"{seed}/{length}/{depth}/{trial}"), hay, tokenizer)
                for depth in options.depths
                for trial in range(options.trials)
            ],
        )
        for length in lengths
    ]


def _needle(
    length: int, depth: float, draw: random.Random, hay: Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> Needle:
    city, number = draw.choice(CITIES), str(draw.randrange(1000, 10000))
    begin = begin_token(tokenizer)

    sentence = encode_text(tokenizer, f"\n\nThe secret number of {city} is {number}.\n\n")
    question = encode_text(tokenizer, f"\n\nWhat is the secret number of {city}? The secret number of {city} is")
    head = [] if begin is None else [begin]
    room = length - ANSWER_TOKENS - len(head) - len(sentence) - len(question)
    if room < 1:
        raise ValueError(f"data.needle.lengths has {length}: the sentence and its question alone take more")
    at = round(depth * room)
    return Needle([*head, *hay[:at], *sentence, *hay[at:room], *question], number, depth)
