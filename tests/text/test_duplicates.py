"""Duplicates are found on the disk as they would be in memory. Sketches compare five-word shingles; near-duplicates
share four fifths of a sketch with an earlier document."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from lightning_danube.text import duplicates
from lightning_danube.text.duplicates import SortedRuns, drop_exact, drop_near
from lightning_danube.text.quality import sketches

Sketch = NDArray[np.uint32]


def repeated(drawn: list[Sketch], folder: Path) -> list[bool]:
    """Returns which sketches are near-duplicates of an earlier one."""
    keep = np.ones(len(drawn), dtype=bool)
    assert drop_near(keep, lambda: [np.stack(drawn)], folder) == (~keep).sum()
    assert not list(folder.iterdir())
    return (~keep).tolist()


def repeated_in_memory(drawn: list[Sketch]) -> list[bool]:
    """The same by dictionaries: each band finds the first kept document that has it."""
    kept: list[Sketch] = []
    bands: list[dict[bytes, int]] = [{} for _ in range(16)]
    found = []
    for one in drawn:
        keys = [row.tobytes() for row in one.reshape(16, 8)]
        candidates = {band[key] for band, key in zip(bands, keys, strict=True) if key in band}
        found.append(any(np.mean(kept[number] == one) >= 0.8 for number in candidates))
        if not found[-1]:
            for band, key in zip(bands, keys, strict=True):
                band.setdefault(key, len(kept))
            kept.append(one)
    return found


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
def test_four_fifths_of_a_sketch_make_a_near_duplicate(tmp_path: Path, equal: int, is_near: bool) -> None:
    # The first band of eight values agrees, so the two are compared.
    assert repeated([sketch(), sketch(differing=list(range(equal, 128)))], tmp_path) == [False, is_near]


def test_bands_miss_one_pair_in_twenty_at_the_border(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    pairs = [
        one + np.uint32(10_000 * number)
        for number in range(300)
        for one in (sketch(), sketch(differing=generator.choice(128, 25, replace=False).tolist()))
    ]
    found = repeated(pairs, tmp_path)
    assert not any(found[::2])
    # 16 bands of 8 values, 103 of 128 equal: 1 − (1 − 0.8⁸)¹⁶ = 0.95, with a standard deviation of 0.013.
    assert sum(found) / 300 == pytest.approx(0.95, abs=3 * 0.013)


def test_the_earliest_document_of_a_band_stays_in_it(tmp_path: Path) -> None:
    # Of the second only the first band agrees. In the third 15 values differ, one in each other band: the first
    # document is found by the first band alone.
    drawn = [sketch(), sketch(differing=list(range(8, 128))), sketch(differing=list(range(8, 128, 8)))]
    assert repeated(drawn, tmp_path) == [False, False, True]


def test_a_near_duplicate_is_not_kept_for_later_comparisons(tmp_path: Path) -> None:
    drawn = [sketch(), sketch(differing=list(range(24))), sketch(differing=list(range(48)))]
    assert repeated(drawn, tmp_path) == [False, True, False]


@pytest.mark.parametrize("run", [7, 100, 1 << 22])
def test_near_duplicates_on_the_disk_are_those_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: int
) -> None:
    monkeypatch.setattr(duplicates, "RUN", run)
    generator = np.random.default_rng(1)
    bases = generator.integers(0, 1000, (12, 128), dtype=np.uint32)
    drawn: list[Sketch] = []
    for _ in range(150):
        one = bases[generator.integers(12)].copy()
        one[generator.choice(128, generator.integers(0, 60), replace=False)] += 5000
        drawn.append(one)
    expected = repeated_in_memory(drawn)
    assert 30 < sum(expected) < 138
    assert repeated(drawn, tmp_path) == expected
    # In parts, some of which are empty; a document that is left out already finds nothing and is found by nothing.
    keep = generator.random(150) < 0.7
    of_kept = repeated_in_memory([one for one, wanted in zip(drawn, keep, strict=True) if wanted])
    left = keep.copy()
    left[keep] = ~np.array(of_kept)
    parts = np.split(np.stack(drawn), [0, 1, 40, 40, 149, 150])
    assert drop_near(keep, lambda: parts, tmp_path) == sum(of_kept)
    assert keep.tolist() == left.tolist()


@pytest.mark.parametrize("run", [3, 64, 1 << 22])
def test_exact_duplicates_keep_the_first_that_was_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: int
) -> None:
    monkeypatch.setattr(duplicates, "RUN", run)
    generator = np.random.default_rng(2)
    values = [0, 1, 2**64 - 1, *generator.integers(0, 2**64, 60, dtype=np.uint64).tolist()]
    hashes = [values[number] for number in generator.integers(0, len(values), 300)]
    keep = generator.random(300) < 0.8
    seen: set[int] = set()
    expected = []
    for value, wanted in zip(hashes, keep, strict=True):
        expected.append(bool(wanted) and value not in seen)
        seen |= {value} if wanted else set()
    before = int(keep.sum())
    parts = np.split(np.array(hashes, dtype=np.uint64), [0, 10, 11, 200])
    assert drop_exact(keep, parts, tmp_path) == before - sum(expected) > 100
    assert keep.tolist() == expected and not list(tmp_path.iterdir())


def test_without_documents_nothing_is_dropped(tmp_path: Path) -> None:
    keep = np.zeros(0, dtype=bool)
    assert drop_exact(keep, [], tmp_path) == drop_near(keep, lambda: [], tmp_path) == 0
    assert not list(tmp_path.iterdir())


def test_a_range_of_keys_is_sorted_at_once_and_not_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "RUN", 100)
    keys = np.random.default_rng(3).integers(0, 2**64, 5000, dtype=np.uint64)
    runs = SortedRuns(tmp_path, "some", 1 << 64)
    for begin in range(0, 5000, 30):
        runs.add(keys[begin : begin + 30], np.arange(begin, min(begin + 30, 5000)))
    found = list(runs.ordered())
    runs.close()
    # 50 ranges of 100 keys, with a standard deviation of 10.
    assert len(found) == 50 and max(len(some) for some, _ in found) < 160
    assert np.concatenate([some for some, _ in found]).tolist() == sorted(keys.tolist())
    assert keys[np.concatenate([values for _, values in found])].tolist() == sorted(keys.tolist())
