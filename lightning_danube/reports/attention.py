"""Grouped-query attention: what fewer key-value heads cost in loss, and what they save in cache and in time."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from lightning_danube.model import DecoderConfig
from lightning_danube.reports.figures import FAINT, INK, legend, new_figure
from lightning_danube.reports.runs import committed_result
from lightning_danube.reports.studies import MARKS, paired_differences
from lightning_danube.yaml_files import read_config

SPEEDS = "grouped-queries-2026-11-28.parquet"
DECODER = "model.init_args.decoder."
NAMES = {16: "16 (multi-head)", 8: "8 (the paper's)", 1: "1 (multi-query)"}


def decoders(config: str) -> pd.DataFrame:
    """Returns the decoder of each variant of a study: heads, feed-forward width, parameters, and bytes of bfloat16
    cache per token.

    Args:
        config: the study's name, such as studies/attention, or its file.
    """
    study = read_config(config)
    base = read_config(study["base"])["model"]["init_args"]["decoder"]
    rows = {}
    for variant, values in study["variants"].items():
        changed = {
            key.removeprefix(DECODER): value
            for key, value in {**study["set"], **values}.items()
            if key.startswith(DECODER)
        }
        decoder = DecoderConfig(**{**base, **changed})
        rows[variant] = {
            "query heads": decoder.num_attention_heads,
            "key-value heads": decoder.num_key_value_heads,
            "feed-forward width": decoder.intermediate_size,
            "parameters": decoder.parameters,
            "cache, bytes/token": decoder.cache_bytes(1),
        }
    return pd.DataFrame.from_dict(rows, orient="index")


def loss_by_cache(study: pd.DataFrame, shapes: pd.DataFrame, metric: str, baseline: str) -> Figure:
    """Draws the difference in loss from the baseline, with its 95 % interval, over the cache size per token."""
    found = paired_differences(study, [metric], baseline).loc[metric]
    figure, (ax,) = new_figure(3.2)
    cache = shapes["cache, bytes/token"]
    ax.axhline(0, color=FAINT, linewidth=1, linestyle=(0, (4, 3)))
    ax.plot(cache[baseline], 0, "s", color=INK, markersize=7)
    ax.annotate(f"{baseline} (compared with)", (cache[baseline], 0), (-8, 8), textcoords="offset points", ha="right")
    for variant, one in found.iterrows():
        ink = INK if one["detected"] else FAINT
        ax.plot([cache[variant]] * 2, [one["low"], one["high"]], color=ink, linewidth=2)
        ax.plot(
            cache[variant], one["difference"], "o", color=ink, markersize=7,
            markerfacecolor=ink if one["detected"] else "white",
        )  # fmt: skip
        ax.annotate(str(variant), (cache[variant], one["difference"]), (9, -3), textcoords="offset points")
    ax.set_xscale("log", base=2)
    ax.set_xlim(cache.min() / 1.3, cache.max() * 1.3)
    ax.set_xticks(sorted(cache), [f"{size:,}" for size in sorted(cache)])
    ax.set(xlabel="bytes of keys and values that a token leaves in the cache (bfloat16)")
    ax.set_ylabel(f"{metric}, difference\nfrom {baseline}, nats/token")
    return figure


def read_speeds() -> pd.DataFrame:
    """Reads the committed measurement: a row per context length and number of key-value heads."""
    return pd.read_parquet(committed_result(SPEEDS))


def speed_table(speeds: pd.DataFrame) -> pd.DataFrame:
    """Returns a row per context length: MiB of cache, prefill and decode speed, decode speed-up over the most heads."""
    by_heads = speeds.assign(MiB=speeds["cache_bytes"] / 2**20).pivot(
        index="context",
        columns="key_value_heads",
        values=["MiB", "prefill_tokens_per_second", "decode_tokens_per_second", "decode_ratio"],
    )
    most = int(speeds["key_value_heads"].max())
    names = {
        "MiB": "cache, MiB",
        "prefill_tokens_per_second": "prefill, tokens/s",
        "decode_tokens_per_second": "decode, tokens/s",
        "decode_ratio": f"decode, × {most} heads",
    }
    ordered = by_heads.sort_index(axis=1, level=1, ascending=False, sort_remaining=False)
    return ordered[list(names)].rename(columns=names, level=0).rename_axis(columns=[None, "key-value heads"])


def speed(speeds: pd.DataFrame) -> Figure:
    """Draws cache size, prefill and decoding by context length, a line per number of key-value heads.

    Bars span the lowest to the highest round. The title says if a measurement kept only the medians.
    """
    figure, axes = new_figure(3.2, columns=3)
    handles = []
    panels = (
        ("cache, MiB", speeds["cache_bytes"] / 2**20, ""),
        ("prefill, tokens/s", speeds["prefill_tokens_per_second"], "prefill_tokens_per_second"),
        ("decode, tokens/s", speeds["decode_tokens_per_second"], "decode_tokens_per_second"),
    )
    contexts = sorted(set(speeds["context"]))
    for ax, (title, values, measured) in zip(axes, panels, strict=True):
        for place, heads in enumerate(dict.fromkeys(speeds["key_value_heads"])):
            ours = speeds["key_value_heads"] == heads
            (drawn,) = ax.plot(
                speeds["context"][ours], values[ours], "o-", color=MARKS[place], markersize=4.5, linewidth=1.6,
                label=NAMES.get(heads, str(heads)),
            )  # fmt: skip
            if ax is axes[0]:
                handles.append(drawn)
            if f"{measured}_low" in speeds:
                ends = (speeds[f"{measured}_{end}"][ours] for end in ("low", "high"))
                ax.vlines(speeds["context"][ours], *ends, color=MARKS[place], linewidth=1.2)
        ax.set_xscale("log", base=2)
        ax.set_xticks(contexts, [f"{context:,}" for context in contexts], rotation=35, ha="right")
        ax.xaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        ax.set_ylim(bottom=0)
        ax.set_title(title, fontsize=10, color=INK)
        ax.set_xlabel("tokens of context")
    sizes = {f"{count:,}" for count in speeds["parameters"]}
    title = "Key-value heads" + (f", at {sizes.pop()} parameters each" if len(sizes) == 1 else "")
    spread = "bars: lowest to highest" if "decode_tokens_per_second_low" in speeds else "their spread was not kept"
    legend(figure, handles, f"{title}; medians of {int(speeds['rounds'].min())} rounds, {spread}")
    return figure
