"""Shows what a pre-training run logged in TensorBoard: a table of its tags, and a figure of each group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, MaxNLocator

from lightning_danube.reports import runs
from lightning_danube.reports.figures import COLOURS, INK, count, line, new_figure, source_colours
from lightning_danube.reports.runs import MissingResult, RecordedRun
from lightning_danube.reports.tags import tag_called

RUN_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
RUN_DASHES: tuple[Literal["-", "--", ":"], ...] = ("-", "--", ":")
MOST_POINTS = 1000
"""Points of a line: more are closer together than a screen shows."""


def tags(run: RecordedRun) -> pd.DataFrame:
    """Returns a row per tag: number of points, last value, meaning, and which part of the config logs it."""
    task = run.config["model"].get("class_path", "the task")
    rows = {}
    for tag in sorted([*run.curves, *run.texts]):
        values = run.curves[tag].dropna() if tag in run.curves else pd.Series(run.texts[tag])
        rows[tag] = {
            "points": len(values),
            "last": _shown(values.iloc[-1]),
            "says": tag_called(tag).meaning,
            "logged by": tag_called(tag).class_path or task,
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("tag")


def _shown(value: float | str) -> str:
    if isinstance(value, str):
        return "text"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def group(run: RecordedRun, name: str) -> Figure:
    """Draws a group of tags over tokens, a panel per tag, as in TensorBoard.

    Raises:
        MissingResult: the run logged no tag of the group.
    """
    found = [tag for tag in run.curves if tag.split("/")[0] == name]
    if not found:
        raise MissingResult(f"{run.title} logged no {name}/…: {runs.way_to_log(name + '/')}")
    colours = source_colours(run.sources)
    columns = min(3, len(found))
    rows = -(-len(found) // columns)
    figure, axes = new_figure(0.35 + 1.75 * rows, rows, columns, sharex=True)
    for place, (ax, tag) in enumerate(zip(axes, found, strict=False)):
        values = run.curve(tag)
        line(ax, values)
        source = tag.split("/")[1].removeprefix("held_out_")
        ax.lines[0].set_color(colours.get(source, COLOURS["web"] if source not in run.sources else INK))
        ax.set_title(tag, fontsize=9.5, color=INK)
        ax.xaxis.set_major_locator(MaxNLocator(3))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: count(tokens)))
        ax.yaxis.set_major_locator(MaxNLocator(4, integer=tag == "mix/stage"))
        ax.tick_params(labelbottom=place + columns >= len(found))
    for ax in axes[len(found) :]:
        ax.set_visible(False)
    figure.supxlabel("tokens trained on", fontsize=9.5)
    return figure


def groups(compared: Sequence[RecordedRun]) -> list[str]:
    """Returns the groups of curves, such as "loss", that at least one of the runs logged. Losses come first."""
    names = dict.fromkeys(tag.split("/")[0] for tag in _curves(compared))
    return sorted(names, key=lambda name: name != "loss")


def _curves(compared: Sequence[RecordedRun]) -> list[str]:
    """Returns the tags that have more than one value in at least one of the runs."""
    tags = dict.fromkeys(tag for run in compared for tag in run.curves if "/" in tag)
    return [tag for tag in tags if any(tag in run.curves and run.curves[tag].count() > 1 for run in compared)]


def logged_once(compared: Sequence[RecordedRun]) -> pd.DataFrame:
    """Returns the values of the tags that have one value at most in each run: a row per tag, a column per run."""
    curves = _curves(compared)
    tags = dict.fromkeys(tag for run in compared for tag in run.curves if "/" in tag and tag not in curves)
    rows = [[run.curves[tag].max() if tag in run.curves else float("nan") for run in compared] for tag in tags]
    return pd.DataFrame(rows, index=pd.Index(list(tags), name="tag"), columns=[run.title for run in compared])


def compared_group(compared: Sequence[RecordedRun], name: str) -> Figure:
    """Draws a group of tags, a panel per tag and a line per run: over tokens if all runs count tokens, else over
    optimizer steps.

    Raises:
        MissingResult: no run logged a tag of the group.
    """
    found = [tag for tag in _curves(compared) if tag.split("/")[0] == name]
    if not found:
        raise MissingResult(f"no run logged {name}/…: {runs.way_to_log(name + '/')}")
    over_tokens = all(run.counts_tokens for run in compared)
    columns = min(2, len(found))
    rows = -(-len(found) // columns)
    titles = [run.title for run in compared]
    figure, axes = new_figure(0.5 + 0.22 * len(titles) + 2.2 * rows, rows, columns)
    layout = figure.get_layout_engine()
    assert isinstance(layout, ConstrainedLayoutEngine)
    layout.set(hspace=0.08)
    handles: dict[str, Any] = {}
    for ax, tag in zip(axes, found, strict=False):
        for number, run in enumerate(compared):
            if tag not in run.curves:
                continue
            values = run.curve(tag)
            line(ax, values.iloc[:: max(1, len(values) // MOST_POINTS)])
            drawn = ax.lines[-1]
            # Equal lines are both visible, because the first one is the widest. Dashes tell more runs than colours do.
            drawn.set_linewidth(max(1.2, 2.8 - 0.8 * number))
            drawn.set_color(RUN_COLOURS[number % len(RUN_COLOURS)])
            drawn.set_linestyle(RUN_DASHES[number // len(RUN_COLOURS) % len(RUN_DASHES)])
            handles.setdefault(titles[number], drawn)
        ax.set_title(tag, fontsize=9.5, color=INK)
        ax.xaxis.set_major_locator(MaxNLocator(4))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda place, _: count(place)))
        ax.yaxis.set_major_locator(MaxNLocator(4))
    for ax in axes[len(found) :]:
        ax.set_visible(False)
    figure.supxlabel("tokens trained on" if over_tokens else "optimizer steps", fontsize=9.5)
    if len(compared) > 1:
        # One title a line, because the paths of runs are long.
        figure.legend(
            list(handles.values()), list(handles), loc="outside upper left", ncols=1, frameon=False, fontsize=9
        )
    return figure


def plan(run: RecordedRun) -> str:
    """Returns the text of `run/plan`, as Markdown.

    Raises:
        MissingResult: the run logged no plan.
    """
    texts = run.texts.get("run/plan")
    if not texts:
        raise MissingResult(f"{run.title} kept no run/plan: {runs.way_to_log('run/plan')}")
    return texts[min(texts)]
