"""What studies found, read from their files and drawn."""

import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from scipy import stats

from lightning_danube.options import parse_tokens
from lightning_danube.reports import scaling, studies
from lightning_danube.reports.runs import MissingResult
from lightning_danube.yaml_files import read_config

ORIGIN = {"command": "python -m x", "commit": "abcdef123", "machine": "one, 2 cores"}
RATE, RANK = "model.init_args.learning_rate.peak", "model.init_args.lora.rank"


def made(tmp_path: Path, rows: list[dict[str, Any]], name: str = "heads") -> Path:
    directory = tmp_path / "runs" / "studies" / name
    directory.mkdir(parents=True)
    pd.DataFrame([{"study": name, **ORIGIN, **row} for row in rows]).to_parquet(directory / "study.parquet")
    return tmp_path / "runs"


@pytest.fixture
def heads(tmp_path: Path) -> pd.DataFrame:
    rows = [
        {"variant": variant, "seed": seed, "state": "complete", "loss": 3 + seed + better + noise * seed**2}
        for variant, better, noise in (("mha", 0.0, 0.0), ("gqa", -0.5, 0.001), ("mqa", 0.0, 0.1))
        for seed in (1, 2, 3)
    ]
    rows.append({"variant": "mqa", "seed": 4, "state": "failed", "loss": float("nan")})
    return studies.read_study(made(tmp_path, rows), "heads")


def test_complete_runs_are_read_with_their_origin(heads: pd.DataFrame) -> None:
    assert len(heads) == 9 and heads.attrs["from"].endswith("runs/studies/heads")
    origin = studies.provenance(heads).loc["heads"]
    assert (origin["runs"], origin["seeds"], origin["commits"]) == ("9 of 10", 3, "abcdef1")
    assert origin["command"] == "python -m x" and origin["machine"] == "one, 2 cores"
    assert studies.means(heads, ["loss"]).loc["mha"].tolist() == [3, 5.0]


@pytest.mark.medium
def test_differences_are_paired_and_judged_together(heads: pd.DataFrame) -> None:
    found = studies.paired_differences(heads, ["loss"], "mha")
    assert list(found.index) == [("loss", "gqa"), ("loss", "mqa")]
    gqa, mqa = found.loc[("loss", "gqa")], found.loc[("loss", "mqa")]
    assert gqa["difference"] == pytest.approx(-0.5 + 14 / 3000) and gqa["low"] < gqa["difference"] < gqa["high"]
    assert (gqa["detected"], mqa["detected"]) == ("yes", "") and mqa["low"] < 0 < mqa["high"]
    said = studies.verdicts(heads, "loss", "mha").splitlines()
    assert said[0].startswith("- gqa is better than mha: -0.495") and said[1].startswith("- no difference is detected")
    figure = studies.forest(heads, ["loss"], "mha", "nats")
    figure.draw_without_rendering()
    (ax,) = figure.axes
    assert [label.get_text() for label in ax.get_yticklabels()] == ["gqa", "mqa"]
    faces = [line.get_markerfacecolor() for line in ax.lines if line.get_marker() == "o"]
    assert faces[0] != "white" and faces[1] == "white"
    other = heads.assign(other=10 * heads["loss"])
    first, second = studies.forest(other, ["loss", "other"], "mha", "nats/token").axes
    assert first.get_xlim() == second.get_xlim()
    assert first.figure.get_supxlabel().endswith("filled: p < 0.05 after Holm; one scale")


def test_what_is_missing_names_its_command(tmp_path: Path) -> None:
    with pytest.raises(MissingResult, match=r"no result of the study heads: .*study --config studies/heads`"):
        studies.read_study(tmp_path, "heads")
    with pytest.raises(MissingResult, match="no result of the study heads"):
        studies.read_summary(tmp_path, "heads")
    runs = made(tmp_path, [{"variant": "mha", "seed": 1, "state": "running", "loss": 1.0}])
    with pytest.raises(MissingResult, match=r"no run of heads came to its end: .* --resume` continues"):
        studies.read_study(runs, "heads")
    with pytest.raises(MissingResult, match="too few trials of lora"):
        studies.importances({"name": "lora", "importances": {}})


def test_a_study_run_here_comes_before_the_one_in_the_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    committed = tmp_path / "benchmarks" / "results" / "studies"
    committed.mkdir(parents=True)
    (tmp_path / "notebooks").mkdir()
    pd.DataFrame([{"study": "heads", "variant": "mha", "seed": 1, "state": "complete", "loss": 1.0}]).to_parquet(
        committed / "heads.parquet"
    )
    (committed / "heads.json").write_text(json.dumps({"name": "heads"}))
    for folder in (tmp_path, tmp_path / "notebooks"):  # Jupyter starts a notebook in its own folder
        monkeypatch.chdir(folder)
        found = studies.read_study(tmp_path / "runs", "heads")
        assert found.attrs["from"] == "benchmarks/results/studies/heads.parquet"
    assert studies.read_summary(tmp_path / "runs", "heads") == {"name": "heads"}
    runs = made(tmp_path, [{"variant": "mha", "seed": 1, "state": "complete", "loss": 2.0}])
    assert studies.read_study(runs, "heads")["loss"].tolist() == [2.0]


def test_a_search_as_a_map(tmp_path: Path) -> None:
    rows = [
        {
            "trial": trial,
            "seed": seed,
            "accuracy": 0.5 + 0.1 * x + 0.01 * y + 0.001 * seed,
            RANK: rank,
            RATE: rate,
            "error": None,
        }
        for trial, (x, y, rank, rate) in enumerate((x, y, (4, 16)[x], (1e-3, 1e-2)[y]) for x in (0, 1) for y in (0, 1))
        for seed in (1, 2, 3)
    ]
    study = studies.read_study(made(tmp_path, rows), "heads")
    marginals = studies.marginals(study, "accuracy")
    assert marginals.loc[("rank", 16), "accuracy"] - marginals.loc[("rank", 4), "accuracy"] == pytest.approx(0.1)
    # Student's 4.30 for two degrees of freedom, times 0.001 / √3.
    assert marginals.loc[("rank", 16), "±"] == pytest.approx(4.3027 * 0.001 / 3**0.5, rel=1e-3)
    best = studies.best(study, "accuracy", count=2)
    assert best.index.tolist() == [3, 2] and best.loc[3, ["rank", "peak"]].tolist() == [16, 0.01]
    ax, _ = studies.heat_map(study, "accuracy").axes
    assert {text.get_text() for text in ax.texts} >= {"0.502\n± 0.002", "0.612\n± 0.002"}
    assert len(studies.tried(study, "accuracy").axes) == 2
    rank, _ = studies.marginal_means(study, "accuracy").axes
    assert rank.lines[0].get_ydata() == pytest.approx(list(marginals.loc["rank", "accuracy"]))
    partial = study[study["trial"] < 3].rename(columns=str)
    assert len(studies.heat_map(partial, "accuracy").axes[0].texts) == 3
    importances = studies.importances({"importances": {RATE: 0.25, RANK: 0.75}})
    assert importances["explains, %"].to_dict() == {"rank": 75.0, "peak": 25.0}


@pytest.mark.parametrize("name", ["curriculum", "curriculum-paper", "world"])
def test_mixes_are_drawn_to_the_end_of_the_run(name: str) -> None:
    figure = studies.mixes(f"studies/{name}")
    tops = [
        max(bar.get_window_extent().transformed(ax.transData.inverted()).y1 for bar in ax.patches) for ax in figure.axes
    ]
    assert tops == pytest.approx([1.0] * len(tops)) and len(tops) >= 3


def test_a_ladder_is_drawn_with_its_law(tmp_path: Path) -> None:
    rows = [
        {
            "variant": f"{size:.0f}-{tokens:.0f}", "seed": 1, "state": "complete", "tokens": tokens,
            "parameters_without_embedding": size, "val_loss.web": 1.5 + 300 * size**-0.3 + 300 * tokens**-0.3,
        }
        for size in (2e6, 4e6, 8e6) for tokens in (1e5, 1e6, 1e7)
    ]  # fmt: skip
    runs = made(tmp_path, rows)
    study, law = scaling.read_ladder(str(runs), "heads", "val_loss.web")
    frame = scaling.ladder(study, "val_loss.web")
    assert frame["FLOPs"].iloc[0] == 6 * 2e6 * 1e5 and frame["FLOPs"].is_monotonic_increasing
    points = scaling.points(study, "val_loss.web")
    assert scaling.coefficients(law).loc["alpha", "value"] == pytest.approx(0.3, rel=0.02)
    said = scaling.extrapolations(law, points)
    assert said.iloc[0]["predicted"] == pytest.approx(said.iloc[0]["measured"], rel=1e-3)
    assert list(said.index[1:]) == ["danube3-500m, 4e+12 tokens", "danube3-4b, 6e+12 tokens"]
    study.loc[study["tokens"] == 1e5, "val_loss.web"] += 0.25
    figure = scaling.loss_by_compute(study, "val_loss.web", law)
    assert len(figure.axes[0].lines) == 6
    title = figure.legends[0].get_title().get_text()
    assert re.search(r"off by up to 0\.25 nats/token at 100,000 tokens, 0\.00 at 10,000,000$", title)
    errors = scaling.errors(study, "val_loss.web", law)
    assert errors.index.tolist() == [1e5, 1e6, 1e7] and errors["runs"].tolist() == [3, 3, 3]
    assert errors["largest, nats/token"].tolist() == pytest.approx([0.25, 0, 0], abs=2e-3)
    assert errors["mean, nats/token"].tolist() == pytest.approx([0.25, 0, 0], abs=2e-3)
    assert len(scaling.far_away(study, "val_loss.web", law).axes[0].lines) == 3
    few = made(tmp_path, rows[:4], "few")
    with pytest.raises(MissingResult, match=r"needs runs of at least 3 sizes.*studies/few --resume` continues"):
        scaling.read_ladder(str(few), "few", "val_loss.web")


def test_the_most_important_setting_comes_first() -> None:
    found = studies.importances({"importances": {RATE: 0.25, RANK: 0.6, "x.init_args.alpha": 0.15}})
    assert found["explains, %"].index.tolist() == ["rank", "peak", "alpha"]
    assert found["explains, %"].tolist() == pytest.approx([60.0, 25.0, 15.0])


def test_stages_of_a_mixture_follow_each_other() -> None:
    variants = read_config("studies/curriculum")["variants"]
    for ax, values in zip(studies.mixes("studies/curriculum").axes, variants.values(), strict=True):
        stages = sorted({(bar.get_x(), bar.get_width()) for bar in ax.patches if bar.get_width()})  # type: ignore[attr-defined]
        lengths = [parse_tokens(stage["tokens"]) for stage in values["data.init_args.stages"]]
        assert [width for _, width in stages] == lengths
        assert [begin for begin, _ in stages] == [sum(lengths[:place]) for place in range(len(lengths))]


def test_ends_of_a_difference_are_students(heads: pd.DataFrame) -> None:
    found = studies.paired_differences(heads, ["loss"], "mha").loc[("loss", "mqa")]
    low, high = stats.ttest_1samp([0.1, 0.4, 0.9], 0.0).confidence_interval(0.95)
    assert (found["low"], found["high"]) == pytest.approx((low, high))
