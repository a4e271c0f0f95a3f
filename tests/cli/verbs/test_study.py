"""`study`: trials that are ordinary runs, kept, handed out to workers, gone on with, and compared."""

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

from lightning_danube.__main__ import main
from lightning_danube.studies import facts, scaling, trials
from lightning_danube.studies.design import Design, Overrides, read_design
from lightning_danube.training.history import commit, machine

STUDY = """
name: rates
base: {base}
baseline: slow
metric: val_loss.web
also: [val_loss.wiki, steps]
seeds: [1, 2, 3]
equal: {{parameters: 0, tokens: 0, tokens_by_source: 0}}
variants:
  slow: {{model.init_args.learning_rate.peak: 1.0e-3}}
  fast: {{model.init_args.learning_rate.peak: 2.0e-2}}
"""

FAKE = """
import json, sys, time
from pathlib import Path
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
seed, rate = int(options["--seed_everything"]), float(options["--model.init_args.learning_rate.peak"])
if BREAKS:
    print("some words"); print("error: the disk is on fire", file=sys.stderr); sys.exit(2)
time.sleep(SLEEP)
run = Path(options["--runs"]) / options["--name"] / "version_0"
run.mkdir(parents=True, exist_ok=True)
(run / "summary.json").write_text(json.dumps({"val_loss": {"web": 3 + seed - 20 * rate, "wiki": 4.0}, "steps": 26,
    "parameters_without_embedding": float(options.get("--size", 1)), "tokens": float(options.get("--tokens", 1))}))
"""


@pytest.fixture
def study(tmp_path: Path) -> Path:
    (tmp_path / "base.yaml").write_text("name: base\n")
    (tmp_path / "study.yaml").write_text(STUDY.format(base=tmp_path / "base.yaml"))
    return tmp_path


@pytest.fixture
def fake_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs that only write a summary: what is tested here is what is around them."""
    use_fake(monkeypatch)


def use_fake(monkeypatch: pytest.MonkeyPatch, breaks: str = "False", sleep: float = 0.0) -> None:
    script = FAKE.replace("BREAKS", breaks).replace("SLEEP", str(sleep))

    def command(design: Design, values: Overrides, seed: int, *more: str) -> list[str]:
        return [sys.executable, "-c", script, *facts.command_of(design, values, seed, *more)[6:]]

    monkeypatch.setattr(trials, "command_of", command)
    monkeypatch.setattr(
        "lightning_danube.studies.facts.check_variants", lambda design, resolve: {"slow": NOTHING, "fast": NOTHING}
    )
    monkeypatch.setattr("lightning_danube.studies.facts.check_search", lambda design, resolve: None)


NOTHING = {"parameters": None, "tokens": None, "tokens_by_source": None}


def run(study: Path, *options: str) -> int:
    return main(["study", "--config", str(study / "study.yaml"), "--runs", str(study / "runs"), *options])


def results(study: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pyarrow.parquet.read_table(study / "runs/studies/rates/study.parquet").to_pylist()
    return rows


@pytest.mark.medium
def test_a_study_ends_in_a_table_and_a_verdict(
    study: Path, fake_runs: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(study) == 0
    out = capsys.readouterr().out
    assert "study rates: 2 variants × 3 seeds" in out
    assert "slow-seed1: val_loss.web 3.9800" in out and "; 1 of 6, about " in out
    assert "fast is better than slow: -0.38 in val_loss.web" in out
    rows = results(study)
    assert [(row["variant"], row["seed"]) for row in rows] == [(v, s) for v in ("slow", "fast") for s in (1, 2, 3)]
    assert rows[4]["val_loss.web"] == pytest.approx(3 + 2 - 0.4) and rows[4]["steps"] == 26
    summary = json.loads((study / "runs/studies/rates/summary.json").read_text())
    assert summary["comparisons"][0]["mean"] == pytest.approx(-0.38) and summary["runs_complete"] == 6
    assert "| fast | 3 |" in (study / "runs/studies/rates/study.md").read_text()
    # The other metrics, too: their differences, here without any.
    assert re.search(r"(?m)^fast +4\.0000 \(\+0 ± 0\) +26\.0000 ", out)
    assert summary["also"]["val_loss.wiki"][0]["mean"] == 0


@pytest.mark.medium
def test_a_study_runs_in_any_directory(study: Path, fake_runs: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The base is found by its name, and the command of a trial starts there, too."""
    (study / "study.yaml").write_text(STUDY.format(base="quickstart"))
    monkeypatch.chdir(study)
    assert main(["study", "--config", "study.yaml"]) == 0
    assert [row["state"] for row in results(study)] == ["complete"] * 6
    design = read_design("studies/quickstart")
    command = facts.command_of(design, next(iter(design.variants.values())), 1, "--print_config")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run(command, cwd=study, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "seed_everything: 1" in done.stdout, done.stderr


@pytest.mark.medium
def test_a_result_says_where_it_came_from(study: Path, fake_runs: None) -> None:
    assert run(study) == 0
    (row, *_) = results(study)
    assert row["command"] == f"python -m lightning_danube study --config {study / 'study.yaml'}"
    assert row["commit"] == commit() and row["machine"] == machine()


@pytest.mark.medium
def test_several_numbers_are_one_by_their_mean(study: Path, fake_runs: None) -> None:
    text = (study / "study.yaml").read_text()
    (study / "study.yaml").write_text(text.replace("metric: val_loss.web", "metric: val_loss"))
    assert run(study) == 0
    assert results(study)[0]["val_loss"] == pytest.approx((3.98 + 4.0) / 2)


@pytest.mark.medium
def test_going_on_is_asked_for_and_repeats_nothing(
    study: Path, fake_runs: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(study, "--resume") == 2
    assert "there is no study rates to continue" in capsys.readouterr().err
    assert run(study) == 0
    before = results(study)
    assert run(study) == 2
    assert "continue it with --resume" in capsys.readouterr().err
    assert run(study, "--resume") == 0
    assert "begins" not in capsys.readouterr().out
    assert results(study) == before
    # More seeds, and another variant, join what is there.
    text = (study / "study.yaml").read_text()
    text = text.replace("[1, 2, 3]", "[1, 2, 3, 4]") + "  faster: {model.init_args.learning_rate.peak: 4.0e-2}\n"
    (study / "study.yaml").write_text(text)
    assert run(study, "--resume") == 0
    out = capsys.readouterr().out
    assert out.count("begins") == 2 + 4 and "faster is better than slow" in out


@pytest.mark.medium
def test_another_study_does_not_mix_in(study: Path, fake_runs: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(study) == 0
    text = (study / "study.yaml").read_text()
    (study / "study.yaml").write_text(text.replace("2.0e-2", "3.0e-2"))
    assert run(study, "--resume") == 2
    assert "the study rates was begun otherwise (fast): set that back" in capsys.readouterr().err
    (study / "study.yaml").write_text(text.replace("metric: val_loss.web", "metric: val_loss.wiki"))
    assert run(study, "--resume") == 2
    assert "begun otherwise (the base, the metric, the search or what all variants set)" in capsys.readouterr().err


def test_a_failed_trial_stays_with_its_error_and_stops_nothing(
    study: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use_fake(monkeypatch, breaks="seed == 2 and rate > 0.01")
    assert run(study) == 0
    out = capsys.readouterr().out
    assert "fast-seed2: failed: the disk is on fire" in out
    assert "(95 % interval" in out and "2 seeds" in out
    row = results(study)[4]
    assert (row["state"], row["error"]) == ("failed", "the disk is on fire")
    assert "some words" in (study / "runs/studies/rates/fast-seed2.log").read_text()
    assert run(study, "--resume") == 0
    assert "begins" not in capsys.readouterr().out
    use_fake(monkeypatch)
    assert run(study, "--resume", "--retry-failed") == 0
    assert "1 failed trial waits again" in capsys.readouterr().out
    assert [row["state"] for row in results(study)] == ["complete"] * 6


def test_a_metric_that_no_run_has(study: Path, fake_runs: None, capsys: pytest.CaptureFixture[str]) -> None:
    text = (study / "study.yaml").read_text()
    (study / "study.yaml").write_text(text.replace("metric: val_loss.web", "metric: val_loss.books"))
    assert run(study) == 0
    out = capsys.readouterr().out
    assert "summary.json has no val_loss.books: at 'books' there are web, wiki" in out


@pytest.mark.parametrize("flag", ["--retry-failed", "--report"])
def test_flags_for_a_study_that_was_begun(study: Path, flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(study, flag) == 2
    assert f"{flag} is about a study that was begun: add --resume" in capsys.readouterr().err


SEARCH = """
name: rates
base: {base}
metric: val_loss.web
seeds: [1, 2]
trials: 12
search:
  model.init_args.learning_rate.peak: {{low: 1.0e-3, high: 1.0e-1, log: true}}
  model.init_args.decoder.num_hidden_layers: {{low: 1, high: 8}}
  model.init_args.head: [hidden, logits]
"""


@pytest.mark.parametrize(
    "what",
    [
        "search: {model.init_args.lora.rank: [1, 4]}",
        "baseline: low\nvariants: {low: {model.init_args.lora.rank: 1}, high: {model.init_args.lora.rank: 4}}",
    ],
)
def test_a_study_of_missing_weights_is_refused_before_its_first_run(
    study: Path, what: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(study)
    (study / "study.yaml").write_text(
        f"name: rates\nbase: classification/quickstart\nmetric: validation.accuracy\nbetter: higher\n{what}\n"
    )
    assert run(study) == 2
    error = capsys.readouterr().err
    assert "there is no file or directory runs/quickstart" in error and len(error.splitlines()) == 1
    assert not (study / "runs").exists()


@pytest.mark.medium
def test_a_search_finds_what_matters(
    study: Path, fake_runs: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (study / "study.yaml").write_text(SEARCH.format(base=study / "base.yaml"))
    assert run(study) == 0
    out = capsys.readouterr().out
    assert "study rates: 12 settings × 2 seeds" in out and "; 1 of 12" in out
    summary = json.loads((study / "runs/studies/rates/summary.json").read_text())
    rows = results(study)
    best = min(rows, key=lambda row: row["val_loss.web"])
    rate = "model.init_args.learning_rate.peak"
    # Of seeds 1 and 2, whose losses are 4 and 5 less 20 rates.
    assert len(rows) == 24 and all(
        row["val_loss.web"] == pytest.approx(3 + row["seed"] - 20 * row[rate]) for row in rows
    )
    assert summary["best"]["value"] == pytest.approx(best["val_loss.web"] + 0.5)
    assert summary["best"]["settings"][rate] == best[rate]
    # Of two values that are 1 apart: 0.5 standard errors, times Student's 12.7 for one degree of freedom.
    assert f"{summary['best']['value']:.4f} ± 6.4" in out
    assert best[rate] > 0.03
    # The sampler tried the higher rates with one head only: so few trials cannot separate these two.
    layers = "model.init_args.decoder.num_hidden_layers"
    assert summary["importances"][rate] > 0.3 > 3 * summary["importances"][layers]
    assert sum(summary["importances"].values()) == pytest.approx(1)
    assert "(fANOVA, 12 trials)" in out
    assert run(study, "--resume") == 0
    assert "trial" not in capsys.readouterr().out.partition("\n\n")[0]
    # A forest is random; what is reported is not.
    again = json.loads((study / "runs/studies/rates/summary.json").read_text())
    assert again["importances"] == summary["importances"]

    # More of them, one of which breaks and is tried again.
    (study / "study.yaml").write_text(SEARCH.format(base=study / "base.yaml").replace("trials: 12", "trials: 14"))
    use_fake(monkeypatch, breaks="seed == 2")
    assert run(study, "--resume") == 0
    assert "trial 12: failed: the disk is on fire" in capsys.readouterr().out
    use_fake(monkeypatch)
    assert run(study, "--resume", "--retry-failed") == 0
    assert "2 failed trials wait again" in capsys.readouterr().out
    assert json.loads((study / "runs/studies/rates/summary.json").read_text())["trials_complete"] == 14


LADDER = """
name: rates
base: {base}
metric: val_loss.web
law: true
seeds: [1]
variants:
"""


@pytest.mark.medium
def test_a_ladder_ends_in_a_law(
    study: Path, fake_runs: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scaling, "RESAMPLES", 20)
    shapes = [(size, tokens) for size in (1e6, 1e7, 1e8) for tokens in (1e8, 1e9, 1e10)]
    ladder = LADDER.format(base=study / "base.yaml") + "".join(
        f"  {size:.0f}-{tokens:.0f}: {{size: {size:.0f}, tokens: {tokens:.0f}, "
        f"model.init_args.learning_rate.peak: {-(400 * size**-0.3 + 400 * tokens**-0.3) / 20}}}\n"
        for size, tokens in shapes
    )
    (study / "study.yaml").write_text(ladder)
    assert run(study) == 0
    out = capsys.readouterr().out
    assert "fitted without 100000000-10000000000 it says" in out
    assert "extrapolated to danube3-4b at 6.0e+12 tokens" in out
    summary = json.loads((study / "runs/studies/rates/summary.json").read_text())
    assert summary["law"]["alpha"]["value"] == pytest.approx(0.3, abs=0.01)
    assert len(results(study)) == 9 and results(study)[0]["tokens"] == 1e8


GRID = """
name: rates
base: {base}
metric: val_loss.web
seeds: [1, 2]
search:
  model.init_args.learning_rate.peak: [1.0e-2, 2.0e-2, 4.0e-2]
  model.init_args.head: [hidden, logits]
"""


@pytest.mark.medium
def test_a_grid_is_every_setting_once(study: Path, fake_runs: None, capsys: pytest.CaptureFixture[str]) -> None:
    (study / "study.yaml").write_text(GRID.format(base=study / "base.yaml"))
    assert run(study) == 0
    out = capsys.readouterr().out
    assert "study rates: 6 settings × 2 seeds" in out and out.count("val_loss.web") == 6 + 2
    rate = "model.init_args.learning_rate.peak"
    found = {(row[rate], row["model.init_args.head"], row["seed"]) for row in results(study)}
    assert found == {(r, h, s) for r in (0.01, 0.02, 0.04) for h in ("hidden", "logits") for s in (1, 2)}
    summary = json.loads((study / "runs/studies/rates/summary.json").read_text())
    assert summary["marginals"][rate]["0.04"] == pytest.approx([3.2, 4.2])
    assert summary["marginals"]["model.init_args.head"]["hidden"] == pytest.approx([4 - 1.4 / 3, 5 - 1.4 / 3])
    assert run(study, "--resume") == 0
    assert ": val_loss.web" not in capsys.readouterr().out.partition("\n\n")[0]


WORKER = """
import sys
import pytest
sys.path.insert(0, {root!r})
from tests.cli.verbs import test_study as tests
from lightning_danube.studies import trials
patch = pytest.MonkeyPatch()
tests.use_fake(patch, sleep={sleep})
trials.HEARTBEAT_SECONDS, trials.GRACE_SECONDS = 1, 2
from lightning_danube.__main__ import main
sys.exit(main(["study", "--config", {config!r}, "--runs", {runs!r}, *sys.argv[1:]]))
"""


def worker(study: Path, *options: str, sleep: float) -> subprocess.Popen[str]:
    script = WORKER.format(
        root=str(Path(__file__).resolve().parents[3]),
        sleep=sleep,
        config=str(study / "study.yaml"),
        runs=str(study / "runs"),
    )
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )


def begun(process: subprocess.Popen[str], count: int) -> str:
    assert process.stdout is not None
    said = ""
    while said.count("begins") < count:
        line = process.stdout.readline()
        assert line, said
        said += line
    return said


@pytest.mark.slow
def test_two_workers_share_the_trials(study: Path) -> None:
    first = worker(study, sleep=2.0)
    begun(first, 1)
    second = worker(study, "--resume", sleep=2.0)
    said = [process.communicate(timeout=120)[0] for process in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0), said
    counts = [1 + said[0].count("begins"), said[1].count("begins")]
    assert sum(counts) == 6 and min(counts) >= 1
    assert [row["state"] for row in results(study)] == ["complete"] * 6


@pytest.mark.slow
def test_a_killed_worker_loses_no_trial_and_repeats_none(study: Path) -> None:
    first = worker(study, sleep=2.0)
    said = begun(first, 2)
    time.sleep(0.5)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    done = said.count("val_loss.web")
    assert done == 1
    second = worker(study, "--resume", sleep=0.1)
    out = second.communicate(timeout=120)[0]
    assert second.returncode == 0, out
    assert out.count("begins") == 5
    assert [row["state"] for row in results(study)] == ["complete"] * 6


@pytest.mark.slow
def test_a_study_of_real_runs(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tiny / "study.yaml").write_text(STUDY.format(base=tiny / "tiny.yaml").replace("[1, 2, 3]", "[1, 2]"))
    assert run(tiny) == 0
    out = capsys.readouterr().out
    assert "equal, as asked: parameters to 0.00%" in out
    rows = results(tiny)
    assert [row["state"] for row in rows] == ["complete"] * 4
    for row in rows:
        summary = json.loads((Path(row["run"]) / "summary.json").read_text())
        assert row["val_loss.web"] == summary["val_loss"]["web"] and row["steps"] == 26
    assert rows[0]["val_loss.web"] != rows[1]["val_loss.web"] != rows[2]["val_loss.web"]


@pytest.mark.slow
def test_what_should_be_equal_is_checked_before_anything_runs(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = STUDY.format(base=tiny / "tiny.yaml")
    (tiny / "study.yaml").write_text(text + "  wide: {model.init_args.decoder.intermediate_size: 96}\n")
    assert run(tiny) == 2
    error = capsys.readouterr().err
    assert "equal.parameters: parameters differ by" in error and "wide" in error
    (tiny / "study.yaml").write_text(text + "  wrong: {model.init_args.decoder.width: 96}\n")
    assert run(tiny) == 2
    assert "variant wrong: " in capsys.readouterr().err
    assert not (tiny / "runs" / "studies").exists()
