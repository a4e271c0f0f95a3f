import math
from fractions import Fraction

import numpy as np
import pytest

from lightning_danube.pretraining.mixture import LARGEST_BLOCK, Mixture, whole_counts
from lightning_danube.training.passes import permute

PAPER_STAGE_1 = {"web": 90.6, "code": 4.1, "instruct": 1.5, "rest": 3.8}


def test_shares_become_the_smallest_whole_counts() -> None:
    assert whole_counts(PAPER_STAGE_1) == {"web": 906, "code": 41, "instruct": 15, "rest": 38}
    assert whole_counts({"a": 1, "b": 1}) == {"a": 1, "b": 1}
    assert whole_counts({"a": 0.0, "b": 5}) == {"a": 0, "b": 1}


def test_shares_without_a_small_block_are_rounded_by_largest_remainder() -> None:
    counts = whole_counts({"a": 1 / 3, "b": 1 / 7, "c": 11 / 21})
    assert sum(counts.values()) == LARGEST_BLOCK
    assert counts == {"a": 3333, "b": 1429, "c": 5238}


def test_a_share_too_small_for_a_block_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"the share of source 'tiny' is 1e-05 of its stage; the smallest .* is 1/10000"
    ):
        whole_counts({"web": 99.999, "tiny": 0.001})


@pytest.mark.parametrize(
    "shares", [PAPER_STAGE_1, {"a": 1, "b": 2, "c": 3, "d": 0.5}, {"a": 1 / 3, "b": 2 / 3 + 0.001}]
)
def test_no_source_is_ever_a_whole_sample_away_from_its_share(shares: dict[str, float]) -> None:
    mixture = Mixture(shares)
    positions = np.arange(2 * mixture.block + 1)
    ideal = positions[:, None] * (mixture.counts / mixture.block)
    assert np.abs(mixture.taken_before(positions) - ideal).max() < 1
    assert (mixture.taken_before(np.array([mixture.block]))[0] == mixture.counts).all()


def test_counts_before_a_position_are_the_sources_counted() -> None:
    mixture = Mixture(PAPER_STAGE_1)
    far = 10**15 + 123
    sources = mixture.sources_at(np.arange(far, far + 500))
    counted = np.bincount(sources, minlength=len(mixture.sources))
    assert (counted == (mixture.taken_before(np.array([far + 500])) - mixture.taken_before(np.array([far])))[0]).all()


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 1000, 4097])
def test_a_pass_visits_every_row_once(size: int) -> None:
    rows = permute(np.arange(size), size, seed=7, stream="web", epoch=3)
    assert sorted(rows.tolist()) == list(range(size))


def test_order_depends_on_seed_source_and_pass_but_not_on_the_call() -> None:
    places = np.arange(1000)
    base = permute(places, 1000, seed=0, stream="web", epoch=0)
    for other in ({"seed": 1}, {"stream": "wiki"}, {"epoch": 1}):
        changed = permute(places, 1000, **{"seed": 0, "stream": "web", "epoch": 0, **other})  # type: ignore[arg-type]
        # Two random permutations agree in about one place of a thousand.
        assert (changed == base).sum() < 10
    one_by_one = [int(permute(np.array([p]), 1000, seed=0, stream="web", epoch=0)[0]) for p in range(50)]
    assert one_by_one == base[:50].tolist()


def test_order_looks_random() -> None:
    """Neighbours in a pass are not neighbours in the source: mean distance is a third of the size for random rows."""
    size = 10_000
    rows = permute(np.arange(size), size, seed=0, stream="web", epoch=0)
    # The standard error of the mean over 10,000 pairs is 0.24 % of the size.
    assert abs(np.abs(np.diff(rows)).mean() / size - 1 / 3) < 0.012


def test_trillions_of_rows_need_no_array() -> None:
    size = 3 * 10**12
    places = np.arange(size - 1000, size)
    rows = permute(places, size, seed=0, stream="web", epoch=0)
    assert len(set(rows.tolist())) == 1000
    assert rows.min() >= 0 and rows.max() < size


@pytest.mark.parametrize(
    ("shares", "counts"),
    [
        # Equal remainders: the larger share gets the sample, among equal shares the source that stands first.
        ({"a": 0.10005, "b": 0.89995}, {"a": 1000, "b": 9000}),
        ({"b": 0.89995, "a": 0.10005}, {"b": 9000, "a": 1000}),
        ({"a": 0.25005, "b": 0.4999, "c": 0.25005}, {"a": 2501, "b": 4999, "c": 2500}),
        ({"c": 0.25005, "b": 0.4999, "a": 0.25005}, {"c": 2501, "b": 4999, "a": 2500}),
        # The larger remainder goes first, also with a smaller share.
        ({"a": 0.100047, "b": 0.899953}, {"a": 1000, "b": 9000}),
        ({"a": 0.100053, "b": 0.899947}, {"a": 1001, "b": 8999}),
    ],
)
def test_ties_of_remainders_are_decided_alike_for_ever(shares: dict[str, float], counts: dict[str, int]) -> None:
    """A run is resumed by a later version of this program: its samples must not change."""
    assert whole_counts(shares) == counts


def order_by_deadlines(counts: list[int]) -> list[int]:
    """The order of a block, sample by sample: of the sources that may come, the one whose deadline is next."""
    block, taken, order = sum(counts), [0] * len(counts), []
    for place in range(block):
        deadlines = [
            (math.ceil(Fraction((taken[source] + 1) * block, count)), source)
            for source, count in enumerate(counts)
            if taken[source] < count and Fraction(taken[source] * block, count) < place + 1
        ]
        order.append(min(deadlines)[1])
        taken[order[-1]] += 1
    return order


@pytest.mark.parametrize(
    "counts", [[1], [2, 2], [1, 2, 1], [3, 3, 3, 1], [1, 0, 4], [906, 41, 15, 38], [5, 7, 11, 13], [50, 25, 25]]
)
def test_the_order_is_that_of_the_earliest_deadline_and_the_first_source(counts: list[int]) -> None:
    mixture = Mixture({f"source {number}": float(count) for number, count in enumerate(counts)})
    divisor = math.gcd(*counts)
    expected = order_by_deadlines([count // divisor for count in counts])
    assert mixture.sources_at(np.arange(2 * mixture.block)).tolist() == expected * 2
