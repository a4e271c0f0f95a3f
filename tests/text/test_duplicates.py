"""Sketches compare five-word shingles; near-duplicates share four fifths of a sketch with an earlier document."""

import numpy as np
import pytest
from numpy.typing import NDArray

from lightning_danube.text.quality import NearDuplicates, sketches

Sketch = NDArray[np.uint32]


def sketch(*, differing: list[int] | None = None) -> Sketch:
    """128 values, some of which differ from those of `sketch()`."""
    values = np.arange(128, dtype=np.uint32)
    values[differing or []] += 1000
    return values


def shingles(words: list[str]) -> set[tuple[str, ...]]:
    return {tuple(words[at : at + 5]) for at in range(len(words) - 4)}


def test_sketches_estimate_the_similarity_of_five_word_shingles() -> None:
    drawn = np.random.default_rng(0).integers(10**6, size=(40, 400))
    estimates, exact = [], []
    for row in drawn:
        words = [str(number) for number in row]
        # Each changed word touches five shingles of five words, but only four of four words.
        changed = [f"{word}x" if at % 12 == 0 else word for at, word in enumerate(words)]
        left, right = sketches([" ".join(words), " ".join(changed)])
        estimates.append(float(np.mean(left == right)))
        a, b = shingles(words), shingles(changed)
        exact.append(len(a & b) / len(a | b))
    # 40 estimates with 128 permutations each; a similarity of 0.41 has a standard deviation of 0.007 over all.
    assert np.mean(estimates) == pytest.approx(np.mean(exact), abs=4 * 0.007)


def test_the_last_word_counts_and_case_and_marks_do_not() -> None:
    base, same, other = sketches(["a b c d e f", "A, b. c (d) E: f!", "a b c d e g"])
    assert (base == same).all() and not (base == other).all()
    short, longer = sketches(["a b c", "a b c d"])
    assert not (short == longer).any()


@pytest.mark.parametrize(("equal", "is_near"), [(128, True), (103, True), (102, False), (64, False)])
def test_four_fifths_of_a_sketch_make_a_near_duplicate(equal: int, is_near: bool) -> None:
    seen = NearDuplicates()
    assert not seen.repeats(sketch())
    # The first band of eight values agrees, so the two are compared.
    assert seen.repeats(sketch(differing=list(range(equal, 128)))) is is_near


def test_bands_miss_one_pair_in_twenty_at_the_border() -> None:
    generator = np.random.default_rng(0)
    found = 0
    for _ in range(300):
        seen = NearDuplicates()
        seen.repeats(sketch())
        found += seen.repeats(sketch(differing=generator.choice(128, 25, replace=False).tolist()))
    # 16 bands of 8 values, 103 of 128 equal: 1 − (1 − 0.8⁸)¹⁶ = 0.95, with a standard deviation of 0.013.
    assert found / 300 == pytest.approx(0.95, abs=3 * 0.013)


def test_the_earliest_document_of_a_band_stays_in_it() -> None:
    seen = NearDuplicates()
    assert not seen.repeats(sketch())
    assert not seen.repeats(sketch(differing=list(range(8, 128))))  # only the first band agrees
    # 15 values differ, one in each other band: the first document is found by the first band alone.
    assert seen.repeats(sketch(differing=list(range(8, 128, 8))))


def test_a_near_duplicate_is_not_kept_for_later_comparisons() -> None:
    seen = NearDuplicates()
    first, second, third = sketch(), sketch(differing=list(range(24))), sketch(differing=list(range(48)))
    assert [seen.repeats(one) for one in (first, second, third)] == [False, True, False]
