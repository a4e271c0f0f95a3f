"""A bad optimizer step leaves no trace in the model, and its samples are on record."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lightning_danube.__main__ import main
from lightning_danube.callbacks import SkipBadSteps
from lightning_danube.pretraining.curriculum import SampleKey
from lightning_danube.training.bad_steps import BadSteps, TrainingStopped
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
        pytest.param("{steps: [4], what: gradient}", [], "gradient is not finite", marks=pytest.mark.medium),
        pytest.param(
            "{steps: [4], what: loss, micro_batch: 2}",
            ["--data.init_args.micro_batch_size", "2"],
            "loss is not finite",
            marks=pytest.mark.medium,
        ),
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
    assert json.loads((run / "summary.json").read_text())["skipped_steps"] == 1
    assert f"step 4 skipped: {cause}" in capsys.readouterr().out


@pytest.mark.medium
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


@pytest.mark.medium
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


def decided(steps: BadSteps, *losses: float) -> list[bool]:
    """Returns for each loss whether its step is skipped."""
    found = []
    for step, loss in enumerate(losses, start=1):
        found.append(bool(steps.verdict(torch.tensor(loss), torch.tensor(1.0))))
        steps.take(step)
    return found


def test_only_a_rise_of_the_loss_is_a_spike() -> None:
    steps = BadSteps(spike_deviations=2, spike_window=4)
    assert decided(steps, 1.0, 2.0, 3.0, 4.0, -50.0, 4.0) == [False] * 6


def test_the_window_holds_the_newest_losses_that_counted() -> None:
    """Against numpy: a loss is a spike if it lies above the mean plus three deviations of the 5 losses before it."""
    draw = np.random.default_rng(0)
    losses = (3.0 - 0.01 * np.arange(200) + 0.1 * draw.standard_t(2, 200)).tolist()
    losses[20] = losses[60] = float("nan")
    window: list[float] = []
    expected = []
    for loss in losses:
        recent = window[-5:]
        spike = len(recent) == 5 and loss > np.mean(recent) + 3 * np.std(recent, ddof=1)
        expected.append(bool(np.isnan(loss) or spike))
        if not expected[-1]:
            window.append(loss)
    assert 5 < sum(expected) < 60
    steps = BadSteps(spike_deviations=3, spike_window=5)
    assert decided(steps, *losses) == expected
    assert len(list(steps.read())) == steps.skipped == sum(expected)


def test_losses_that_are_not_finite_do_not_fill_the_window() -> None:
    nan = float("nan")
    steps = BadSteps(spike_deviations=1, spike_window=3)
    assert decided(steps, nan, nan, 1.0, nan, 1.1, 99.0, 5000.0) == [True, True, False, True, False, False, True]


def skipping(trainer: Any, task: Any, *losses: float, **options: Any) -> SkipBadSteps:
    """Makes steps of two micro-batches with these losses."""
    trainer.strategy = SimpleNamespace(root_device=torch.device("cpu"))
    callback = SkipBadSteps(**options)
    callback.on_train_start(trainer, task)
    for loss in losses:
        for batch_idx in (0, 1):
            if batch_idx:
                trainer.global_step += 1
                task.step_verdict(torch.tensor(loss), torch.tensor(1.0))
            callback.on_train_batch_end(trainer, task, None, None, batch_idx)
    return callback


def test_a_bad_step_is_on_record_with_its_own_samples(trainer: Any, task: Any, tmp_path: Path) -> None:
    """A step has 8 samples: those of step 3 are 16 to 23."""
    nan = float("nan")
    skipping(trainer, task, 3.0, 3.0, nan, 3.0, nan, 3.0)
    curriculum = trainer.datamodule.curriculum
    assert [(record["step"], record["samples"]) for record in skipped(tmp_path)] == [
        (step, [curriculum.described(curriculum[n]) for n in range(8 * step - 8, 8 * step)]) for step in (3, 5)
    ]
    assert trainer.loggers[0].rows == [
        (step, {"optimizer/skipped_steps": count}) for step, count in enumerate([0.0, 0.0, 1.0, 1.0, 2.0, 2.0], start=1)
    ]
    assert task.run_facts.skipped_steps() == 2


@pytest.mark.parametrize("stop_after", [1, 3])
def test_a_row_of_bad_steps_ends_the_run(stop_after: int, trainer: Any, task: Any, tmp_path: Path) -> None:
    nan = float("nan")
    skipping(trainer, task, *[3.0, *[nan] * (stop_after - 1)] * 2, stop_after=stop_after)
    (tmp_path / "skipped.jsonl").unlink(missing_ok=True)
    trainer.global_step = 0
    with pytest.raises(
        TrainingStopped, match=rf"^{stop_after} optimizer steps? in a row (was|were) skipped, up to step"
    ):
        skipping(trainer, task, 3.0, *[nan] * stop_after, stop_after=stop_after)
    assert len(skipped(tmp_path)) == stop_after


def test_a_resumed_run_goes_on_counting_skipped_steps(trainer: Any, task: Any) -> None:
    nan = float("nan")
    checkpoint: dict[str, Any] = {}
    skipping(trainer, task, 3.0, nan, nan).on_save_checkpoint(trainer, task, checkpoint)
    after = skipping(trainer, task)
    after.on_load_checkpoint(trainer, task, checkpoint)
    assert task.run_facts.skipped_steps() == 2
    trainer.global_step = 4
    task.step_verdict(torch.tensor(nan), torch.tensor(1.0))
    after.on_train_batch_end(trainer, task, None, None, 1)
    assert task.run_facts.skipped_steps() == 3
    # An evaluation of the checkpoint is not told how often its training skipped.
    trainer.state.fn = "validate"
    other = SkipBadSteps()
    other.on_load_checkpoint(trainer, task, checkpoint)
    assert other._steps.skipped == 0
