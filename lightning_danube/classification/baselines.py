"""Baselines for a text classifier: the class frequencies, and TF-IDF with logistic regression.

TF-IDF needs seconds and no language model. If its scores are as good as the model's, use TF-IDF.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

REGULARIZATION = 10.0
"""Inverse regularization strength (scikit-learn's C). scikit-learn's default, 1, regularizes rows of unit length too
strongly."""

Probabilities = NDArray[np.float64]


def majority_probabilities(train_classes: Sequence[int], classes: int, texts: int) -> Probabilities:
    """Returns the class frequencies of the training set, repeated for each text, (texts, classes)."""
    counts = np.bincount(np.asarray(train_classes), minlength=classes)
    return np.tile(counts / counts.sum(), (texts, 1))


def tfidf_probabilities(
    train_texts: Sequence[str], train_classes: Sequence[int], classes: int, texts: Sequence[str]
) -> Probabilities:
    """Returns the probabilities of logistic regression on TF-IDF weights of words and word pairs, (texts, classes)."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    # The default pattern drops words of one letter, and finds no word at all if no text has words as in Latin script.
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"\w+|[^\w\s]")
    model = make_pipeline(words, LogisticRegression(C=REGULARIZATION, max_iter=1000))
    model.fit(list(train_texts), list(train_classes))
    found = np.zeros((len(texts), classes))
    # A class that is missing from a limited training set keeps the probability 0.
    found[:, model.classes_] = model.predict_proba(list(texts))
    return found
