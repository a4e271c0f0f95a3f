import re
from pathlib import Path

import pytest

from lightning_danube.__main__ import main
from lightning_danube.callbacks import StepTimes


def test_the_parts_of_a_step_are_told_at_the_end_of_fit(tiny: Path, capfd: pytest.CaptureFixture[str]) -> None:
    profiler = ["--trainer.profiler", "lightning_danube.callbacks.StepTimes"]
    assert main(["fit", "--config", str(tiny / "tiny.yaml"), "--trainer.max_steps", "5", *profiler]) == 0
    printed = capfd.readouterr().out
    assert "where 5 steps' time went" in printed
    shares = {
        name.strip(): float(share) for name, share in re.findall(r"(?m)^(\w[\w ]*?) +[\d.]+ +([\d.]+) %$", printed)
    }
    names = ("data", "forward", "loss", "backward", "clip", "optimizer", "callbacks", "logging", "rest", "whole step")
    assert tuple(shares) == names
    # Nine numbers, each rounded to a tenth.
    assert sum(shares[name] for name in names[:-1]) == pytest.approx(100, abs=0.5)
    assert min(shares[name] for name in ("forward", "loss", "backward", "optimizer")) > 0


def test_a_part_is_the_sum_of_its_hooks_and_nothing_is_counted_twice() -> None:
    profiler = StepTimes()
    profiler.recorded_durations |= {
        "run_training_batch": [10.0],
        "decoder": [1.0],
        "[Strategy]SingleDeviceStrategy.training_step": [3.0],
        "[Strategy]SingleDeviceStrategy.backward": [4.0],
        "[LightningModule]Pretraining.configure_gradient_clipping": [0.5],
        "[LightningModule]Pretraining.optimizer_step": [9.0],
        "[Callback]A.on_train_batch_end": [0.25],
        "[Callback]B.on_train_batch_end": [0.5],
        "[Callback]B.on_validation_end": [100.0],
        "[_TrainingEpochLoop].train_dataloader_next": [0.125],
    }
    assert profiler.parts() == {
        "data": 0.125,
        "forward": 1.0,
        "loss": 2.0,
        "backward": 4.0,
        "clip": 0.5,
        "optimizer": 1.5,
        "callbacks": 0.75,
        "logging": 0.0,
        "rest": 1.0,
    }


def test_lightnings_own_profiler_is_heard(tiny: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = ["--trainer.max_steps", "2", "--trainer.profiler", "simple"]
    assert main(["fit", "--config", str(tiny / "tiny.yaml"), *options]) == 0
    assert "run_training_batch" in caplog.text


def test_lightnings_profiler_still_keeps_its_rank_in_a_private_attribute() -> None:
    profiler = StepTimes()
    profiler.setup("fit", local_rank=3)
    assert profiler._local_rank == 3


def test_times_are_means_over_the_steps() -> None:
    profiler = StepTimes()
    assert profiler.summary() == ""
    profiler.recorded_durations |= {
        "run_training_batch": [0.2, 0.3],
        "decoder": [0.01, 0.03],
        "[Strategy]SingleDeviceStrategy.training_step": [0.05, 0.05],
        "[Strategy]SingleDeviceStrategy.backward": [0.1, 0.1],
        "[LightningModule]Pretraining.optimizer_step": [0.2, 0.2],
        "[_TrainingEpochLoop].train_dataloader_next": [0.25, 0.25],
    }
    rows = {line[:12].strip(): line[12:].split() for line in profiler.summary().splitlines()}
    assert rows["where 2 step"] and rows["whole step"] == ["500.00", "100", "%"]
    assert rows["data"] == ["250.00", "50.0", "%"] and rows["forward"] == ["20.00", "4.0", "%"]
    assert rows["loss"] == ["30.00", "6.0", "%"] and rows["optimizer"] == ["50.00", "10.0", "%"]
