"""A bad optimizer step leaves no trace in the model, and its samples are on record."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_danube.__main__ import main
from lightning_danube.callbacks import SkipBadSteps
from lightning_danube.pretraining.curriculum import SampleKey
from tests.probes import samples_of_steps


def fit(tiny: Path, name: str, *options: str, poison: str = "", skip: str = "{}", every: int = 1) -> int:
    """A run with SkipBadSteps, a checkpoint after each step, and the samples of each step on record."""
    config = (tiny / "tiny.yaml").read_text().replace("every_n_steps: 5", f"every_n_steps: {every}, keep: 100")
    head, tail = config.split("    - class_path: lightning_danube.callbacks.Checkpoints")
    head += f"    - class_path: lightning_danube.callbacks.SkipBadSteps\n      init_args: {skip}\n"
    head += f"    - class_path: tests.probes.KeysOfSteps\n      init_args: {{directory: {tiny}/keys-{name}}}\n"
    if poison:
        head += f"    - class_path: tests.probes.Poison\n      init_args: {poison}\n"
    (tiny / f"{name}.yaml").write_text(head + "    - class_path: lightning_danube.callbacks.Checkpoints" + tail)
    return main(["fit", "--config", str(tiny / f"{name}.yaml"), "--name", name, *options])


def run_of(tiny: Path, name: str) -> Path:
    return tiny / "runs" / name / "version_0"


def checkpoint(run: Path, step: int) -> dict[str, Any]:
    (path,) = (run / "checkpoints").glob(f"*step_{step:08d}.ckpt")
    loaded: dict[str, Any] = torch.load(path, weights_only=True)
    return loaded


def same_model(left: dict[str, Any], right: dict[str, Any]) -> bool:
    """Whether weights and optimizer state are bitwise the same."""
    pairs = [(tensor, right["state_dict"][name]) for name, tensor in left["state_dict"].items()]
    for index, state in left["optimizer_states"][0]["state"].items():
        pairs += [(tensor, right["optimizer_states"][0]["state"][index][name]) for name, tensor in state.items()]
    return all(torch.equal(a, b) for a, b in pairs)


def skipped(run: Path) -> list[dict[str, Any]]:
    path = run / "skipped.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.parametrize(
    ("poison", "options", "cause"),
    [
        ("{steps: [4], what: loss}", [], "loss is not finite"),
        ("{steps: [4], what: gradient}", [], "gradient is not finite"),
        ("{steps: [4], what: loss, micro_batch: 2}", ["--data.init_args.micro_batch_size", "2"], "loss is not finite"),
    ],
)
def test_a_bad_step_changes_nothing_and_counts(
    tiny: Path, capsys: pytest.CaptureFixture[str], poison: str, options: list[str], cause: str
) -> None:
    assert fit(tiny, "bad", "--trainer.max_steps", "6", *options, poison=poison) == 0
    run = run_of(tiny, "bad")
    assert same_model(checkpoint(run, 3), checkpoint(run, 4))
    assert not same_model(checkpoint(run, 4), checkpoint(run, 5))
    for tensor in checkpoint(run, 6)["state_dict"].values():
        assert torch.isfinite(tensor).all()
    # The step counts: place in the data, schedule and ledger are those of four steps.
    assert checkpoint(run, 4)["CurriculumData"]["samples"] == 4 * 8
    assert checkpoint(run, 4)["lr_schedulers"][0]["last_epoch"] == 4
    (record,) = skipped(run)
    assert record["step"] == 4 and record["cause"] == cause
    names = {"foundation": 0}, {"web": 0, "wiki": 1}
    said = [[names[0][s["stage"]], names[1][s["source"]], s["epoch"], s["row"]] for s in record["samples"]]
    assert said == samples_of_steps(tiny / "keys-bad")[3]
    assert len(said) == 8 and SampleKey(*said[0])
    summary = json.loads((run / "summary.json").read_text()) if (run / "summary.json").exists() else {}
    assert summary.get("skipped_steps", 1) == 1
    assert f"step 4 skipped: {cause}" in capsys.readouterr().out


def test_good_steps_are_left_alone(tiny: Path) -> None:
    """With the callback on, a healthy run is bitwise the run without it."""
    assert fit(tiny, "guarded", "--trainer.max_steps", "6", skip="{spike_deviations: 50, spike_window: 2}") == 0
    assert main(["fit", "--config", str(tiny / "tiny.yaml"), "--trainer.max_steps", "6"]) == 0
    (plain,) = (run_of(tiny, "tiny") / "checkpoints").glob("*step_00000005.ckpt")
    assert same_model(torch.load(plain, weights_only=True), checkpoint(run_of(tiny, "guarded"), 5))
    assert skipped(run_of(tiny, "guarded")) == []


def test_bad_steps_in_a_row_stop_the_run_and_name_the_last_good_checkpoint(
    tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = fit(tiny, "stuck", poison="{steps: [3, 5, 6, 7], what: loss}", skip="{stop_after: 3}", every=4)
    assert code == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: 3 optimizer steps in a row were skipped, up to step 7")
    assert error.endswith(f"the last good checkpoint is {run_of(tiny, 'stuck')}/checkpoints/step_00000004.ckpt")
    assert "\n" not in error
    assert [record["step"] for record in skipped(run_of(tiny, "stuck"))] == [3, 5, 6, 7]


def test_a_leap_of_the_loss_is_skipped_also_right_after_a_resume(tiny: Path) -> None:
    """The window of losses is in the checkpoint: without it the resumed run would not know a spike at its first step.
    What was done again after the checkpoint is written once."""
    spikes, skip = "{steps: [2, 8], what: spike}", "{spike_deviations: 6, spike_window: 4}"
    assert fit(tiny, "spiky", "--trainer.max_steps", "8", poison=spikes, skip=skip, every=7) == 0
    (record,) = skipped(run_of(tiny, "spiky"))  # at step 2 the window was not full
    assert record["step"] == 8 and record["cause"] == "spike"
    options = ["--ckpt_path", "last", "--trainer.max_steps", "9"]
    assert fit(tiny, "spiky", *options, poison=spikes, skip=skip, every=7) == 0
    assert [record["step"] for record in skipped(run_of(tiny, "spiky"))] == [8]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stop_after": 0}, "stop_after is 0: give the number of skipped steps in a row"),
        ({"spike_deviations": -1.0}, "spike_deviations is -1.0: give a positive number"),
        ({"spike_window": 1}, "spike_window is 1: a deviation needs at least 2 losses"),
    ],
)
def test_options_out_of_range_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SkipBadSteps(**arguments)
