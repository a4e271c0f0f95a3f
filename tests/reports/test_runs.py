"""What is read from a run's files is what the run wrote, and what is missing is said."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from omegaconf import OmegaConf
from torch.utils.tensorboard import SummaryWriter

from lightning_danube.__main__ import main
from lightning_danube.reports import runs

STAGES = ["foundation", "refinement", "finish"]
ENDS = [12 * 256, 20 * 256, 26 * 256]


@pytest.fixture
def copied_run(tiny_run: Path, tmp_path: Path) -> Path:
    """A run that a test may change."""
    target = tmp_path / "runs" / "tiny" / "version_0"
    shutil.copytree(tiny_run, target, ignore=shutil.ignore_patterns("checkpoints"))
    return target


def test_the_newest_version_that_began_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for version in ("version_2", "version_10", "version_11"):
        (tmp_path / "runs" / "tiny" / version).mkdir(parents=True)
    for version in ("version_2", "version_10"):
        (tmp_path / "runs" / "tiny" / version / "config.yaml").touch()
    assert runs.newest_run(tmp_path / "runs", "tiny").name == "version_10"
    # From the root of the repository, and from the folder of the notebook.
    (tmp_path / "notebooks").mkdir()
    for folder in (tmp_path, tmp_path / "notebooks"):
        monkeypatch.chdir(folder)
        assert runs.newest_run("runs", "tiny").absolute().samefile(tmp_path / "runs" / "tiny" / "version_10")


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("quickstart", "fit --config quickstart --runs {runs}` makes one"),
        ("sft-quickstart", "fit --config sft/quickstart --runs {runs}` makes one"),
        ("other", "fit --config … --name other` makes one"),
    ],
)
def test_a_missing_run_names_the_command_that_makes_it(tmp_path: Path, name: str, command: str) -> None:
    with pytest.raises(
        runs.MissingResult, match=rf"no run under {tmp_path}/{name}: .*{command.format(runs=tmp_path)}"
    ) as caught:
        runs.newest_run(tmp_path, name)
    # A notebook shows one line.
    assert caught.value._render_traceback_() == [f"Missing: {caught.value}"]


def test_another_kind_of_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("data: {class_path: lightning_danube.chat.ChatData, init_args: {}}")
    with pytest.raises(ValueError, match=r"is not a pre-training run: data\.stages is missing"):
        runs.read_run(tmp_path)


def test_stages_lie_where_the_run_changed_them(tiny_run: Path) -> None:
    spans = runs.stage_spans(runs.read_run(tiny_run))
    assert list(spans.index) == STAGES
    assert list(spans["begin"]) == [0, *ENDS[:2]]
    assert list(spans["end"]) == ENDS


def test_curves_run_over_tokens(tiny_run: Path) -> None:
    run = runs.read_run(tiny_run)
    loss = run.curve("loss/train")
    assert list(loss.index) == [256 * step for step in range(1, 27)]
    # TensorBoard keeps float32.
    assert list(run.curve("loss/held_out_web")) == pytest.approx([s["val_loss"]["web"] for s in run.summary["stages"]])


def test_curves_of_a_table_run_over_tokens_too(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("data: {init_args: {batch_tokens: 64}}")
    # A validation writes a row of its own for a step that has one already.
    lines = ["epoch,loss/train,loss/held_out,step,tokens", ",,7.5,0,0.0", ",5.5,,3,192.0", "0,,5.25,3,192.0"]
    (tmp_path / "metrics.csv").write_text("\n".join(lines))
    run = runs.read_run_of_any_task(tmp_path)
    assert run.counts_tokens and sorted(run.curves) == ["loss/held_out", "loss/train"]
    assert run.curve("loss/train").to_dict() == {192: 5.5}
    assert run.curve("loss/held_out").to_dict() == {0: 7.5, 192: 5.25}
    (tmp_path / "metrics.csv").write_text("step,accuracy\n0,0.5\n")  # a task that counts no tokens
    assert runs.read_run_of_any_task(tmp_path).curves.index.name == "step"
    (tmp_path / "metrics.csv").write_text("")
    assert "metrics.csv is damaged" in runs.read_run_of_any_task(tmp_path).problems[-1]


def test_planned_and_seen_mix_stand_beside_the_papers(tiny_run: Path) -> None:
    run = runs.read_run(tiny_run)
    shares = runs.web_shares(run)
    assert list(shares.index) == STAGES
    assert list(shares["tokens planned"]) == [3000, 2000, 1500]
    assert list(shares["tokens seen"]) == list(np.diff([0, *ENDS]))
    assert list(shares["web %, paper"]) == pytest.approx([90.6, 81.7, 51.6])
    assert list(shares["web %, planned"]) == pytest.approx([90.6, 81.7, 51.6])
    for stage in run.summary["stages"]:
        assert shares.loc[stage["name"], "web %, seen"] == 100 * stage["tokens_by_source"]["web"] / stage["tokens"]


def test_shares_in_any_unit_are_normalised(copied_run: Path) -> None:
    config = OmegaConf.load(copied_run / "config.yaml")
    config.data.init_args.stages[0].mix = {"web": 3, "wiki": 1}
    config.data.init_args.stages[1].mix = {"wiki": 5}
    OmegaConf.save(config, copied_run / "config.yaml")
    planned = runs.planned_mix(runs.read_run(copied_run))
    assert planned.loc["foundation"].to_dict() == {"web": 0.75, "wiki": 0.25}
    assert planned.loc["refinement"].to_dict() == {"web": 0.0, "wiki": 1.0}


def test_the_mix_over_tokens_adds_up_to_what_each_stage_saw(tiny_run: Path) -> None:
    run = runs.read_run(tiny_run)
    mix = runs.mix_table(run)
    assert list(mix.index) == [256 * step for step in range(1, 27)]
    assert mix.sum(axis=1).to_numpy() == pytest.approx(1)
    for stage, (begin, end) in zip(run.summary["stages"], runs.stage_spans(run).to_numpy(), strict=True):
        within = mix[(mix.index > begin) & (mix.index <= end)]
        assert within["web"].mean() == pytest.approx(stage["mix"]["web"])


def test_held_out_losses_follow_the_baseline(tiny_run: Path) -> None:
    run = runs.read_run(tiny_run)
    losses = runs.held_out_loss_table(run)
    assert list(losses.index) == ["unigram baseline", *(f"after {stage}" for stage in STAGES)]
    assert losses.loc["unigram baseline"].to_dict() == run.summary["unigram_loss"]
    assert losses.loc["after finish"].to_dict() == run.summary["val_loss"]


def test_the_loss_before_training_is_a_row_of_its_own(recorded: runs.RecordedRun) -> None:
    recorded.summary["val_loss_before"] = {"web": 6.0, "wiki": 7.0}
    losses = runs.held_out_loss_table(recorded)
    assert list(losses.index) == ["unigram baseline", "before training", "after one", "after two"]
    assert losses.loc["before training"].to_dict() == {"web": 6.0, "wiki": 7.0}


def test_samples_come_with_their_stage_and_prompt(tiny_run: Path) -> None:
    samples = runs.text_samples(runs.read_run(tiny_run))
    assert list(samples["stage"]) == STAGES
    assert list(samples["tokens"]) == ENDS
    assert set(samples["prompt"]) == {"The river"}
    assert samples["text"].str.startswith("The river").all()


def test_no_sample_can_leave_its_block_of_code() -> None:
    frame = pd.DataFrame([{"prompt": "Say", "stage": "one", "tokens": 1000, "text": "Say ````\n# not a title"}])
    assert runs.samples_markdown(frame) == (
        "**one**, after 1,000 tokens; prompt: *Say*\n\n`````text\nSay ````\n# not a title\n`````"
    )


def test_the_overview_says_what_was_trained(tiny_run: Path) -> None:
    run = runs.read_run(tiny_run)
    facts = runs.overview(run)[""]
    assert facts["run"] == "runs/tiny/version_0"
    assert facts["decoder"] == "2 layers × 32 hidden"
    assert facts["tokens"] == f"{26 * 256:,}"


def test_a_resumed_run_reads_like_one_that_never_stopped(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with SummaryWriter(str(tmp_path)) as writer:
        writer.add_scalar("mix/stage", 1.0, 0)
        writer.add_scalar("mix/stage", 2.0, 12)
        for step in (16, 17, 25):
            writer.add_scalar("loss/train", 9.0, step)
    # The names hold seconds and a counter, and sort as text: two of one second need not come in order.
    next(tmp_path.glob("events*")).rename(tmp_path / "events.out.tfevents.1.host.1.0")
    with SummaryWriter(str(tmp_path), purge_step=17) as writer:
        writer.add_scalar("mix/stage", 2.0, 16)
        for step in (17, 18):
            writer.add_scalar("loss/train", 1.0, step)
    config = {
        "trainer": {"callbacks": []},
        "data": {
            "init_args": {
                "batch_tokens": 10,
                "sources": {"web": {}},
                "stages": [{"name": name, "tokens": 120, "mix": {"web": 1}} for name in STAGES],
            }
        },
    }
    OmegaConf.save(config, tmp_path / "config.yaml")
    run = runs.read_run(tmp_path)
    assert run.curve("loss/train").to_dict() == {160: 9.0, 170: 1.0, 180: 1.0}
    assert capfd.readouterr().err == ""
    spans = runs.stage_spans(run)
    assert spans.to_dict("index") == {"foundation": {"begin": 0, "end": 120}, "refinement": {"begin": 120, "end": 180}}


@pytest.mark.medium
def test_a_run_that_stopped_early_reads_as_far_as_it_came(tiny: Path) -> None:
    assert main(["fit", "--config", str(tiny / "tiny.yaml"), "--trainer.max_steps", "14"]) == 0
    run = runs.read_run(runs.newest_run(tiny / "runs", "tiny"))
    assert list(runs.stage_spans(run).index) == STAGES[:2]
    assert list(runs.held_out_loss_table(run).index) == ["unigram baseline", "after foundation"]
    seen = runs.seen_mix(run)
    assert seen.loc["refinement"].notna().all() and seen.loc["finish"].isna().all()


def test_what_is_missing_is_said_with_the_way_to_it(copied_run: Path) -> None:
    (copied_run / "summary.json").unlink()
    for events in copied_run.glob("events*"):
        events.unlink()
    run = runs.read_run(copied_run)
    going_on = (
        r"no summary\.json, .*`python -m lightning_danube fit --config runs/tiny/version_0/config\.yaml --ckpt_path"
    )
    for part in (runs.overview, runs.held_out_loss_table, runs.seen_mix, runs.web_shares):
        with pytest.raises(runs.MissingResult, match=going_on):
            part(run)
    for ask, answer in (
        (
            runs.stage_spans,
            r"logged no mix/stage: name lightning_danube\.callbacks\.CurriculumStages in trainer\.callbacks",
        ),
        (runs.mix_table, r"logged no tokens_seen/web: name lightning_danube\.callbacks\.TokenLedger"),
        (runs.text_samples, "no text samples: no stage has ended"),
    ):
        with pytest.raises(runs.MissingResult, match=answer):
            ask(run)
    with pytest.raises(runs.MissingResult, match=r"logged no loss/train: it stopped before the first step"):
        run.curve("loss/train")


def test_a_run_without_a_source_named_web_has_nothing_beside_the_papers(copied_run: Path) -> None:
    for path in (copied_run / "config.yaml", copied_run / "summary.json"):
        path.write_text(path.read_text().replace("web", "net"))
    assert json.loads((copied_run / "summary.json").read_text())["val_loss"].keys() == {"net", "wiki"}
    with pytest.raises(runs.MissingResult, match="no source named web"):
        runs.web_shares(runs.read_run(copied_run))


def test_a_run_is_read_in_tokens(recorded: runs.RecordedRun) -> None:
    """The run of conftest.py: 6 steps of 100 tokens."""
    assert recorded.curve("loss/train").to_dict() == {100 * step: 5.0 - 0.5 * step for step in range(1, 7)}
    assert runs.stage_spans(recorded).to_dict("index") == {
        "one": {"begin": 0, "end": 400},
        "two": {"begin": 400, "end": 600},
    }
    mix = runs.mix_table(recorded)
    assert mix["web"].tolist() == pytest.approx([0.9, 0.9, 0.6, 0.6, 0.2, 0.1])
    assert mix["wiki"].tolist() == pytest.approx([0.1, 0.1, 0.4, 0.4, 0.8, 0.9])


def test_a_mix_over_tokens_averages_over_no_two_stages(recorded: runs.RecordedRun) -> None:
    # Logged at 300 and 500 tokens only: stage one ends between them, and stage two after the last of them.
    for tag in ("tokens_seen/web", "tokens_seen/wiki"):
        recorded.curves.loc[[100, 200, 400, 600], tag] = np.nan
    mix = runs.mix_table(recorded)
    assert list(mix.index) == [300, 400, 500, 600]
    # At 400 tokens the summary counts 300 of web, at 500 the curve counts 320, at 600 the summary counts 330.
    assert mix["web"].tolist() == pytest.approx([240 / 300, 0.6, 0.2, 0.1])
    tokens = np.diff([0, *mix.index])
    for stage, rows in zip(recorded.summary["stages"], (slice(0, 2), slice(2, 4)), strict=True):
        share = np.average(mix["web"].iloc[rows], weights=tokens[rows])
        assert share == pytest.approx(stage["mix"]["web"])
    # Without a summary nobody knows the mix at the border: the row that crosses it is left blank.
    recorded.summary.clear()
    mix = runs.mix_table(recorded)
    assert list(mix.index) == [300, 500] and mix.loc[500].isna().all() and mix.loc[300, "web"] == 0.8


def test_shares_of_web_text_stand_beside_each_other(recorded: runs.RecordedRun) -> None:
    shares = runs.web_shares(recorded)
    assert shares["web %, planned"].tolist() == pytest.approx([75.0, 20.0])
    assert shares["web %, seen"].tolist() == pytest.approx([75.0, 15.0])
    assert shares["tokens planned"].tolist() == [400, 200] == shares["tokens seen"].tolist()
    recorded.summary["stages"][1]["tokens"] = 0
    assert np.isnan(runs.web_shares(recorded)["web %, seen"]["two"])


def test_a_sample_at_the_end_of_a_stage_is_of_that_stage(recorded: runs.RecordedRun) -> None:
    assert runs.text_samples(recorded).to_dict("records") == [
        {"prompt": "The river", "stage": "one", "tokens": 400, "text": "The river is"},
        {"prompt": "The river", "stage": "two", "tokens": 600, "text": "The river was\n  long"},
    ]


def test_a_run_that_stopped_before_its_first_sample_says_so(recorded: runs.RecordedRun) -> None:
    recorded.texts.clear()
    recorded.texts["run/plan"] = {0: "the plan"}
    with pytest.raises(runs.MissingResult, match="holds no text samples: no stage has ended"):
        runs.text_samples(recorded)


def test_the_overview_tells_time_and_speed(recorded: runs.RecordedRun) -> None:
    facts = runs.overview(recorded)[""]
    assert (facts["minutes"], facts["optimizer steps"], facts["parameters"]) == ("1.5", "6", "2,100,000")
    assert facts["tokens/s, in training"] == "12,346" and facts["accelerator, precision"] == "cpu, 32-true"
    recorded.summary["tokens_per_second"] = None
    assert runs.overview(recorded)[""]["tokens/s, in training"] == "–"
