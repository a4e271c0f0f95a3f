"""Tables of the H2O-Danube3 report beside this project's measurements. Columns name the source and the model.

The report's numbers: H2O-Danube3 Technical Report, arXiv 2407.09276.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from lightning_danube.model import PRESETS
from lightning_danube.pretraining.curriculum import tokens_of_stages
from lightning_danube.reports.figures import COLOURS, FAINT, INK, legend, new_figure
from lightning_danube.reports.runs import PAPER_WEB_SHARES, committed_result
from lightning_danube.yaml_files import read_config

PAPER, HERE = "the paper's", "here"
SHAPES = {
    "danube3-500m": {
        "layers": 16,
        "hidden size": 1536,
        "intermediate size": 4096,
        "query heads": 16,
        "key-value heads": 8,
        "head size": 96,
        "vocabulary": 32_000,
        "context": 8192,
        "parameters": 513_590_784,
    },
    "danube3-4b": {
        "layers": 24,
        "hidden size": 3840,
        "intermediate size": 10_240,
        "query heads": 32,
        "key-value heads": 8,
        "head size": 120,
        "vocabulary": 32_000,
        "context": 8192,
        "parameters": 3_961_839_360,
    },
}
"""Table 1. Parameters are counted in the published weights, because the table rounds them."""
STAGE_TOKENS = {"danube3-500m": (2.8e12, 1.15e12, 0.05e12), "danube3-4b": (4.6e12, 1.35e12, 0.05e12)}
PERPLEXITY = {
    "Danube3 4B": {
        "F16": 6.17,
        "Q8_0": 6.17,
        "Q6_K": 6.20,
        "Q5_K_M": 6.24,
        "Q4_K_M": 6.37,
        "Q3_K_M": 6.99,
        "Q2_K": 9.42,
    },
    "Danube3 500M": {"F16": 9.46, "Q8_0": 9.46, "Q6_K": 9.46, "Q5_K_M": 9.55, "Q4_K_M": 9.96},
}
"""Perplexity on WikiText-2, measured with llama.cpp."""
CLASSIFICATION = {
    "Danube3 500M": {"arXiv": 0.863, "IMDB": 0.959, "patent": 0.708, "scientific": 0.846},
    "Danube3 4B": {"arXiv": 0.873, "IMDB": 0.971, "patent": 0.727, "scientific": 0.872},
}
"""Accuracy after fine-tuning with LoRA."""


def shapes() -> pd.DataFrame:
    """Returns Table 1 beside the presets, whose parameters are counted from the shape."""
    columns: dict[tuple[str, str], Mapping[str, float]] = {}
    for name, published in SHAPES.items():
        config = PRESETS[name]
        columns[name, PAPER] = published
        columns[name, f"preset {HERE}"] = {
            "layers": config.num_hidden_layers,
            "hidden size": config.hidden_size,
            "intermediate size": config.intermediate_size,
            "query heads": config.num_attention_heads,
            "key-value heads": config.num_key_value_heads,
            "head size": config.head_dim or 0,
            "vocabulary": config.vocab_size,
            "context": config.max_position_embeddings,
            "parameters": config.parameters,
        }
    return pd.DataFrame(columns)


def stages() -> pd.DataFrame:
    """Returns the three stages: billions of tokens and web shares in the report and in this project's configs."""
    columns: dict[tuple[str, str], Sequence[float]] = {}
    for name, tokens in STAGE_TOKENS.items():
        data = read_config(f"pretrain/{name}")["data"]["init_args"]
        columns[name, f"B tokens, {PAPER}"] = [count / 1e9 for count in tokens]
        columns[name, f"B tokens, config {HERE}"] = [count / 1e9 for count in tokens_of_stages(data)]
        columns[name, f"web %, {PAPER}"] = [100 * share for share in PAPER_WEB_SHARES]
        columns[name, f"web %, config {HERE}"] = [
            100 * stage["mix"]["web"] / sum(stage["mix"].values()) for stage in data["stages"]
        ]
    return pd.DataFrame(columns, index=pd.Index([1, 2, 3], name="stage"))


def academic(file: str = "evaluation-smollm2-2026-11-25.parquet") -> pd.DataFrame:
    """Returns academic benchmarks in percent: the report's values, and those measured here with 95 % intervals."""
    frame = pd.read_parquet(committed_result(file))
    frame = frame[frame["table"] == "academic"]
    ours = frame[frame["measured"] & frame["value"].notna()].set_index("title")
    stated = frame[~frame["measured"]]
    values = 100 * stated.pivot(index="title", columns="model", values="value").loc[list(ours.index)]
    columns = {("", "setting"): ours["setting"]}
    columns |= {("stated in the paper", model): values[model] for model in _order(stated)}
    here = f"measured {HERE}: {ours['model'].iloc[0]}"
    columns |= {
        (here, "score"): 100 * ours["value"],
        (here, "low"): 100 * ours["low"],
        (here, "high"): 100 * ours["high"],
        (here, "questions"): ours["n"].astype(int),
    }
    return pd.DataFrame(columns).rename_axis(None)


def _order(stated: pd.DataFrame) -> list[str]:
    return list(dict.fromkeys(stated["model"]))


def academic_scores(file: str = "evaluation-smollm2-2026-11-25.parquet") -> Figure:
    """Draws academic benchmarks: hollow for the report's values of its two models, filled for values measured here."""
    scores = academic(file)
    scores.columns = scores.columns.droplevel(0)
    titles = list(scores.index)
    rows = -np.arange(len(titles))
    figure, (ax,) = new_figure(0.9 + 0.36 * len(titles))
    handles = []
    for model, colour, mark in (("Danube3 4B", COLOURS["web"], "D"), ("Danube3 500M", COLOURS["wiki"], "s")):
        handles += ax.plot(
            scores[model], rows, mark, color=colour, markerfacecolor="none", markersize=7, label=f"{model}, the paper's"
        )
    for row, title in zip(rows, titles, strict=True):
        ax.plot(scores.loc[title, ["low", "high"]].astype(float), [row, row], color=COLOURS["instruct"], linewidth=2)
    handles += ax.plot(
        scores["score"], rows, "o", color=COLOURS["instruct"], markersize=6,
        label="SmolLM2 135M, here, with its 95 % interval",
    )  # fmt: skip
    ax.set_yticks(rows, titles)
    ax.set_xlim(0, 100)
    ax.set_xlabel("score, %")
    legend(figure, handles, "Academic benchmarks")
    return figure


def quantized_perplexity() -> pd.DataFrame:
    """Returns by llama.cpp type: perplexity, its rise over F16, and bits/weight.

    Covers the report's models and two measured here. For the report's models, bits/weight are computed from the
    file size and the number of parameters.
    """
    sizes = pd.read_parquet(committed_result("gguf-sizes-2026-11-25.parquet"))
    columns: dict[tuple[str, str], pd.Series] = {}
    for model, preset in (("Danube3 4B", "danube3-4b"), ("Danube3 500M", "danube3-500m")):
        perplexity = pd.Series(PERPLEXITY[model])
        published = sizes[sizes["model"] == preset].set_index("type")["published_gigabytes"]
        columns |= _rises(f"{model}, {PAPER}", perplexity, 8e9 * published / PRESETS[preset].parameters)
    for model, file in (
        ("SmolLM2 135M", "quantization-smollm2-2026-11-25.parquet"),
        ("21M of this project", "quantization-laptop-2026-11-25.parquet"),
    ):
        measured = pd.read_parquet(committed_result(file)).set_index("level")
        measured.index = measured.index.str.removeprefix("gguf:")
        columns |= _rises(f"{model}, {HERE}", measured["perplexity"], measured["bits_per_weight"])
    return pd.DataFrame(columns).reindex(list(PERPLEXITY["Danube3 4B"]))


def _rises(model: str, perplexity: pd.Series, bits: pd.Series) -> dict[tuple[str, str], pd.Series]:
    return {
        (model, "perplexity"): perplexity,
        (model, "rise, %"): 100 * (perplexity / perplexity["F16"] - 1),
        (model, "bits"): bits,
    }


def perplexity_by_bits() -> Figure:
    """Draws the cost of fewer bits for the report's models (hollow) and two here (filled). Models and texts differ."""
    table = quantized_perplexity()
    figure, (ax,) = new_figure(3.8)
    handles = []
    marks = (("web", "D"), ("wiki", "s"), ("instruct", "o"), ("code", "^"))
    for model, (colour, mark) in zip(dict.fromkeys(table.columns.get_level_values(0)), marks, strict=True):
        ours = table[model].drop(index="F16")
        face = "white" if model.endswith(PAPER) else COLOURS[colour]
        handles += ax.plot(
            ours["bits"], ours["rise, %"], f"{mark}-", color=COLOURS[colour], markerfacecolor=face, linewidth=1.4,
            label=model,
        )  # fmt: skip
    ours = table[f"Danube3 4B, {PAPER}"]
    for kind in ours.index.drop("F16"):
        left = kind == "Q4_K_M"  # a point of the 500M model is on its right
        ax.annotate(
            kind, (ours.loc[kind, "bits"], ours.loc[kind, "rise, %"]), (-5, -12) if left else (5, 5),
            textcoords="offset points", ha="right" if left else "left", fontsize=8.5, color=INK,
        )  # fmt: skip
    ax.axhline(0, color=FAINT, linewidth=1)
    ax.set_yscale("symlog", linthresh=1)  # linear below 1 %
    ax.set_yticks([0, 1, 3, 10, 30], ["0", "1", "3", "10", "30"])
    ax.yaxis.set_minor_locator(NullLocator())
    ax.set_ylim(-0.2, 100)
    ax.set(xlabel="bits/weight, in the whole file", ylabel="perplexity over F16's, %")
    legend(figure, handles, "Perplexity of llama.cpp's types; those of the 4B have their names")
    return figure


def quantized_sizes() -> pd.DataFrame:
    """Returns GB of the published files, and the size that llama.cpp plans for equal shapes here."""
    sizes = pd.read_parquet(committed_result("gguf-sizes-2026-11-25.parquet"))
    columns = {}
    for model, ours in sizes.groupby("model", sort=False):
        by_type = ours.set_index("type")
        columns[model, f"GB, {PAPER}"] = by_type["published_gigabytes"]
        columns[model, f"GB, planned {HERE}"] = by_type["gigabytes"]
        columns[model, f"bits, planned {HERE}"] = by_type["bits_per_weight"]
    return pd.DataFrame(columns).rename_axis(None)


def classification() -> pd.DataFrame:
    """Returns accuracy after LoRA fine-tuning, from the report alone: its four data sets come from a hub."""
    return pd.DataFrame(CLASSIFICATION).rename(columns=lambda name: f"{name}, {PAPER}")
