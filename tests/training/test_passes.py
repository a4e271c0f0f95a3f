"""The order of rows in a pass. Whole passes: tests/chat/test_rows.py; shuffles: tests/pretraining/test_mixture.py."""

from typing import Any

import numpy as np
import pytest

from lightning_danube.training.passes import PACKED_TOGETHER, bucketed_pass, packed_pass, permute


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"seed": 1, "epoch": 12, "stream": "web"}, {"seed": 11, "epoch": 2, "stream": "web"}),
        ({"seed": 1, "epoch": 2, "stream": "3/web"}, {"seed": 1, "epoch": 23, "stream": "web"}),
    ],
)
def test_no_two_orders_have_the_same_key(one: dict[str, Any], other: dict[str, Any]) -> None:
    places = np.arange(1000)
    # Two random permutations agree in about one place of a thousand.
    assert (permute(places, 1000, **one) == permute(places, 1000, **other)).sum() < 10


def test_packing_is_best_fit() -> None:
    """Against a plain loop: the longest first, each into the fullest row that has room, the newest rows last."""
    generator = np.random.default_rng(0)
    lengths = generator.integers(1, 60, 300)
    assert len(lengths) < PACKED_TOGETHER, "one group"
    chats = permute(np.arange(300), 300, seed=5, stream="conversations", epoch=2)
    rows: list[list[int]] = []
    for chat in sorted(chats.tolist(), key=lambda chat: -lengths[chat]):
        left = [(64 - lengths[row].sum(), number) for number, row in enumerate(rows)]
        fitting = [(room, number) for room, number in left if room >= lengths[chat]]
        if not fitting:
            rows.append([])
        rows[min(fitting)[1] if fitting else -1].append(chat)
    found = packed_pass(lengths, 64, 8, 5, 2).rows
    assert sorted(filter(None, found)) == sorted(rows)


def test_bucketed_steps_hold_neighbours_in_length() -> None:
    lengths = np.random.default_rng(0).permutation(400)  # all within one group of batches
    one = bucketed_pass(lengths, 512, 8, 0, 0)
    for first in range(0, len(one.rows), 8):
        step = sorted(lengths[row[0]] for row in one.rows[first : first + 8])
        assert step == list(range(step[0], step[0] + 8))
