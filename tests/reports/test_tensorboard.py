"""The tour of a run's TensorBoard data knows every tag."""

from pathlib import Path

import pytest

from lightning_danube.reports import runs, tensorboard
from lightning_danube.reports.runs import MissingResult


def test_every_tag_is_explained_and_has_its_logger(tiny_run: Path) -> None:
    run = runs.read_run(tiny_run)
    found = tensorboard.tags(run)
    assert set(found.index) == {*run.curves, *run.texts}
    assert not found["says"].str.contains("not described").any()
    assert found.loc["loss/train", "logged by"] == "lightning_danube.pretraining.Pretraining"
    assert found.loc["mix/stage", "logged by"] == "lightning_danube.callbacks.CurriculumStages"
    assert found.loc["mix/web", "logged by"] == "lightning_danube.callbacks.TokenLedger"
    assert found.loc["run/plan", ["points", "last"]].tolist() == [1, "text"]
    assert found.loc["loss/train", "points"] == 26


def test_a_group_has_a_panel_a_tag(tiny_run: Path) -> None:
    run = runs.read_run(tiny_run)
    figure = tensorboard.group(run, "loss")
    figure.draw_without_rendering()
    shown = [ax for ax in figure.axes if ax.get_visible()]
    assert {ax.get_title() for ax in shown} == {"loss/train", "loss/held_out_web", "loss/held_out_wiki"}
    assert "web" in tensorboard.plan(run)
    with pytest.raises(MissingResult, match=r"logged no recall/…: name lightning_danube\.callbacks\.FactRecall"):
        tensorboard.group(run, "recall")


def test_the_last_value_of_a_tag_is_that_of_the_last_step(recorded: runs.RecordedRun) -> None:
    found = tensorboard.tags(recorded)
    assert found.loc["loss/train", ["points", "last"]].tolist() == [6, "2"]
    assert found.loc["tokens_seen/wiki", "last"] == "270" and found.loc["samples/1_The_river", "last"] == "text"
    recorded.curves["tokens_seen/wiki"] *= 100
    assert tensorboard.tags(recorded).loc["tokens_seen/wiki", "last"] == "27,000"
