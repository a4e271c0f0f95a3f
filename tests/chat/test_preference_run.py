"""Preference tuning through the command line: what a run writes, that it goes on exactly, and that it is the same run
however it is dealt."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import binomtest

from lightning_danube.__main__ import main
from lightning_danube.intervals import wilson
from tests.chat.test_fine_tuning import last_checkpoint, run_directory, same_weights
from tests.commands import fit
from tests.pretraining.test_run import scalars
from tests.training.test_world_size import run_in_ranks

CONFIG = """
name: talk
runs: TMP/runs
seed_everything: 3
data:
  class_path: lightning_danube.chat.PreferenceData
  init_args:
    tokenizer: ${model.init_args.weights}
    context_length: 32
    batch_pairs: 4
    micro_batch_size: 4
    held_out: 0.2
    cache_dir: TMP/cache
    sources:
      talk: {path: TMP/talk.jsonl}
model:
  class_path: lightning_danube.chat.PreferenceTuning
  init_args:
    weights: BASE
    beta: 0.5
    learning_rate: {peak: 2.0e-2, final: 0.0, warmup: 512}
trainer:
  accelerator: cpu
  precision: 32-true
  num_sanity_val_steps: -1
  log_every_n_steps: 1
  callbacks:
    - class_path: lightning_danube.callbacks.Progress
    - class_path: lightning_danube.callbacks.PreferenceSummary
    - class_path: lightning_danube.callbacks.Throughput
    - class_path: lightning_danube.callbacks.Checkpoints
      init_args: {every_n_steps: 3}
"""
LORA = ("--model.init_args.lora.rank", "4", "--model.init_args.lora.dropout", "0.1")
DOUBLE = ("--trainer.precision", "64-true")


@pytest.fixture
def talk(tmp_path: Path, tiny_run: Path) -> Path:
    """A directory with `talk.yaml`: about sixteen steps on pairs whose right answer follows from the question."""
    with (tmp_path / "talk.jsonl").open("w") as file:
        for n in range(80):
            asked, right, wrong = ("river?", "stone", "green") if n % 2 else ("mountain?", "green", "stone")
            prompt = asked + " now" * (n % 5) + " then" * (n // 20)
            file.write(json.dumps({"prompt": prompt, "chosen": right, "rejected": wrong}) + "\n")
    (tmp_path / "talk.yaml").write_text(CONFIG.replace("TMP", str(tmp_path)).replace("BASE", str(tiny_run)))
    return tmp_path


def summary_of(talk: Path, name: str = "talk") -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((run_directory(talk, name) / "summary.json").read_text())
    return loaded


def values_of(run: Path, tag: str) -> list[float]:
    """What was logged under a tag, in order."""
    return list(scalars(run, tag).values())


@pytest.mark.medium
@pytest.mark.usefixtures("no_warnings")
def test_a_run_learns_what_is_preferred_and_says_so(talk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit(talk) == 0
    printed = capsys.readouterr()
    summary = summary_of(talk)
    assert summary["val_loss"]["talk"] < 0.8 * summary["val_loss_before"]["talk"]
    assert summary["val_reward_margin"]["talk"] > 0.3
    assert summary["val_reward_accuracy"]["talk"] > 0.7
    low, high = summary["val_reward_accuracy_interval"]["talk"]
    assert low < summary["val_reward_accuracy"]["talk"] <= high
    assert summary["val_pairs"]["talk"] == summary["sources"]["talk"]["pairs_held_out"] > 0
    assert summary["trained_parameters"] == summary["parameters"] and summary["beta"] == 0.5
    for text in (
        "held-out pairs",
        "talk before",
        "talk after",
        "chat --weights",
        "80 pairs computed in ",
        "2 × 32 pla",
    ):
        assert text in printed.out
    assert "arning" not in printed.err + printed.out
    run = run_directory(talk)
    for tag in ("loss/train", "rewards/chosen", "rewards/rejected", "rewards/accuracy", "rewards/margin"):
        assert len(values_of(run, tag)) == summary["steps"] > 10, tag
    for tag in ("rewards/margin_held_out_talk", "rewards/accuracy_held_out_talk", "ranking/accuracy_held_out_talk"):
        assert values_of(run, tag)[-1] == pytest.approx(summary[_key(tag)]["talk"])
    # All held-out pairs before training and at the end; a few of them at each tenth of the run as well.
    assert len(values_of(run, "rewards/margin_held_out_talk")) == len(values_of(run, "loss/held_out_talk")) == 2
    assert list(scalars(run, "held_out/talk")) == [0, *tenths(summary["steps"])]
    last = {tag: values_of(run, f"rewards/{tag}")[-1] for tag in ("chosen", "rejected", "margin")}
    assert last["margin"] == pytest.approx(last["chosen"] - last["rejected"], abs=1e-5)
    # The run is a model like any other, with the tokenizer that its base had.
    question = ["--chat", "--prompt", "river?", "--temperature", "0", "--max-new-tokens", "4"]
    assert main(["generate", "--weights", str(run), *question]) == 0


def tenths(steps: int) -> list[int]:
    """The steps that end a tenth of a run."""
    return [math.ceil(part * steps / 10) for part in range(1, 11)]


def _key(tag: str) -> str:
    kind, name = tag.removesuffix("_held_out_talk").split("/")
    return f"val_{'reward' if kind == 'rewards' else 'ranking'}_{name}"


@pytest.mark.medium
def test_the_first_step_has_the_loss_of_no_difference(talk: Path) -> None:
    """Whatever else stands in its batch: the reference was computed in other batches, so float64 to the rounding."""
    assert fit(talk, *DOUBLE, "--trainer.max_steps", "1") == 0
    run, summary = run_directory(talk), summary_of(talk)
    assert summary["val_loss_before"]["talk"] == pytest.approx(math.log(2), abs=1e-12)
    assert summary["val_reward_margin_before"]["talk"] == pytest.approx(0, abs=1e-11)
    assert "val_loss" not in summary, "the end of a run that max_steps cuts short is not measured"
    # TensorBoard keeps float32.
    assert values_of(run, "loss/train")[0] == pytest.approx(math.log(2), rel=1e-7)
    assert values_of(run, "rewards/chosen")[0] == pytest.approx(0, abs=1e-11)


@pytest.mark.medium
@pytest.mark.parametrize("options", [(), LORA])
def test_going_on_equals_never_having_stopped(talk: Path, options: tuple[str, ...]) -> None:
    assert fit(talk, *options) == 0
    assert fit(talk, *options, "--name", "stopped", "--trainer.max_steps", "4") == 0
    # Where it went on, no reference of the first session is left: it is computed with the weights the run began with.
    for file in (talk / "cache").rglob("*-reference-*"):
        file.unlink()
    assert fit(talk, *options, "--name", "stopped", "--ckpt_path", "last") == 0
    assert same_weights(run_directory(talk), run_directory(talk, "stopped"))
    curves = [scalars(run_directory(talk, name), "held_out/talk") for name in ("talk", "stopped")]
    assert curves[0] == curves[1] and len(curves[0]) == 11
    full, stopped = summary_of(talk), summary_of(talk, "stopped")
    for key in full.keys() - {"seconds", "tokens_per_second"}:
        assert full[key] == stopped[key], key


@pytest.mark.medium
def test_an_adapter_trains_against_the_reference_of_its_base(talk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = ("--trainer.max_steps", "1")
    assert fit(talk, *short) == 0
    files = sorted((talk / "cache" / "pairs").rglob("*-reference-*"))
    made = [(file.name, file.stat().st_mtime_ns) for file in files]
    assert capsys.readouterr().out.count("80 pairs computed in ") == 1 and len(made) == 2
    # At the rate for all weights an adapter of this scale goes too far.
    assert fit(talk, *LORA, "--model.init_args.learning_rate.peak", "1e-3", "--name", "adapter") == 0
    assert "reference: 80 pairs reused from an earlier run" in capsys.readouterr().out
    assert [(file.name, file.stat().st_mtime_ns) for file in files] == made
    values = [np.load(file) for file in files]
    for file in files:
        file.unlink()
    assert fit(talk, *LORA, *short, "--name", "again") == 0
    assert all(np.array_equal(np.load(file), value) for file, value in zip(files, values, strict=True))
    summary, checkpoint = summary_of(talk, "adapter"), last_checkpoint(run_directory(talk, "adapter"))
    assert all(".lora_" in name for name in checkpoint["state_dict"])
    assert sum(tensor.numel() for tensor in checkpoint["state_dict"].values()) == summary["trained_parameters"]
    assert summary["val_loss"]["talk"] < summary["val_loss_before"]["talk"]


@pytest.mark.slow
def test_micro_batches_and_devices_change_nothing_but_the_order_of_sums(talk: Path) -> None:
    """The last step has fewer pairs than the others, so means of means would be off by far more than rounding (1e-16,
    which sixteen steps of Adam make 1e-13)."""
    with (talk / "talk.jsonl").open("a") as lines:
        for word in ("slowly", "under"):
            lines.write(json.dumps({"prompt": f"river? {word}", "chosen": "stone", "rejected": "green"}) + "\n")
    assert fit(talk, *DOUBLE) == 0
    pairs = summary_of(talk)["sources"]["talk"]
    assert (pairs["pairs"] - pairs["pairs_held_out"]) % 4, "every step is full"
    assert fit(talk, *DOUBLE, "--name", "small", "--data.init_args.micro_batch_size", "1") == 0
    for file in (talk / "cache").rglob("*-reference-*"):
        file.unlink()
    command = ["fit", "--config", str(talk / "talk.yaml"), *DOUBLE, "--name", "ranks"]
    run_in_ranks((2, [*command, "--data.init_args.micro_batch_size", "1"]))
    expected, summary = last_checkpoint(run_directory(talk))["state_dict"], summary_of(talk)
    for name in ("small", "ranks"):
        found = last_checkpoint(run_directory(talk, name))["state_dict"]
        for key, tensor in expected.items():
            assert (found[key] - tensor).norm() <= 1e-11 * tensor.norm(), (name, key)
        for key in ("val_loss", "val_reward_chosen", "val_reward_margin", "val_reward_accuracy", "val_pairs"):
            assert summary_of(talk, name)[key] == pytest.approx(summary[key], rel=1e-9), (name, key)
        for tag in ("rewards/chosen", "rewards/margin", "rewards/accuracy"):
            left, right = (values_of(run_directory(talk, run), tag) for run in ("talk", name))
            # At the first step there are only ties and rounding, which may fall either way. TensorBoard keeps float32.
            assert left[1:] == pytest.approx(right[1:], rel=1e-6, abs=1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--model.init_args.beta", "0"), "--model.init_args.beta is 0.0: give a number above 0, such as 0.1"),
        (("--model.init_args.bta", "1"), "bta"),
        (("--model.init_args.lora.rank", "0"), "--model.init_args.lora.rank: lora has rank 0, alpha 32"),
        (("--model.init_args.weights", "/nowhere"), "weights: there is no file or directory /nowhere"),
        (("--data.init_args.context_length", "64"), "--data.init_args.context_length is 64, the model of"),
        (
            ("--data.init_args.batch_pairs", "5"),
            "--data.init_args.batch_pairs is 5, which 1 device × data.micro_batch_size = 4 d",
        ),
        (("--data.init_args.sources.talk.max_pairs", "0"), "max_pairs is 0: it must be at least 1"),
        (
            ("--model.init_args.learning_rate.warmup", "1M"),
            "--model.init_args.learning_rate.warmup is 1M, and the whole",
        ),
    ],
)
def test_a_mistake_is_one_line(
    talk: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], message: str
) -> None:
    assert fit(talk, *options) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error
    assert not (talk / "runs").exists()


def test_task_data_and_summary_have_to_belong_together(talk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (talk / "talk.yaml").read_text()
    chat_data = text.replace("PreferenceData", "ChatData").replace("batch_pairs", "batch_rows")
    for mixed, message in [
        (chat_data, "PreferenceTuning learns from pairs, ChatData has none: set data.class_path to"),
        (
            text.replace("PreferenceTuning", "SupervisedFineTuning").replace("    beta: 0.5\n", ""),
            "PreferenceData has no reference log-probabilities, which its task computes: set model.class_path to",
        ),
        (text.replace("PreferenceSummary", "ChatSummary"), "ChatSummary reports on ChatData: remove it"),
    ]:
        # A row of pairs is not a conversation, so ChatData needs other rows.
        (talk / "talk.yaml").write_text(mixed.replace("talk.jsonl", "chats.jsonl") if mixed is chat_data else mixed)
        if mixed is chat_data:
            rows = (json.dumps({"prompt": f"river? {n}", "response": "stone"}) + "\n" for n in range(40))
            (talk / "chats.jsonl").write_text("".join(rows))
        assert fit(talk) == 2
        assert message in capsys.readouterr().err


@pytest.mark.medium
def test_another_run_is_not_gone_on_with(talk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit(talk, *LORA, "--trainer.max_steps", "3") == 0
    for options, message in [
        ((*LORA, "--data.init_args.seed", "9"), "--data.init_args.seed is 9, the run began with 0"),
        ((*LORA, "--data.init_args.batch_pairs", "8"), "--data.init_args.batch_pairs is 8, the run began with 4"),
        ((*LORA, "--data.init_args.too_long", "cut"), "data.sources is "),
    ]:
        assert fit(talk, *options, "--ckpt_path", "last") == 2
        assert message in capsys.readouterr().err


@pytest.mark.medium
def test_evaluation_reports_the_pairs(talk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit(talk) == 0
    for verb in ("validate", "test", "predict"):
        more = (
            ["--trainer.callbacks", "[{class_path: lightning_danube.callbacks.Predictions}]"]
            if verb == "predict"
            else []
        )
        assert main([verb, "--config", str(talk / "talk.yaml"), "--ckpt_path", "last", *more]) == 0
    assert "talk" in capsys.readouterr().out
    trained, validated, tested = (summary_of(talk, name) for name in ("talk", "talk-validate", "talk-test"))
    for key in ("val_loss", "val_reward_margin", "val_pairs", "val_reward_accuracy_interval"):
        assert validated[key] == trained[key] == tested[key]
    # Where batches are left out, the pairs are those that were measured, and so are the intervals.
    assert (
        main(["test", "--config", str(talk / "talk.yaml"), "--ckpt_path", "last", "--trainer.limit_test_batches", "1"])
        == 0
    )
    part = json.loads((run_directory(talk, "talk-test").parent / "version_1" / "summary.json").read_text())
    pairs, share = part["val_pairs"]["talk"], part["val_reward_accuracy"]["talk"]
    assert 0 < pairs < trained["val_pairs"]["talk"]
    ends = binomtest(round(share * pairs), pairs).proportion_ci(0.95, "wilson")
    assert part["val_reward_accuracy_interval"]["talk"] == pytest.approx([ends.low, ends.high], abs=5e-5)
    lines = (run_directory(talk, "talk-predict") / "predictions.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == trained["val_pairs"]["talk"] == len({row["row"] for row in rows})
    asked = {n: json.loads(line) for n, line in enumerate((talk / "talk.jsonl").read_text().splitlines(), start=1)}
    for row in rows:
        assert row["file"] == str(talk / "talk.jsonl")
        for side in ("chosen", "rejected"):
            assert asked[row["row"]][side] in row[f"{side}_text"]
    assert np.mean([row["loss"] for row in rows]) == pytest.approx(trained["val_loss"]["talk"], rel=1e-5)
    margin = np.mean([row["chosen"] - row["rejected"] for row in rows])
    assert margin == pytest.approx(trained["val_reward_margin"]["talk"], rel=1e-4)


@pytest.mark.parametrize(
    ("share", "count", "low", "high"),
    # The ends solve |p - share| = 1.959964 √(p (1 - p) / count); found by bisection.
    [(0.5, 10, 0.2366, 0.7634), (0.9, 10, 0.5958, 0.9821), (0.0, 20, 0.0, 0.1611), (1.0, 20, 0.8389, 1.0)],
)
def test_the_interval_of_a_share(share: float, count: int, low: float, high: float) -> None:
    assert wilson(share, count).ends == pytest.approx((low, high), abs=1e-4)


@pytest.mark.medium
def test_a_kill_between_the_last_checkpoint_and_the_summary_loses_nothing(talk: Path) -> None:
    command = ["fit", "--config", str(talk / "talk.yaml")]
    assert main(command) == 0
    summary = summary_of(talk)
    (run_directory(talk) / "summary.json").unlink()
    assert main([*command, "--ckpt_path", "last"]) == 0
    assert summary_of(talk) | {"seconds": summary["seconds"]} == summary
