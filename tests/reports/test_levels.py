"""What notebooks read of a quantization evaluation."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from lightning_danube.reports import levels
from lightning_danube.reports.runs import MissingResult


def row(level: str, size: float, change: float, **more: Any) -> dict[str, Any]:
    return {
        "level": level,
        "method": level.partition(":")[0],
        "tensor_bytes": size * 2**20,
        "bits_per_weight": size,
        "perplexity": 20 * (1 + change),
        "perplexity_change": change,
        "perplexity_change_low": change - 0.01,
        "perplexity_change_high": change + 0.02,
        "perplexity_change_is_noise": abs(change) < 0.01,
        "divergence": change / 10,
        "same_first": 1 - change,
        "cloze_accuracy": 0.5,
        "prefill_tokens_per_second": 100.0,
        "decode_tokens_per_second": 10.0,
        "peak_memory_bytes": 3 * 2**20,
        "not_measured": None,
        **more,
    }


@pytest.fixture
def evaluation(tmp_path: Path) -> Path:
    directory = tmp_path / "quantization-tiny-test" / "version_0"
    directory.mkdir(parents=True)
    (directory / "config.yaml").write_text("name: quantization-tiny\n")
    rows = [
        row("full", 32, 0.0),
        row("gguf:Q8_0", 8, 0.005),
        row("gguf:F16+cache-q8_0", 16, 0.3),
        row("hqq:4/64", 4, 0.05, prefill_tokens_per_second=None),
    ]
    rows.append(dict.fromkeys(rows[0]) | {"level": "gguf:Q2_K", "method": "gguf", "not_measured": "no llama.cpp"})
    pd.DataFrame(rows).to_parquet(directory / "quantization.parquet")
    return directory


def test_levels_that_were_measured(evaluation: Path) -> None:
    found = levels.read_levels(evaluation.parent.parent, "quantization-tiny")
    quality = levels.quality(found)
    assert list(quality.index) == ["full", "gguf:Q8_0", "gguf:F16+cache-q8_0", "hqq:4/64"]
    assert quality.loc["hqq:4/64", "change, %"] == pytest.approx(5)
    assert list(quality["noise"]) == ["≈", "≈", "", ""]
    assert list(levels.cost(found).index) == ["full", "gguf:Q8_0", "gguf:F16+cache-q8_0"]


def test_the_picture_has_a_point_for_each_file(evaluation: Path) -> None:
    figure = levels.frontier(levels.read_levels(evaluation.parent.parent, "quantization-tiny"))
    (axes,) = figure.axes
    assert {text.get_text() for text in axes.texts} == {"Q8_0", "4/64"}
    figure.draw_without_rendering()


def test_without_an_evaluation_the_newest_kept_result_is_read(
    evaluation: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frame = pd.read_parquet(evaluation / "quantization.parquet")
    kept = tmp_path / "benchmarks" / "results"
    kept.mkdir(parents=True)
    for day, perplexity in (("2026-01-02", 3.0), ("2026-01-01", 2.0)):
        frame.assign(perplexity=perplexity).to_parquet(kept / f"quantization-small-{day}.parquet")
    monkeypatch.chdir(tmp_path)
    assert set(levels.read_levels("runs", "quantization-small")["perplexity"]) == {3.0}
    with pytest.raises(MissingResult, match="no evaluation under runs/quantization-smal-test"):
        levels.read_levels("runs", "quantization-smal")
    # An evaluation that was run here comes first.
    ours = levels.read_levels(evaluation.parent.parent, "quantization-tiny")
    assert ours["perplexity"].iloc[0] == frame["perplexity"].iloc[0]


def test_what_is_missing_is_said(evaluation: Path) -> None:
    runs = evaluation.parent.parent
    with pytest.raises(
        MissingResult, match=r"no evaluation under .*other-test: .*--config quantization/other` makes one"
    ):
        levels.read_levels(runs, "quantization-other")
    frame = levels.read_levels(runs, "quantization-tiny").assign(prefill_tokens_per_second=None)
    with pytest.raises(MissingResult, match=r"model\.cost: true"):
        levels.cost(frame)
    (evaluation / "quantization.parquet").unlink()
    with pytest.raises(MissingResult, match="did not come to its end"):
        levels.read_levels(runs, "quantization-tiny")


def test_numbers_of_a_level_have_their_units(evaluation: Path) -> None:
    rows = [
        row("full", 32, 0.0, prefill_tokens_per_second=200.0),
        row("hqq:4/64", 4, 0.05, decode_tokens_per_second=20.0, peak_memory_bytes=5 * 2**20),
    ]
    pd.DataFrame(rows).to_parquet(evaluation / "quantization.parquet")
    found = levels.read_levels(evaluation.parent.parent, "quantization-tiny")
    assert levels.quality(found).loc["hqq:4/64"].drop("noise").to_dict() == pytest.approx(
        {
            "MiB": 4.0, "bits/weight": 4.0, "perplexity": 21.0, "change, %": 5.0, "low": 4.0, "high": 7.0,
            "KL, 1e-3 nats": 5.0, "same first, %": 95.0, "cloze, %": 50.0,
        }
    )  # fmt: skip
    cost = levels.cost(found)
    assert cost["prefill, tokens/s"].tolist() == [200.0, 100.0]
    assert cost["decode, tokens/s"].tolist() == [10.0, 20.0] and cost["peak memory, MiB"].tolist() == [3.0, 5.0]
