"""A run as reports read it, made by hand: no model is trained for it."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from lightning_danube.reports.runs import RecordedRun

STEP = 100
"""Tokens of a step."""


@pytest.fixture
def recorded() -> RecordedRun:
    """Stages of 4 and 2 steps, of two sources; all curves have a value at each step."""
    stages: list[dict[str, Any]] = [
        {"name": "one", "tokens": 400, "mix": {"web": 3, "wiki": 1}},
        {"name": "two", "tokens": "0.2K", "mix": {"web": 20, "wiki": 80}},
    ]
    web, wiki = np.array([90, 180, 240, 300, 320, 330]), np.array([10, 20, 60, 100, 180, 270])
    steps = np.arange(1, 7)  # of 100 tokens
    curves = {
        "loss/train": 5.0 - 0.5 * steps,
        "mix/stage": [1.0, 1.0, 1.0, 2.0, 2.0, 2.0],
        "optimizer/learning_rate": 0.01 * steps,
        "optimizer/gradient_norm": 1.0 / steps,
        "throughput/tokens_per_second": 50.0 + steps,
        "throughput/mfu": 0.3 + 0.01 * steps,
        "tokens_seen/web": web,
        "tokens_seen/wiki": wiki,
    }
    frame = pd.DataFrame({tag: pd.Series(values, 100 * steps, float) for tag, values in curves.items()})
    frame.loc[0, "mix/stage"] = 1.0  # at the start
    frame = frame.sort_index().rename_axis("tokens")
    summary = {
        "tokens": 600, "steps": 6, "parameters": 2_100_000, "seconds": 90.0, "tokens_per_second": 12_345.6,
        "unigram_loss": {"web": 9.0, "wiki": 8.0}, "val_loss": {"web": 2.0, "wiki": 3.0},
        "stages": [
            {"name": "one", "tokens": 400, "mix": {"web": 0.75, "wiki": 0.25}, "val_loss": {"web": 4.0, "wiki": 5.0}},
            {"name": "two", "tokens": 200, "mix": {"web": 0.15, "wiki": 0.85}, "val_loss": {"web": 2.0, "wiki": 3.0}},
        ],
    }  # fmt: skip
    samples = {"class_path": "lightning_danube.callbacks.TextSamples", "init_args": {"prompts": ["The river"]}}
    config = {
        "data": {"init_args": {"sources": {"web": {}, "wiki": {}}, "batch_tokens": STEP, "stages": stages}},
        "model": {
            "class_path": "lightning_danube.pretraining.Pretraining",
            "init_args": {"decoder": {"num_hidden_layers": 2, "hidden_size": 32}},
        },
        "trainer": {
            "accelerator": "cpu", "precision": "32-true", "gradient_clip_val": 0.75, "callbacks": [samples],
        },
    }  # fmt: skip
    texts = {
        "samples/1_The_river": {400: "    The river is", 600: "    The river was\n      long"},
        "run/plan": {0: "    web, wiki"},
    }
    return RecordedRun(Path("runs/tiny/version_0"), config, summary, frame, texts)
