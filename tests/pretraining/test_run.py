"""Whole runs through the command line: what they write, and that going on equals never having stopped."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_danube.__main__ import main
from lightning_danube.checkpoints.runs import newest_checkpoint
from lightning_danube.cli.configs import configured_data
from lightning_danube.pretraining.data import CurriculumData
from lightning_danube.tokens.tokenizer import load_hf_tokenizer
from lightning_danube.weights.huggingface import load_checkpoint
from tests.commands import fit

GOLDENS = Path(__file__).parents[1] / "goldens"
STEPS = 12 + 8 + 6
LAST = "stage_3_finish_step_00000026.ckpt"
MUON = ["--model.init_args.optimizer", "Muon", "--model.init_args.optimizer.peak", "0.03"]


def run_directory(tiny: Path, version: int = 0) -> Path:
    return tiny / "runs" / "tiny" / f"version_{version}"


def scalars(run: Path, tag: str) -> dict[int, float]:
    """Step → value."""
    events = EventAccumulator(str(run))
    events.Reload()
    step_of = {event.step: int(event.value) for event in events.Scalars("optimizer/step")}
    return {step_of[event.step]: event.value for event in events.Scalars(tag)}


def checkpoint(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(path, weights_only=True)
    return loaded


def assert_same_training_state(left: Path, right: Path) -> None:
    """Weights, optimizer, schedule, data position and ledger are bitwise the same."""
    a, b = checkpoint(left), checkpoint(right)
    for name, tensor in a["state_dict"].items():
        assert torch.equal(tensor, b["state_dict"][name]), name
    for index, state in a["optimizer_states"][0]["state"].items():
        for name, tensor in state.items():
            assert torch.equal(tensor, b["optimizer_states"][0]["state"][index][name])
    assert a["lr_schedulers"] == b["lr_schedulers"]
    assert a["CurriculumData"] == b["CurriculumData"]
    assert torch.equal(a["token_ledger"]["samples"], b["token_ledger"]["samples"])
    assert a["global_step"] == b["global_step"]


@pytest.mark.medium
def test_a_kill_between_the_last_checkpoint_and_the_summary_loses_nothing(tiny: Path) -> None:
    assert fit(tiny) == 0
    file = run_directory(tiny) / "summary.json"
    summary = json.loads(file.read_text())
    file.unlink()
    assert fit(tiny, "--ckpt_path", "last") == 0
    again = json.loads(file.read_text())
    assert again | {"seconds": summary["seconds"]} == summary


@pytest.mark.usefixtures("no_warnings")
def test_a_run_leaves_what_the_contract_says(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit(tiny) == 0
    printed = capsys.readouterr()
    run = run_directory(tiny)

    summary = json.loads((run / "summary.json").read_text())
    assert summary["tokens"] == STEPS * 256 and summary["steps"] == STEPS
    assert summary["parameters"] == 2 * 4096 * 32 + 2 * (32 * 16 * 2 + 32 * 32 * 2 + 3 * 32 * 64 + 2 * 32) + 32
    multiplying = summary["parameters"] - 4096 * 32
    assert summary["parameters_without_embedding"] == multiplying
    assert summary["flops"] == (6 * multiplying + 12 * 2 * 32 * 32) * summary["tokens"]
    assert [stage["name"] for stage in summary["stages"]] == ["foundation", "refinement", "finish"]
    for stage, web in zip(summary["stages"], (0.906, 0.817, 0.516), strict=True):
        samples = stage["tokens"] // 32
        assert abs(stage["mix"]["web"] * samples - web * samples) < 1
        assert sum(stage["tokens_by_source"].values()) == stage["tokens"]
        assert set(stage["val_loss"]) == {"web", "wiki"}
    assert summary["val_loss"] == summary["stages"][-1]["val_loss"]
    assert summary["seconds"] > 0 and summary["tokens_per_second"] > 0
    # A vocabulary of 14 words: far below the uniform ln 32000 = 10.4 after 26 steps, and below the first stage's end.
    assert summary["val_loss"]["web"] < summary["stages"][0]["val_loss"]["web"] < 10

    # Bits a byte, from the text itself: the held-out rows as the data module reads them.
    data = configured_data("prepare", [str(tiny / "tiny.yaml")], [])
    assert isinstance(data, CurriculumData)
    data.setup("validate")
    for name, loss in summary["val_loss"].items():
        n = summary["val_tokens"][name]
        text = data.tokenizer.text(data.shards[name].tokens("validation").read(1, n + 1))
        assert text.count(name) >= 1 and "<s>" not in text
        bits = loss * n / len(text.encode()) / math.log(2)
        assert summary["val_bits_per_byte"][name] == pytest.approx(bits)
    assert "the last in bits/byte" in printed.out

    names = sorted(path.name for path in (run / "checkpoints").glob("*.ckpt"))
    assert names == ["stage_1_foundation_step_00000012.ckpt", "stage_2_refinement_step_00000020.ckpt", LAST]
    for text in (
        "entering stage 1 of 3: foundation",
        "unigram baseline",
        "sample: The river",
        f"generate --weights {run}",
    ):
        assert text in printed.out
    assert "arning" not in printed.err + printed.out


@pytest.mark.medium
def test_what_tensorboard_shows_is_grouped_and_at_the_right_step(tiny: Path) -> None:
    fit(tiny)
    run = run_directory(tiny)
    events = EventAccumulator(str(run))
    events.Reload()
    groups = {tag.split("/")[0] for tag in events.Tags()["scalars"]}
    assert groups == {"loss", "held_out", "mix", "optimizer", "tokens_seen", "throughput"}
    assert set(scalars(run, "loss/train")) == set(range(1, STEPS + 1))
    assert set(scalars(run, "loss/held_out_wiki")) == {12, 20, 26}
    assert set(scalars(run, "held_out/wiki")) == {0, 3, 6, 8, 11, 12, 13, 16, 19, 20, 21, 24, 26}
    assert scalars(run, "optimizer/step") == {step: float(step) for step in range(STEPS + 1)}
    assert scalars(run, "mix/stage") == {step: 1.0 + (step >= 12) + (step >= 20) for step in range(STEPS + 1)}
    assert sum(scalars(run, "mix/web").values()) * 8 == scalars(run, "tokens_seen/web")[STEPS] / 32
    # Rate of step k: 10 % of the peak at a quarter of the warm-up, the final one at the end.
    rates = scalars(run, "optimizer/learning_rate")
    assert rates[1] == pytest.approx(0.01 * 256 / 1000, rel=1e-5)
    assert rates[STEPS] == pytest.approx(0.001, rel=1e-5)
    assert {"run/plan/text_summary", "samples/1_The_river/text_summary"} <= set(events.Tags()["tensors"])


@pytest.mark.parametrize("tokenizer", ["danube-small", pytest.param("mistral", marks=pytest.mark.medium)])
def test_the_loss_curve_is_the_golden_one(tokenizer: str, tiny: Path) -> None:
    """A refactoring must not move it. Kernels of other processors differ in the last bits of a float32, and 26 steps
    at a high rate amplify that: 1e-3 is far above it and far below what any change of order or formula does."""
    fit(tiny, "--data.init_args.tokenizer", tokenizer)
    losses = scalars(run_directory(tiny), "loss/train")
    golden = [float(line) for line in (GOLDENS / f"{tokenizer}.txt").read_text().splitlines() if line[0] != "#"]
    assert list(losses.values()) == pytest.approx(golden, rel=1e-3)


@pytest.mark.medium
@pytest.mark.parametrize(
    ("stop", "options"),
    [
        (8, []),  # inside the first stage, and as if killed: the newest checkpoint is that of step 5
        (12, []),  # exactly at a stage's end
        pytest.param(16, ["--data.init_args.micro_batch_size", "2"], marks=pytest.mark.slow),  # accumulating four
        (8, MUON),
        (23, ["--data.init_args.workers", "1", "--model.init_args.decoder.attention_dropout", "0.1"]),
        # Weights that a float32 module would round when it loads them.
        pytest.param(8, ["--trainer.precision", "64-true"], marks=pytest.mark.slow),
    ],
)
def test_going_on_equals_never_having_stopped(tiny: Path, stop: int, options: list[str]) -> None:
    assert fit(tiny, *options) == 0
    assert fit(tiny, *options, "--name", "stopped", "--trainer.max_steps", str(stop)) == 0
    stopped = tiny / "runs" / "stopped" / "version_0"
    if stop == 8:
        (stopped / "checkpoints" / "step_00000008.ckpt").unlink()
    assert fit(tiny, *options, "--name", "stopped", "--ckpt_path", "last") == 0
    assert not (tiny / "runs" / "stopped" / "version_1").exists()
    assert_same_training_state(run_directory(tiny) / "checkpoints" / LAST, stopped / "checkpoints" / LAST)
    for tag in (
        "loss/train",
        "optimizer/learning_rate",
        "optimizer/gradient_norm",
        "loss/held_out_web",
        "tokens_seen/wiki",
    ):
        assert scalars(stopped, tag) == scalars(run_directory(tiny), tag), tag
    full, resumed = (json.loads((run / "summary.json").read_text()) for run in (run_directory(tiny), stopped))
    assert resumed["stages"] == full["stages"]


@pytest.mark.medium
def test_a_run_that_a_timer_ends_is_saved_at_its_last_step(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Though the timer runs out between two steps, and the next checkpoint would come later."""
    config = tiny / "tiny.yaml"
    text = config.read_text()
    accumulated = ["--data.init_args.micro_batch_size", "2"]
    assert fit(tiny, *accumulated) == 0
    config.write_text(text + "    - class_path: tests.probes.StopAt\n      init_args: {micro_batch: 25}\n")
    assert fit(tiny, *accumulated, "--name", "stopped") == 0
    stopped = tiny / "runs" / "stopped" / "version_0"
    assert newest_checkpoint(stopped) == stopped / "checkpoints" / "step_00000007.ckpt"
    assert "stopped after 7 of 26 steps; the last checkpoint is of step 7\nrun:  " in capsys.readouterr().out
    config.write_text(text)
    assert fit(tiny, *accumulated, "--name", "stopped", "--ckpt_path", "last", "--trainer.max_steps", "7") == 0
    said = capsys.readouterr().out
    assert "has 7 of 26 steps, and trainer.max_steps is 7; nothing is left to do" in said
    last = stopped.relative_to(tiny) / "checkpoints" / "step_00000007.ckpt"
    assert re.search(rf"--ckpt_path last: .*{re.escape(str(last))}; the run continues in the same version\n", said)
    assert fit(tiny, *accumulated, "--name", "stopped", "--ckpt_path", "last") == 0
    assert_same_training_state(run_directory(tiny) / "checkpoints" / LAST, stopped / "checkpoints" / LAST)


@pytest.mark.medium
def test_accumulation_changes_memory_not_the_result(tiny: Path) -> None:
    fit(tiny)
    fit(tiny, "--name", "accumulated", "--data.init_args.micro_batch_size", "2")
    once = scalars(run_directory(tiny), "loss/train")
    accumulated = scalars(tiny / "runs" / "accumulated" / "version_0", "loss/train")
    # The same samples in each step; sums in another order, in float32.
    assert list(accumulated.values()) == pytest.approx(list(once.values()), rel=1e-3)


@pytest.mark.slow
def test_compiled_blocks_change_speed_not_the_result(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--trainer.precision", "64-true", "--trainer.max_steps", "12"]
    for name, more in {"plain": [], "compiled": ["--model.init_args.compile_blocks", "true"]}.items():
        assert fit(tiny, "--name", name, *options, *more) == 0
    assert capsys.readouterr().out.count("its blocks are compiled at the first step") == 1
    losses = [scalars(tiny / "runs" / name / "version_0", "loss/train") for name in ("plain", "compiled")]
    assert len(losses[0]) == 12 and losses[1] == pytest.approx(losses[0], rel=1e-6)


def test_without_a_compiler_blocks_are_not_compiled(
    tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert fit(tiny, "--name", "compiled", "--model.init_args.compile_blocks", "true") == 2
    assert "needs a C++ compiler on a CPU, and there is no no-such-compiler: install" in capsys.readouterr().err


@pytest.mark.medium
def test_the_saved_config_replays_the_run(tiny: Path) -> None:
    fit(tiny)
    assert main(["fit", "--config", str(run_directory(tiny) / "config.yaml")]) == 0
    assert_same_training_state(
        run_directory(tiny) / "checkpoints" / LAST, run_directory(tiny, version=1) / "checkpoints" / LAST
    )


@pytest.mark.medium
def test_a_finished_run_says_so(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(tiny)
    before = (run_directory(tiny) / "checkpoints" / LAST).read_bytes()
    assert fit(tiny, "--ckpt_path", "last") == 0
    assert "is complete: 26 of 26 steps" in capsys.readouterr().out
    assert (run_directory(tiny) / "checkpoints" / LAST).read_bytes() == before


@pytest.mark.medium
def test_validation_between_stage_ends_changes_nothing_else(tiny: Path) -> None:
    fit(tiny)
    config = (tiny / "tiny.yaml").read_text()
    (tiny / "tiny.yaml").write_text(
        config.replace(
            "lightning_danube.callbacks.CurriculumStages",
            "lightning_danube.callbacks.CurriculumStages\n      init_args: {validate_every: 1K}",
        )
    )
    assert fit(tiny, "--name", "watched") == 0
    watched = tiny / "runs" / "watched" / "version_0"
    assert set(scalars(watched, "loss/held_out_web")) == {4, 8, 12, 16, 20, 24, 26}
    assert_same_training_state(run_directory(tiny) / "checkpoints" / LAST, watched / "checkpoints" / LAST)


@pytest.mark.medium
def test_validate_test_and_predict_agree_with_training(tiny: Path) -> None:
    fit(tiny)
    trained = json.loads((run_directory(tiny) / "summary.json").read_text())
    for verb in ("validate", "test", "predict"):
        assert main([verb, "--config", str(tiny / "tiny.yaml"), "--ckpt_path", "last"]) == 0
    validated = json.loads((tiny / "runs" / "tiny-validate" / "version_0" / "summary.json").read_text())
    assert validated["val_loss"] == trained["val_loss"]
    assert validated["val_tokens"]["web"] == 8 * 32
    tested = json.loads((tiny / "runs" / "tiny-test" / "version_0" / "summary.json").read_text())
    assert tested["val_tokens"]["web"] > 8 * 32


@pytest.mark.medium
def test_predictions_are_the_rows_behind_the_test_loss(tiny: Path) -> None:
    config = (tiny / "tiny.yaml").read_text() + "    - class_path: lightning_danube.callbacks.Predictions\n"
    (tiny / "tiny.yaml").write_text(config)
    fit(tiny)
    for verb in ("test", "predict"):
        assert main([verb, "--config", str(tiny / "tiny.yaml"), "--ckpt_path", "last"]) == 0
    tested = json.loads((tiny / "runs" / "tiny-test" / "version_0" / "summary.json").read_text())
    lines = (tiny / "runs" / "tiny-predict" / "version_0" / "predictions.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    for source, loss in tested["val_loss"].items():
        mine = [row for row in rows if row["source"] == source]
        assert sum(row["tokens"] for row in mine) == tested["val_tokens"][source]
        # The test sums in float32, the rows in float64.
        mean = sum(row["loss"] * row["tokens"] for row in mine) / tested["val_tokens"][source]
        assert mean == pytest.approx(loss, rel=1e-5)
    assert all(len(row["text"].split()) > 3 for row in rows)


@pytest.mark.medium
def test_the_export_generates_in_transformers_what_generate_prints(
    tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    fit(tiny)
    out = tiny / "hf"
    assert main(["export", "--weights", str(run_directory(tiny)), "--format", "hf", "--out", str(out)]) == 0
    capsys.readouterr()
    prompt = ["--prompt", "The river", "--max-new-tokens", "12", "--temperature", "0"]
    for weights in (run_directory(tiny), run_directory(tiny) / "checkpoints" / LAST, out):
        assert main(["generate", "--weights", str(weights), *prompt]) == 0
    ours, from_file, from_hf = capsys.readouterr().out.rstrip("\n").split("\nThe river")
    assert ours.removeprefix("The river") == from_file == from_hf

    model: Any = AutoModelForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer("The river", add_special_tokens=False).input_ids]])
    theirs = model.generate(ids, max_new_tokens=12, do_sample=False)
    assert tokenizer.decode(theirs[0], skip_special_tokens=True) == ours
    decoder = load_checkpoint(run_directory(tiny) / "checkpoints" / LAST).eval()
    with torch.no_grad():
        difference = (decoder(ids) - model(ids).logits).abs().max()
    # Logits of order 10 in float32: a few units in the last place of 1e-6 each.
    assert difference < 2e-5
    assert load_hf_tokenizer(str(out)).backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


@pytest.mark.medium
def test_document_masks_reach_the_model(tiny: Path) -> None:
    fit(tiny)
    assert fit(tiny, "--name", "masked", "--data.init_args.document_masks", "true") == 0
    plain, masked = (
        json.loads((run / "summary.json").read_text())["val_loss"]["web"]
        for run in (run_directory(tiny), tiny / "runs" / "masked" / "version_0")
    )
    assert plain != masked


def test_the_newest_checkpoint_is_that_of_most_steps(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    for name in ("step_00000100.ckpt", "stage_1_web_step_00000090.ckpt", "step_00000020.ckpt", "notes.ckpt"):
        (tmp_path / "checkpoints" / name).touch()
    newest = newest_checkpoint(tmp_path)
    assert newest is not None and newest.name == "step_00000100.ckpt"


@pytest.mark.medium
def test_a_run_cut_short_says_where_it_stopped(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit(tiny, "--trainer.limit_train_batches", "3") == 0
    assert "stopped after 3 of 26 steps; nothing was saved" in capsys.readouterr().out
    assert fit(tiny, "--name", "longer", "--trainer.limit_train_batches", "7") == 0
    assert "stopped after 7 of 26 steps; the last checkpoint is of step 5" in capsys.readouterr().out
    assert json.loads((run_directory(tiny) / "summary.json").read_text())["tokens"] == 3 * 256


def test_fast_dev_run_writes_nothing(tiny: Path) -> None:
    assert fit(tiny, "--trainer.fast_dev_run", "true") == 0
    assert not (tiny / "runs").exists()


@pytest.mark.medium
def test_without_a_logger_the_run_has_its_place_all_the_same(tiny: Path) -> None:
    assert fit(tiny, "--trainer.logger", "false") == 0
    assert {path.name for path in run_directory(tiny).iterdir()} == {
        "checkpoints",
        "config.yaml",
        "history.jsonl",
        "summary.json",
    }
