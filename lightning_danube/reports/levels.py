"""Reads the results of a quantization evaluation as pandas frames, from its `quantization.parquet` alone."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from lightning_danube.quantization.summary import frontier_figure
from lightning_danube.reports.runs import RESULTS, MissingResult, newest_run
from lightning_danube.terminal import as_typed

MIB = 2**20


def read_levels(runs: str | Path, name: str) -> pd.DataFrame:
    """Returns one row per level of the newest evaluation under `<runs>/<name>-test`.

    If there is none, returns the newest result of this name that comes with a clone.

    Raises:
        MissingResult: there is neither.
    """
    way = f"`{as_typed()} test --config quantization/{name.removeprefix('quantization-')}`"
    try:
        directory = newest_run(runs, f"{name}-test")
    except MissingResult:
        for root in (Path(), Path("..")):
            if kept := sorted((root / RESULTS).glob(f"{name}-20*.parquet")):
                return pd.read_parquet(kept[-1])
        raise MissingResult(f"no evaluation under {runs}/{name}-test: {way} makes one") from None
    file = directory / "quantization.parquet"
    if not file.is_file():
        raise MissingResult(f"{directory.parent.name}/{directory.name} did not come to its end: {way} continues it")
    return pd.read_parquet(file)


def quality(levels: pd.DataFrame) -> pd.DataFrame:
    """Returns the size and the loss of quality of each measured level."""
    found = levels[levels["not_measured"].isna()]
    frame = pd.DataFrame(
        {
            "MiB": found["tensor_bytes"] / MIB,
            "bits/weight": found["bits_per_weight"],
            "perplexity": found["perplexity"],
            "change, %": 100 * found["perplexity_change"],
            "low": 100 * found["perplexity_change_low"],
            "high": 100 * found["perplexity_change_high"],
            "noise": found["perplexity_change_is_noise"].map({True: "≈", False: ""}),
            "KL, 1e-3 nats": 1000 * found["divergence"],
            "same first, %": 100 * found["same_first"],
            "cloze, %": 100 * found["cloze_accuracy"],
        }
    )
    return frame.set_axis(found["level"].rename(None), axis=0)


def cost(levels: pd.DataFrame) -> pd.DataFrame:
    """Returns the speed and memory of each level.

    Raises:
        MissingResult: the evaluation did not measure them.
    """
    found = levels[levels["prefill_tokens_per_second"].notna()]
    if found.empty:
        raise MissingResult("speed and memory were not measured: set model.cost: true and evaluate again")
    frame = pd.DataFrame(
        {
            "prefill, tokens/s": found["prefill_tokens_per_second"],
            "decode, tokens/s": found["decode_tokens_per_second"],
            "peak memory, MiB": found["peak_memory_bytes"] / MIB,
        }
    )
    return frame.set_axis(found["level"].rename(None), axis=0)


def frontier(levels: pd.DataFrame) -> Figure:
    """Draws the loss of quality of each level against its size."""
    return frontier_figure(levels[levels["not_measured"].isna()].to_dict("records"))
