"""The tables of the H2O-Danube3 report (arXiv 2407.09276) beside what was measured here; columns say which is which."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd

from lightning_danube.model import PRESETS
from lightning_danube.reports.runs import PAPER_WEB_SHARES
from lightning_danube.reports.studies import ROOT, markdown_tables

RESULTS = ROOT / "benchmarks" / "results"
PUBLISHED_PARAMETERS = {"danube3-500m": 513_590_784, "danube3-4b": 3_961_839_360}
"""Of the weights on the hub, which the report rounds."""
STAGE_TOKENS = {"danube3-500m": (2.8e12, 1.15e12, 0.05e12), "danube3-4b": (4.6e12, 1.35e12, 0.05e12)}
PERPLEXITY = {
    # WikiText-2, llama.cpp: type → 4B, 500M
    "F16": (6.17, 9.46),
    "Q8_0": (6.17, 9.46),
    "Q6_K": (6.20, 9.46),
    "Q5_K_M": (6.24, 9.55),
    "Q4_K_M": (6.37, 9.96),
    "Q3_K_M": (6.99, np.nan),
    "Q2_K": (9.42, np.nan),
}
CLASSIFICATION = {
    # accuracy: task → Danube3 500M, Danube3 4B
    "arXiv": (0.863, 0.873),
    "IMDB": (0.959, 0.971),
    "patent": (0.708, 0.727),
    "scientific": (0.846, 0.872),
}


def shapes() -> pd.DataFrame:
    """Table 1: the two decoders as they are built here, with the parameters of the published weights."""
    rows = {}
    for name, config in PRESETS.items():
        rows[name] = {
            "layers": config.num_hidden_layers,
            "hidden size": config.hidden_size,
            "intermediate size": config.intermediate_size,
            "query heads": config.num_attention_heads,
            "key-value heads": config.num_key_value_heads,
            "head size": config.hidden_size // config.num_attention_heads,
            "parameters, built here": config.parameters,
            "parameters, published": PUBLISHED_PARAMETERS[name],
        }
    return pd.DataFrame(rows)


def stages() -> pd.DataFrame:
    """The three stages: tokens and web shares of the report, and the tokens of the configs here."""
    from lightning_danube.config_errors import read_config
    from lightning_danube.durations import parse_tokens

    frame = pd.DataFrame({"web %, paper": [100 * share for share in PAPER_WEB_SHARES]}, index=[1, 2, 3])
    for name, tokens in STAGE_TOKENS.items():
        config = read_config(str(ROOT / "configs" / "pretrain" / f"{name}.yaml"))["data"]["init_args"]["stages"]
        frame[f"{name}: tokens, paper"] = [f"{count / 1e12:g}T" for count in tokens]
        frame[f"{name}: tokens, config"] = [f"{parse_tokens(stage['tokens']) / 1e12:g}T" for stage in config]
        frame[f"{name}: web %, config"] = [100 * stage["mix"]["web"] / sum(stage["mix"].values()) for stage in config]
    return frame.rename_axis("stage")


def academic(file: str = "evaluation-smollm2-2026-11-25.parquet") -> pd.DataFrame:
    """Academic benchmarks in percent: the report's models, and what was measured here with its 95 % interval."""
    frame = pd.read_parquet(RESULTS / file)
    frame = frame[(frame["table"] == "academic")]
    ours = frame[frame["measured"] & frame["value"].notna()].set_index("title")
    table = frame[~frame["measured"]].pivot(index="title", columns="model", values="value") * 100
    names = json.loads((ROOT / "lightning_danube/tasks/paper_scores.json").read_text("utf-8"))["models"]
    table = table.loc[list(ours.index), names].rename(columns=lambda name: f"{name}, paper")
    model = ours["model"].iloc[0]
    table.insert(0, "setting", ours["setting"])
    table[f"{model}, here"] = 100 * ours["value"]
    table["low"], table["high"], table["questions"] = 100 * ours["low"], 100 * ours["high"], ours["n"]
    return table.rename_axis(None)


def quantized_perplexity(file: str = "quantization-smollm2-2026-11-25.parquet") -> pd.DataFrame:
    """WikiText-2 by llama.cpp type: perplexities of the report, of SmolLM2 here, and how much each rises over F16."""
    measured = pd.read_parquet(RESULTS / file).set_index("level")
    rows = {}
    full = measured.loc["gguf:F16", "perplexity"]
    for kind, (large, small) in PERPLEXITY.items():
        here = measured["perplexity"].get(f"gguf:{kind}", np.nan)
        rows[kind] = {
            "4B, paper": large,
            "rise, %": 100 * (large / PERPLEXITY["F16"][0] - 1),
            "500M, paper": small,
            "rise, % ": 100 * (small / PERPLEXITY["F16"][1] - 1),
            "SmolLM2 135M, here": here,
            "rise, %  ": 100 * (here / full - 1),
            "bits a weight, here": measured["bits_per_weight"].get(f"gguf:{kind}", np.nan),
        }
    return pd.DataFrame.from_dict(rows, orient="index")


def quantized_sizes(file: str = "benchmarks/results/gguf-sizes-2026-11-25.md") -> pd.DataFrame:
    """GB of the published files, and what llama.cpp makes of the same shapes here."""
    return markdown_tables(file)[0].set_index(["model", "type"])


def classification() -> pd.DataFrame:
    """Accuracy after LoRA fine-tuning, of the report alone: its four data sets need the hub."""
    return pd.DataFrame(CLASSIFICATION, index=["Danube3 500M, paper", "Danube3 4B, paper"]).T


__all__ = [
    "academic",
    "classification",
    "quantized_perplexity",
    "quantized_sizes",
    "shapes",
    "stages",
]
