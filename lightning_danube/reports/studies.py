"""Shows the results of studies as pandas frames and figures, from their `study.parquet` and `summary.json`.

If the study was run here, its results are read from the runs; otherwise from the results that come with a clone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, PercentFormatter

from lightning_danube.files import read_json
from lightning_danube.intervals import student
from lightning_danube.pretraining.curriculum import tokens_of_stages
from lightning_danube.reports.figures import (
    COLOURS,
    FAINT,
    INK,
    count,
    legend,
    new_figure,
    readable_on,
    source_colours,
)
from lightning_danube.reports.runs import RESULTS, MissingResult, committed_result
from lightning_danube.studies.comparison import compare, verdict
from lightning_danube.terminal import as_typed
from lightning_danube.yaml_files import read_config

MARKS = list(COLOURS.values())
LABELS = {"rank": "rank of the adapter", "peak": "peak learning rate", "alpha": "alpha of the adapter"}


def read_study(runs: str | Path, name: str) -> pd.DataFrame:
    """Returns the complete runs of a study. The frame's `attrs` say where the runs were found.

    Raises:
        MissingResult: there are no complete runs.
    """
    file = _file(runs, name, "parquet")
    frame = pd.read_parquet(file)
    planned = len(frame)
    if "state" in frame:
        frame = frame[frame["state"] == "complete"]
    elif "error" in frame:
        frame = frame[frame["error"].isna()]
    if frame.empty:
        raise MissingResult(f"no run of {name} came to its end: `{study_command(name)} --resume` continues it")
    frame = frame.reset_index(drop=True)
    frame.attrs["planned"] = planned
    committed = file.name != "study.parquet"
    frame.attrs["from"] = (RESULTS / "studies" / file.name).as_posix() if committed else f"runs/studies/{name}"
    return frame


def read_summary(runs: str | Path, name: str) -> dict[str, Any]:
    """Returns the content of a study's `summary.json`.

    Raises:
        MissingResult: there is no such file.
    """
    return read_json(_file(runs, name, "json"))


def _file(runs: str | Path, name: str, kind: str) -> Path:
    of_a_run = "study.parquet" if kind == "parquet" else "summary.json"
    for file in (Path(runs) / "studies" / name / of_a_run, Path("..") / runs / "studies" / name / of_a_run):
        if file.is_file():
            return file
    try:
        return committed_result(f"studies/{name}.{kind}")
    except MissingResult:
        raise MissingResult(f"there is no result of the study {name}: `{study_command(name)}` makes one") from None


def study_command(name: str) -> str:
    """Returns the command that runs a study of the project."""
    return f"{as_typed()} study --config studies/{name}"


def provenance(*studies: pd.DataFrame) -> pd.DataFrame:
    """Returns the source of each study's numbers."""
    rows = [
        {
            "study": study["study"].iloc[0],
            "runs": f"{len(study)} of {study.attrs.get('planned', len(study))}",
            "seeds": study["seed"].nunique(),
            "command": study["command"].iloc[0],
            "commits": ", ".join(str(commit)[:7] for commit in study["commit"].unique()),
            "machine": ", ".join(map(str, study["machine"].unique())),
            "read from": study.attrs.get("from", ""),
        }
        for study in studies
    ]
    return pd.DataFrame(rows).set_index("study")


def means(study: pd.DataFrame, metrics: Sequence[str]) -> pd.DataFrame:
    """Returns a row per variant: the number of seeds, and the mean of each metric."""
    groups = study.groupby("variant", sort=False)
    return groups[list(metrics)].mean().assign(seeds=groups.size())[["seeds", *metrics]].rename_axis(None)


def paired_differences(study: pd.DataFrame, metrics: Sequence[str], baseline: str) -> pd.DataFrame:
    """Returns a row per metric and variant: the mean difference from the baseline, paired by seed.

    With Student's 95 % interval, and p adjusted by Holm among the variants of a metric.
    """
    rows = []
    for metric in metrics:
        for found in compare(_by_seed(study, metric), baseline):
            rows.append(
                {
                    "metric": metric,
                    "variant": found.variant,
                    "difference": found.difference.value,
                    "low": found.difference.low,
                    "high": found.difference.high,
                    "p, Holm": found.p,
                    "detected": "yes" if found.is_detected else "",
                }
            )
    return pd.DataFrame(rows).set_index(["metric", "variant"]).astype({"low": float, "high": float, "p, Holm": float})


def _by_seed(study: pd.DataFrame, metric: str) -> dict[str, dict[int, float]]:
    return {
        str(variant): dict(zip(one["seed"], one[metric], strict=True))
        for variant, one in study.dropna(subset=[metric]).groupby("variant", sort=False)
    }


def verdicts(study: pd.DataFrame, metric: str, baseline: str, better: Literal["lower", "higher"] = "lower") -> str:
    """Returns the study's verdict on each variant in words, as a list in Markdown."""
    return "\n".join(
        f"- {verdict(one, baseline, metric, better)}" for one in compare(_by_seed(study, metric), baseline)
    )


def forest(study: pd.DataFrame, metrics: Sequence[str], baseline: str, unit: str) -> Figure:
    """Draws differences from the baseline with their intervals, a panel per metric, all with one scale.

    Detected differences are filled and in the colour of the text.
    """
    found = paired_differences(study, metrics, baseline)
    variants = list(dict.fromkeys(found.index.get_level_values("variant")))
    columns = 2 if len(metrics) == 4 else min(3, len(metrics))
    rows = -(-len(metrics) // columns)
    figure, axes = new_figure(0.5 + rows * (0.75 + 0.28 * len(variants)), rows=rows, columns=columns, sharex=True)
    for place, (ax, metric) in enumerate(zip(axes, metrics, strict=False)):
        for row, variant in enumerate(variants):
            if (metric, variant) not in found.index:
                continue
            one = found.loc[(metric, variant)]
            ink = INK if one["detected"] else FAINT
            ax.plot([one["low"], one["high"]], [-row, -row], color=ink, linewidth=2)
            face = ink if one["detected"] else "white"
            ax.plot(one["difference"], -row, "o", color=ink, markerfacecolor=face, markersize=6)
        ax.axvline(0, color=INK, linewidth=1.2, linestyle=":", zorder=0)
        first = place % columns == 0
        ax.set_yticks([-row for row in range(len(variants))], variants if first else [""] * len(variants))
        ax.set_ylim(-len(variants) + 0.5, 0.5)
        ax.xaxis.set_major_locator(MaxNLocator(4))
        ax.set_title(metric, fontsize=10, color=INK)
        ax.grid(visible=False, axis="y")
    for ax in axes[len(metrics) :]:
        ax.set_visible(False)
    layout = figure.get_layout_engine()
    assert isinstance(layout, ConstrainedLayoutEngine)
    layout.set(h_pad=0.09)
    said = "lines: 95 % intervals; filled: p < 0.05 after Holm; one scale"
    figure.supxlabel(f"difference from {baseline}, {unit}; {said}", fontsize=9.5)
    return figure


def mixes(config: str) -> Figure:
    """Draws the training mixture of each variant of a curriculum study over its run.

    Args:
        config: the study's name, such as studies/curriculum, or its file.
    """
    design = read_config(config)
    variants = {name: {**design.get("set", {}), **values} for name, values in design["variants"].items()}
    stages = {name: values["data.init_args.stages"] for name, values in variants.items()}
    sources = list(dict.fromkeys(source for parts in stages.values() for stage in parts for source in stage["mix"]))
    colours = source_colours(sources)
    figure, axes = new_figure(2.3, columns=len(stages))
    for ax, (name, parts) in zip(axes, stages.items(), strict=True):
        begin = 0.0
        tokens = variants[name].get("data.init_args.tokens")
        for stage, length in zip(parts, tokens_of_stages({"stages": parts, "tokens": tokens}), strict=True):
            total, bottom = sum(stage["mix"].values()), 0.0
            for source in sources:
                share = stage["mix"].get(source, 0) / total
                ax.bar(begin, share, length, bottom, align="edge", color=colours[source], linewidth=0)
                bottom += share
            begin += length
        ax.set(xlim=(0, begin), ylim=(0, 1), xticks=[0, begin], xticklabels=["0", count(float(f"{begin:.3g}"))])
        ax.set_title(name, fontsize=10, color=INK)
        ax.yaxis.set_major_formatter(PercentFormatter(1))
        if ax is not axes[0]:
            ax.set_yticklabels([])
    axes[len(axes) // 2].set_xlabel("tokens")
    handles = [axes[0].bar(0, 0, 0, color=colours[source], label=source) for source in sources]
    legend(figure, handles, "source")
    return figure


# --- searches ---------------------------------------------------------------------------------------------------------


def settings_of(study: pd.DataFrame) -> list[str]:
    """Returns the columns of a search that hold the settings."""
    return [column for column in study.columns if ".init_args." in column]


def short(setting: str) -> str:
    """Returns the last part of a dotted key."""
    return setting.rpartition(".")[2]


def best(study: pd.DataFrame, metric: str, count: int = 8, lower: bool = False) -> pd.DataFrame:
    """Returns the best settings of a search: mean over the seeds and half its 95 % interval."""
    settings = settings_of(study)
    rows = []
    for trial, one in study.groupby("trial"):
        values = list(one[metric])
        rows.append(
            {
                "trial": trial,
                metric: sum(values) / len(values),
                "±": student(values).half,
                **{short(setting): one[setting].iloc[0] for setting in settings},
            }
        )
    return pd.DataFrame(rows).set_index("trial").astype({"±": float}).sort_values(metric, ascending=lower).head(count)


def marginals(study: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Returns for a grid a row per setting and value: the mean over all other settings, and half the 95 % interval over
    the seeds."""
    rows = []
    for setting in settings_of(study):
        for value, one in study.groupby(setting):
            by_seed = list(one.groupby("seed")[metric].mean())
            rows.append(
                {
                    "setting": short(setting),
                    "value": value,
                    metric: sum(by_seed) / len(by_seed),
                    "±": student(by_seed).half,
                }
            )
    return pd.DataFrame(rows).set_index(["setting", "value"]).astype({"±": float})


def marginal_means(study: pd.DataFrame, metric: str) -> Figure:
    """Draws for a grid a panel per setting: the mean over all other settings, and the 95 % interval over the seeds."""
    found = marginals(study, metric)
    settings = list(dict.fromkeys(found.index.get_level_values("setting")))
    figure, axes = new_figure(2.8, columns=len(settings), sharey=True)
    for ax, setting in zip(axes, settings, strict=True):
        ours = found.loc[setting]
        ax.errorbar(range(len(ours)), ours[metric], ours["±"], fmt="o-", color=MARKS[0], capsize=4, markersize=6)
        ax.set_xticks(range(len(ours)), [f"{value:g}" for value in ours.index])
        ax.set_xlabel(LABELS.get(setting, setting))
    axes[0].set_ylabel(f"{metric},\nmean and 95 % interval")
    return figure


def heat_map(study: pd.DataFrame, metric: str) -> Figure:
    """Draws a grid of two settings as a heat map: the mean over the seeds, and half its 95 % interval below."""
    rows, columns = settings_of(study)
    cells = study.groupby([rows, columns])[metric]
    mean = cells.mean().unstack()
    half = cells.apply(lambda values: student(values).half or float("nan")).unstack()
    figure, (ax,) = new_figure(0.9 + 0.55 * len(mean))
    picture = ax.imshow(mean.to_numpy(), cmap="cividis", aspect="auto", origin="lower")
    for (y, x), value in np.ndenumerate(mean.to_numpy()):
        if np.isnan(value):  # not run yet
            continue
        red, green, blue, _ = picture.to_rgba(value)
        ink = readable_on(to_hex((red, green, blue)))
        ax.text(x, y, f"{value:.3f}\n± {half.iloc[y, x]:.3f}", ha="center", va="center", color=ink, fontsize=8.5)
    ax.set_xticks(range(len(mean.columns)), [f"{value:g}" for value in mean.columns])
    ax.set_yticks(range(len(mean.index)), [f"{value:g}" for value in mean.index])
    ax.set(xlabel=LABELS.get(short(columns), short(columns)), ylabel=LABELS.get(short(rows), short(rows)))
    ax.grid(visible=False)
    figure.colorbar(picture, ax=ax, label=metric)
    return figure


def tried(study: pd.DataFrame, metric: str) -> Figure:
    """Draws for a search the metric of each trial over each numeric setting."""
    numbers = [setting for setting in settings_of(study) if pd.api.types.is_numeric_dtype(study[setting])]
    figure, axes = new_figure(2.8, columns=len(numbers), sharey=True)
    for ax, setting in zip(axes, numbers, strict=True):
        ax.plot(study[setting], study[metric], "o", color=MARKS[0], markersize=5, alpha=0.8)
        ax.set_xscale("log")
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.set_xlabel(LABELS.get(short(setting), short(setting)))
    axes[0].set_ylabel(metric)
    return figure


def importances(summary: dict[str, Any]) -> pd.DataFrame:
    """Returns the share of the variance between trials that each setting explains (fANOVA).

    Raises:
        MissingResult: too few trials differ.
    """
    if not summary.get("importances"):
        raise MissingResult(f"too few trials of {summary['name']} to tell what matters: set more trials, and --resume")
    return pd.DataFrame(
        {"explains, %": {short(key): 100 * share for key, share in summary["importances"].items()}}
    ).sort_values("explains, %", ascending=False)
