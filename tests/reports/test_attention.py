"""What fewer key-value heads save, from a study's file and from the committed measurement."""

from typing import Any

import numpy as np
import pandas as pd
import pytest

from lightning_danube.reports import attention


def test_cache_bytes_follow_from_the_heads() -> None:
    found = attention.decoders("studies/attention")
    cache = found["cache, bytes/token"]
    # Keys and values of 6 layers, each head 16 channels of 2 bytes.
    assert cache["mha"] == 2 * 6 * 8 * 16 * 2
    assert (cache["mha"] / cache).tolist() == [8 / heads for heads in found["key-value heads"]] == [1, 2, 4, 8]
    assert found["parameters"].max() / found["parameters"].min() < 1.001


def test_the_difference_is_drawn_over_the_cache() -> None:
    rows = [
        {"variant": variant, "seed": seed, "loss": 3 + seed + (0 if variant == "mha" else 0.1 + 0.001 * seed)}
        for variant in ("mha", "mqa")
        for seed in (1, 2, 3)
    ]
    shapes = attention.decoders("studies/attention")
    (ax,) = attention.loss_by_cache(pd.DataFrame(rows), shapes, "loss", "mha").axes
    (dot,) = [line for line in ax.lines if line.get_marker() == "o"]
    (place,) = np.asarray(dot.get_xydata()).tolist()
    assert place == pytest.approx([shapes.loc["mqa", "cache, bytes/token"], 0.102])


def test_speeds_are_those_that_were_measured() -> None:
    speeds = attention.read_speeds()
    table = attention.speed_table(speeds)
    assert (
        table.loc[8192, ("decode, × 16 heads", 8)] == pytest.approx(1.36, abs=0.005)
        and table.loc[512, ("cache, MiB", 1)] == 3
    )
    assert list(table["cache, MiB"].columns) == [16, 8, 4, 1]
    figure = attention.speed(speeds)
    figure.draw_without_rendering()
    decode = figure.axes[2]
    assert np.asarray(decode.lines[0].get_ydata()) == pytest.approx([11.67, 11.23, 7.46, 5.35, 3.85], abs=0.005)
    bars: Any = decode.collections[0]
    ours = speeds[speeds["key_value_heads"] == 16]
    ends = ours[["decode_tokens_per_second_low", "decode_tokens_per_second_high"]].to_numpy().tolist()
    assert [[y for _, y in bar] for bar in bars.get_segments()] == ends
    assert [len(ax.collections) for ax in figure.axes] == [0, 4, 4]
    title = "Key-value heads, at 513,590,784 parameters each; medians of 3 rounds, "
    assert figure.legends[0].get_title().get_text() == title + "bars: lowest to highest"


def test_a_measurement_without_its_spread_says_so() -> None:
    speeds = attention.read_speeds().filter(regex="(?<!_low)(?<!_high)$")
    assert "decode_tokens_per_second" in speeds and "decode_tokens_per_second_low" not in speeds
    figure = attention.speed(speeds)
    assert [len(ax.collections) for ax in figure.axes] == [0, 0, 0]
    assert figure.legends[0].get_title().get_text().endswith("medians of 3 rounds, their spread was not kept")
