"""What a text classifier has to beat: the class frequencies alone, and TF-IDF with logistic regression.

The second takes seconds and no language model; where it is as good, that is what to use.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

REGULARIZATION = 10.0
"""Inverse strength (scikit-learn's C): 1 is scikit-learn's own, and too strong for rows of length 1."""

Probabilities = NDArray[np.float64]


def majority_probabilities(train_classes: Sequence[int], classes: int, texts: int) -> Probabilities:
    """The frequencies of the classes in training, for each of so many texts, (texts, classes)."""
    counts = np.bincount(np.asarray(train_classes), minlength=classes)
    return np.tile(counts / counts.sum(), (texts, 1))


def tfidf_probabilities(
    train_texts: Sequence[str], train_classes: Sequence[int], classes: int, texts: Sequence[str]
) -> Probabilities:
    """Logistic regression on TF-IDF weights of words and pairs of words, (texts, classes)."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    # The default pattern drops words of one letter, and all text without Latin-like words would leave no word at all.
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"\w+|[^\w\s]")
    model = make_pipeline(words, LogisticRegression(C=REGULARIZATION, max_iter=1000))
    model.fit(list(train_texts), list(train_classes))
    found = np.zeros((len(texts), classes))
    # A class that a limited training set has lost keeps the probability 0.
    found[:, model.classes_] = model.predict_proba(list(texts))
    return found
