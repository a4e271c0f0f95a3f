"""Figures and tables of a pre-training run.

Bare matplotlib figures without pyplot: nothing global changes, and a figure is shown once, where a cell returns it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter, PercentFormatter
from pandas.io.formats.style import Styler

from lightning_danube.reports import runs
from lightning_danube.reports.runs import RecordedRun

# Okabe and Ito's palette, which suits any kind of colour vision. A source has one colour in all figures.
COLOURS = {
    "web": "#0072B2",
    "wiki": "#56B4E9",
    "academic": "#009E73",
    "synthetic": "#CC79A7",
    "instruct": "#D55E00",
    "code": "#E69F00",
    "social": "#F0E442",
}
INK, FAINT = "#222222", "#8a8a8a"
DARK, LIGHT_INK = "#0d1117", "#e6edf3"
BEHIND_TEXT = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
WIDTH = 9.0
"""Inches; with DPI, a figure is as wide as a notebook's column."""
DPI = 90


def source_colours(sources: Sequence[str]) -> dict[str, str]:
    """Returns fixed colours for the sources of the paper. Others get the remaining colours in order, then greys."""
    free = [colour for name, colour in COLOURS.items() if name not in sources]
    others = [name for name in sources if name not in COLOURS]
    # Greys from dark to light, so that any number of sources can be drawn.
    greys = [str(round(grey, 3)) for grey in np.linspace(0.25, 0.85, max(1, len(others) - len(free)))]
    chosen = dict(zip(others, [*free, *greys], strict=False))
    return {name: COLOURS.get(name) or chosen[name] for name in sources}


def table(frame: pd.DataFrame, name: str, digits: int = 1) -> Styler:
    """Returns a frame styled for a notebook. A fixed `name` keeps the HTML equal from run to run."""
    # pandas would print a rank of 64 beside a rate of 0.001 as 64.000000.
    styler = frame.style.format(precision=digits, thousands=",", na_rep="–")
    return styler.format_index(lambda value: f"{value:g}" if isinstance(value, float) else str(value)).set_uuid(name)


# --- figures ----------------------------------------------------------------------------------------------------------


def stage_mixes(run: RecordedRun) -> Figure:
    """Draws two bars of sources per stage, planned and seen. A black mark shows the paper's end of the web share."""
    planned, seen = runs.planned_mix(run), runs.seen_mix(run)
    colours = source_colours(run.sources)
    figure, (ax,) = new_figure(0.9 + 0.85 * len(planned))
    places, labels = [], []
    for k, stage in enumerate(planned.index):
        for row, (kind, mix) in enumerate((("planned", planned), ("seen", seen))):
            y = -k + (0.2, -0.2)[row]
            places.append(y)
            labels.append(f"{stage}, {kind}")
            left = 0.0
            if mix.loc[stage].isna().any():
                ax.text(0.01, y, "not begun", color=FAINT, va="center", fontsize=8.5)
            for source in run.sources:
                share = mix.loc[stage, source]
                ax.barh(y, share, 0.36, left, color=colours[source], edgecolor="white", linewidth=0.8)
                if share >= 0.035:  # wide enough for a number
                    ink = readable_on(colours[source])
                    ax.text(
                        left + share / 2, y, f"{100 * share:.1f}", color=ink, ha="center", va="center", fontsize=8.5
                    )
                left += share
        if "web" in run.sources and k < len(runs.PAPER_WEB_SHARES):
            place = runs.PAPER_WEB_SHARES[k]
            ax.plot([place, place], [-k - 0.46, -k + 0.46], color="black", linewidth=2.2, solid_capstyle="butt")
    ax.set_yticks(places, labels)
    ax.set_xlim(0, 1)
    ax.xaxis.set_major_formatter(PercentFormatter(1))
    ax.set_xlabel("share of the stage's tokens")
    ax.grid(visible=False)
    handles: list[Any] = [ax.barh(0, 0, color=colours[source], label=source) for source in run.sources]
    if "web" in run.sources:
        handles += ax.plot([], [], "|", color="black", markersize=11, markeredgewidth=2.2, label="web in the paper")
    legend(figure, handles, "The mix of each stage: planned, seen, and the paper's share of web text")
    return figure


def mix_over_tokens(run: RecordedRun) -> Figure:
    """Draws the share of each source in the training tokens, over the run."""
    mix = runs.mix_table(run)
    colours = source_colours(run.sources)
    figure, (ax,) = new_figure(2.9)
    edges = np.concatenate([[0], mix.index.to_numpy()])
    shares = np.concatenate([mix.to_numpy()[:1], mix.to_numpy()]).T
    drawn = ax.stackplot(edges, shares, colors=[colours[s] for s in run.sources], labels=run.sources, step="pre")
    ax.set_ylim(0, 1)
    ax.yaxis.set_major_formatter(PercentFormatter(1))
    ax.set_ylabel("share of tokens")
    ax.grid(visible=False)
    over_tokens([ax], run)
    legend(figure, drawn, "The mix that was trained on, between logged steps and ends of stages")
    return figure


def training_loss(run: RecordedRun) -> Figure:
    """Draws the loss of the training batches over tokens."""
    loss = run.curve("loss/train")
    figure, (ax,) = new_figure(3.4)
    line(ax, loss)
    ax.set_ylabel("training loss, nats/token")
    over_tokens([ax], run)
    figure.suptitle("Training loss", x=0.01, ha="left", fontsize=11)
    return figure


def held_out_losses(run: RecordedRun) -> Figure:
    """Draws a panel per source: loss after each stage, and a dashed line for the unigram baseline."""
    losses = runs.held_out_loss_table(run)
    baseline, after = losses.iloc[0], losses.iloc[1:]
    colours = source_colours(run.sources)
    columns = min(5, len(run.sources))
    rows = -(-len(run.sources) // columns)
    figure, axes = new_figure(0.6 + 3.5 * rows, rows, columns, sharey=True)
    names = [str(name).removeprefix("after ") for name in after.index]
    low, high = float(losses.min(axis=None)), float(losses.max(axis=None))
    margin = 0.14 * (high - low)
    for ax, source in zip(axes, run.sources, strict=False):
        values = after[source].to_numpy()
        ax.axhline(baseline[source], color=INK, linewidth=1.2, linestyle=(0, (4, 3)))
        ax.plot(range(len(values)), values, "o-", color=colours[source], linewidth=1.8, markersize=6)
        for k, value in enumerate(values):
            place: dict[str, Any] = {"xytext": (1, 6), "textcoords": "offset points", "bbox": BEHIND_TEXT}
            ax.annotate(f"{value:.2f}", (k, value), fontsize=8.5, **place)
        ax.set_xticks(range(len(names)), names, rotation=35, ha="right", rotation_mode="anchor")
        ax.set_xlim(-0.4, len(names) - 0.2)
        ax.set_ylim(low - margin / 2, high + margin / 2)
        ax.set_title(source, fontsize=10, color=INK)
    for ax in axes[len(run.sources) :]:
        ax.set_visible(False)
    for ax in axes[::columns]:
        ax.set_ylabel("held-out loss, nats/token")
    handles = axes[0].plot([], [], color=INK, linewidth=1.2, linestyle=(0, (4, 3)), label="unigram baseline")
    handles += axes[0].plot([], [], "o-", color=FAINT, linewidth=1.8, markersize=6, label="after the stage")
    legend(figure, handles, "Held-out loss by source after each stage")
    return figure


def losses_over_mix(run: RecordedRun) -> Figure:
    """Draws the held-out loss of each source over tokens, and below it the mix of the stages, in the same colours."""
    seen = runs.seen_mix(run)
    colours = source_colours(run.sources)
    figure, (top, bottom) = new_figure(4.4, rows=2, sharex=True, heights=(3, 1))
    handles = []
    for source in run.sources:
        loss = run.curve(f"held_out/{source}")
        handles += top.plot(
            loss.index, loss.to_numpy(), "o-", color=colours[source], linewidth=1.8, markersize=3.5, label=source
        )
    top.set_ylabel("held-out loss, nats/token")
    for name, span in runs.stage_spans(run).iterrows():
        left, width, low = span["begin"], span["end"] - span["begin"], 0.0
        for source in run.sources:
            share = float(seen.loc[str(name), source])
            bottom.bar(left, share, width, low, align="edge", color=colours[source], edgecolor="white", linewidth=0.8)
            if share >= 0.3:
                ink = readable_on(colours[source])
                text = f"{source} {100 * share:.0f} %"
                bottom.text(left + width / 2, low + share / 2, text, color=ink, ha="center", va="center", fontsize=8.5)
            low += share
    bottom.set_ylim(0, 1)
    bottom.yaxis.set_major_formatter(PercentFormatter(1))
    bottom.set_ylabel("share of tokens")
    bottom.grid(visible=False)
    over_tokens([top, bottom], run)
    legend(figure, handles, "Held-out loss by source over three stages, and the mix of each stage")
    return figure


def in_dark(figure: Figure) -> Figure:
    """Turns a figure of this package dark, for pages on a dark ground.

    Colours of the data stay, and hollow marks stay hollow. Names in a colour of the data get a lighter one, because
    small letters need more contrast than lines.
    """
    figure.set_facecolor(DARK)
    on_data = [text for ax in figure.axes for text in ax.texts if text.get_color() != INK]
    for text in figure.findobj(Text):
        if text not in on_data:
            text.set_color(LIGHT_INK)
        elif text.get_color() not in ("black", "white"):  # these stand on bars
            red, green, blue = ((2 + channel) / 3 for channel in to_rgb(text.get_color()))
            text.set_color((red, green, blue))
    for ax in figure.axes:
        ax.set_facecolor(DARK)
        for grid in [*ax.get_xgridlines(), *ax.get_ygridlines()]:
            grid.set_color("#30363d")
        for drawn in ax.get_lines():
            if drawn.get_color() == INK:
                drawn.set_color(LIGHT_INK)
            face = drawn.get_markerfacecolor()
            drawn.set_markerfacecolor({INK: LIGHT_INK, "white": DARK}.get(str(face), face))
        ax.spines[:].set_color(FAINT)
        ax.tick_params(which="both", color=FAINT, labelcolor=LIGHT_INK)
        for patch in ax.patches:
            patch.set_edgecolor(DARK)
    return figure


def optimization(run: RecordedRun) -> Figure:
    """Draws learning rate and gradient norm over tokens."""
    rate, norm = run.curve("optimizer/learning_rate"), run.curve("optimizer/gradient_norm")
    figure, (top, bottom) = new_figure(4.6, rows=2, sharex=True)
    line(top, rate)
    top.set_ylabel("learning rate")
    top.set_ylim(bottom=0)
    line(bottom, norm)
    bottom.set_ylabel("gradient norm,\nbefore clipping")
    bottom.set_ylim(bottom=0)
    limit = run.config["trainer"].get("gradient_clip_val")
    # A limit far above all norms was never reached, and lies outside the axes.
    if limit and limit <= bottom.get_ylim()[1]:
        bottom.axhline(limit, color=INK, linewidth=1.2, linestyle=(0, (4, 3)))
        bottom.annotate(
            f"clipped above {limit:g}", (1, limit), (-4, 4), ("axes fraction", "data"), "offset points", ha="right",
            fontsize=8.5, color=INK,
        )  # fmt: skip
    over_tokens([top, bottom], run)
    figure.suptitle("Learning rate and gradient norm", x=0.01, ha="left", fontsize=11)
    return figure


def throughput(run: RecordedRun) -> Figure:
    """Draws tokens/s between two logged steps and, if the peak is known, the model FLOPs utilisation."""
    rate = run.curve("throughput/tokens_per_second")
    has_peak = "throughput/mfu" in run.curves
    figure, axes = new_figure(4.6 if has_peak else 2.9, rows=1 + has_peak, sharex=True)
    line(axes[0], rate)
    axes[0].set_ylabel("tokens/s")
    axes[0].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes[0].set_ylim(0, 1.15 * float(rate.max()))
    title, mean = "Throughput in training", run.summary.get("tokens_per_second")
    if mean:
        title += f"; dashed: {mean:,.0f} tokens/s over the whole run"
        axes[0].axhline(mean, color=INK, linewidth=1.2, linestyle=(0, (4, 3)))
    if has_peak:
        line(axes[1], run.curve("throughput/mfu"))
        axes[1].set_ylabel("model FLOPs\nutilisation")
        axes[1].yaxis.set_major_formatter(PercentFormatter(1))
        axes[1].set_ylim(bottom=0)
    over_tokens(axes, run)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    return figure


# --- parts ------------------------------------------------------------------------------------------------------------


def new_figure(
    height: float,
    rows: int = 1,
    columns: int = 1,
    *,
    sharex: bool = False,
    sharey: bool = False,
    heights: Sequence[float] | None = None,
) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained", facecolor="white")
    drawn = figure.subplots(rows, columns, squeeze=False, sharex=sharex, sharey=sharey, height_ratios=heights)
    axes: list[Axes] = list(drawn.flat)
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color(FAINT)
        ax.tick_params(color=FAINT, labelsize=9)
        ax.grid(color="#e4e4e4", linewidth=0.8)
        ax.set_axisbelow(True)
    return figure, axes


def line(ax: Axes, values: pd.Series) -> None:
    # Dots mark the measurements, as long as they do not overlap.
    marker = "o" if len(values) <= 60 else ""
    ax.plot(values.index, values.to_numpy(), color=COLOURS["web"], linewidth=1.6, marker=marker, markersize=3.5)


def legend(figure: Figure, handles: Sequence[Any], title: str) -> None:
    """Adds a legend in one row between the title and the axes."""
    drawn = figure.legend(
        handles=handles, loc="outside upper left", ncols=8, frameon=False, fontsize=9, title=title,
        alignment="left", handlelength=1.4, columnspacing=1.4, borderpad=0,
    )  # fmt: skip
    drawn.get_title().set_fontsize(11)


def over_tokens(axes: Sequence[Axes], run: RecordedRun) -> None:
    """Sets tokens as the x-axis, with a dotted line where a stage begins. Writes stage names above the first axes."""
    spans = runs.stage_spans(run)
    end = int(spans["end"].max())
    for ax in axes:
        ax.set_xlim(0, end)
        ax.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: count(tokens)))
        for begin in spans["begin"].iloc[1:]:
            ax.axvline(begin, color=INK, linewidth=1.0, linestyle=":")
    axes[-1].set_xlabel("tokens trained on")
    for number, (name, span) in enumerate(spans.iterrows(), start=1):
        # About 100 characters of this size fit above the axes. A short stage shows its number instead of its name.
        fits = len(str(name)) + 2 <= 100 * (span["end"] - span["begin"]) / end
        axes[0].annotate(
            str(name) if fits else str(number), ((span["begin"] + span["end"]) / 2, 1), (0, 4),
            ("data", "axes fraction"), "offset points", ha="center", fontsize=9, color=INK,
        )  # fmt: skip


def count(tokens: float) -> str:
    """Formats 1500000 as 1.5M, as in configs."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if abs(tokens) >= size:
            return f"{tokens / size:g}{unit}"
    return f"{tokens:g}"


def readable_on(colour: str) -> str:
    """Returns black or white, whichever has more contrast with a colour (WCAG's relative luminance)."""
    channels = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)] if colour.startswith("#") else [float(colour)] * 3
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "white" if 1.05 / (luminance + 0.05) > (luminance + 0.05) / 0.05 else "black"
