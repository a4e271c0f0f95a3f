"""Exact match and F1 of short answers, as SQuAD's evaluation defines them (arXiv 1606.05250): in lower case, without
punctuation and articles; F1 counts words in common."""

from __future__ import annotations

import re
import string
from collections import Counter


def normalized_words(answer: str) -> list[str]:
    lowered = "".join(character for character in answer.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", lowered).split()


def compute_exact(gold: str, predicted: str) -> int:
    """Returns 1 if both texts have the same words in the same order, else 0."""
    return int(normalized_words(gold) == normalized_words(predicted))


def compute_f1(gold: str, predicted: str) -> float:
    """Returns the harmonic mean of the words' precision and recall; for a text without words, 1 if neither has words,
    else 0."""
    gold_words, predicted_words = normalized_words(gold), normalized_words(predicted)
    if not gold_words or not predicted_words:
        return float(gold_words == predicted_words)
    common = sum((Counter(gold_words) & Counter(predicted_words)).values())
    if common == 0:
        return 0.0
    precision, recall = common / len(predicted_words), common / len(gold_words)
    return 2 * precision * recall / (precision + recall)
