"""The picture of a quantization evaluation: what each level loses against its size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's palette, made to be told apart with any kind of colour vision.
COLOURS = {"gguf": "#0072B2", "bitsandbytes": "#D55E00", "hqq": "#009E73", "rounding": "#8a8a8a"}
MARKERS = {"gguf": "o", "bitsandbytes": "s", "hqq": "^", "rounding": "v"}
MIB = 2**20
ENDS = ("low", "high")


def frontier_figure(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Change of the perplexity, with its 95 % interval, against the size of all tensors.

    Args:
        rows: as in `quantization.parquet`; those without a measurement are left out. Levels with a cache of their own
            have the same weights as another, and are left out, too.
    """
    # Not pyplot's: that would keep the figure, and ask for a screen where there is one.
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    figure = Figure(figsize=(9, 5.5), dpi=90, layout="constrained")
    axes = figure.add_subplot()
    for method, colour in COLOURS.items():
        ours = sorted(
            (row for row in rows if row["method"] == method and row["tensor_bytes"] and "cache-" not in row["level"]),
            key=lambda row: row["tensor_bytes"],
        )
        sizes = [row["tensor_bytes"] / MIB for row in ours]
        changes = [100 * row["perplexity_change"] for row in ours]
        ends = [[100 * abs(row[f"perplexity_change_{end}"] - row["perplexity_change"]) for row in ours] for end in ENDS]
        axes.errorbar(
            sizes,
            changes,
            yerr=ends,
            marker=MARKERS[method],
            color=colour,
            capsize=2,
            linestyle="none",
            elinewidth=0.8,
            label=method,
        )
        for row, size, change in zip(ours, sizes, changes, strict=True):
            # Whether the embedding is rounded, too, is seen from the size.
            name = row["level"].partition(":")[2].replace("+embeddings", "").replace("+double", "")
            above = 3 if method in ("gguf", "bitsandbytes") else -9
            axes.annotate(name, (size, change), textcoords="offset points", xytext=(5, above), fontsize=7, color=colour)
    axes.set_xscale("log")
    # Linear up to one per cent, where all that is good lies; logarithmic beyond.
    axes.set_yscale("symlog", linthresh=1.0)
    axes.set_ylim(bottom=min(-0.5, 1.2 * axes.dataLim.y0))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda change, _: f"{change:+,.0f}" if change else "0"))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: f"{size:,.0f}"))
    axes.xaxis.set_minor_formatter(FuncFormatter(lambda size, _: f"{size:,.0f}"))
    axes.axhline(0.0, color="#222222", linewidth=0.8)
    axes.set_xlabel("size of all tensors, MiB")
    axes.set_ylabel("perplexity above the full model's, %")
    axes.legend(frameon=False)
    return figure
