"""The trials of the quickstart: shorter runs keep its proportions, and one whole trial of a tiny model."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_danube.options import parse_tokens


@pytest.fixture
def trials(benchmarks_on_path: None) -> Any:
    import quickstart_trials

    return quickstart_trials


def test_a_shorter_run_keeps_the_proportions_of_stages_and_schedule(trials: Any) -> None:
    config = trials.quickstart()
    whole = trials.whole_quickstart()
    half = trials.stages_of(whole // 2)
    for short, stage in zip(half, config["data"]["init_args"]["stages"], strict=True):
        assert short["mix"] == stage["mix"] and short["name"] == stage["name"]
        assert short["tokens"] == pytest.approx(parse_tokens(stage["tokens"]) / 2, abs=1)
    words = trials.scaled_schedule(whole // 2, [])
    rate = config["model"]["init_args"]["learning_rate"]
    for key, value in zip(words[::2], words[1::2], strict=True):
        assert int(value) == pytest.approx(parse_tokens(rate[key.rpartition(".")[2]]) / 2, rel=0.002)
    assert trials.scaled_schedule(whole // 2, ["--model.init_args.learning_rate.warmup", "0"]) == []


@pytest.mark.slow
def test_a_trial_trains_and_measures(
    trials: Any, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trials, "CONFIG", tiny / "tiny.yaml")
    monkeypatch.setattr(trials, "RESULTS", tmp_path / "trials.jsonl")
    monkeypatch.setattr(trials, "ROOT", Path(__file__).parents[2])
    monkeypatch.setattr(
        trials, "TRIALS", {"chosen": [], "wider": ["--model.init_args.decoder.intermediate_size", "96"]}
    )
    monkeypatch.setattr(trials, "write_result", lambda name, text: print(name, text))
    monkeypatch.setattr("sys.argv", ["quickstart_trials.py", "--seconds", "2"])
    trials.main()
    lines = [json.loads(line) for line in (tmp_path / "trials.jsonl").read_text().splitlines()]
    assert [one["trial"] for one in lines] == ["chosen", "wider"] * 2
    timings, results = lines[:2], lines[2:]
    for one in results:
        assert one["tokens"] == one["steps"] * 256
        assert one["seconds_per_step"] == timings[results.index(one)]["seconds_per_step"]
        assert one["bits_per_byte"].keys() == {"web", "wiki"}
        assert one["mean_bits_per_byte"] == pytest.approx(sum(one["bits_per_byte"].values()) / 2, abs=1e-4)
    assert results[1]["parameters"] - results[0]["parameters"] == 2 * 3 * 32 * 32
    printed = capsys.readouterr().out
    assert "| chosen |" in printed and "| wider |" in printed
    # What is finished is not trained again.
    monkeypatch.setattr(trials, "timed", lambda *_: pytest.fail("timed again"))
    monkeypatch.setattr(trials, "trial", lambda *_: pytest.fail("trained again"))
    trials.main()
    assert yaml.safe_load((tiny / "tiny.yaml").read_text())["name"] == "tiny"
