"""What the callbacks do beyond what tests/pretraining/test_run.py sees in whole runs."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_danube.__main__ import main
from lightning_danube.callbacks import Checkpoints, CurriculumStages, Judge, Throughput
from lightning_danube.callbacks.summaries.pretraining import pretraining_data_of


def test_other_data_is_refused_by_name() -> None:
    trainer = Trainer(
        accelerator="cpu", callbacks=[CurriculumStages()], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    with pytest.raises(ValueError, match="this callback counts the stages of CurriculumData"):
        trainer.fit(BoringModel())


def test_data_of_another_task_are_refused_by_name() -> None:
    trainer: Any = SimpleNamespace(datamodule=None)
    with pytest.raises(ValueError, match="PretrainingSummary reports on CurriculumData: remove it, or use that data m"):
        pretraining_data_of(trainer)
    task: Any = None
    with pytest.raises(ValueError, match="Judge grades the answers of EvaluationData: remove it, or use that data mod"):
        Judge("http://localhost:1/v1", "judge").on_test_batch_end(trainer, task, None, 0, 0)


@pytest.mark.parametrize("flops", [0.0, -1.0])
def test_a_peak_that_is_none_is_refused(flops: float) -> None:
    with pytest.raises(ValueError, match=r"peak_flops is .*: give the device's dense peak in FLOP/s, such as 989e12"):
        Throughput(peak_flops=flops)


def test_intervals_that_never_come_are_refused() -> None:
    with pytest.raises(ValueError, match="every_n_steps is 0 and keep is 2: both must be at least 1"):
        Checkpoints(every_n_steps=0)
    with pytest.raises(ValueError, match="validate_every is 'often': give tokens such as"):
        CurriculumStages(validate_every="often")


@pytest.mark.medium
def test_a_first_step_may_take_longer_than_a_line(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny / "tiny.yaml"
    always = "lightning_danube.callbacks.Progress\n      init_args: {seconds_between_lines: 0.0}\n"
    config.write_text(config.read_text().replace("lightning_danube.callbacks.Progress\n", always))
    accumulated = ["--data.init_args.micro_batch_size", "1", "--trainer.max_steps", "2"]
    assert main(["fit", "--config", str(config), *accumulated]) == 0
    lines = [line.split()[0] for line in capsys.readouterr().out.splitlines() if " of 512 tokens" in line]
    assert "0" not in lines and lines.count("256") == 8 and lines[-1] == "512", "a line for each micro-batch after it"


@pytest.mark.medium
def test_a_run_that_ends_early_says_so_from_the_start(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny / "tiny.yaml"
    always = "lightning_danube.callbacks.Progress\n      init_args: {seconds_between_lines: 0.0}\n"
    config.write_text(config.read_text().replace("lightning_danube.callbacks.Progress\n", always))
    assert main(["fit", "--config", str(config), "--trainer.max_steps", "5", "--trainer.log_every_n_steps", "2"]) == 0
    said = capsys.readouterr().out
    assert "run: 1,280 of 6,656 tokens in 5 of 26 steps of 256 (" in said
    assert "stopped after 5 of 26 steps; " in said
    lines = [line.split(", ")[:2] for line in said.splitlines() if " of 1,280 tokens" in line]
    # Losses are logged after steps 1, 2 and 4, when the line of that step is out: the next one says it, and no other.
    with_loss = [line.split()[0] for line, second in lines if second.startswith("loss ")]
    assert with_loss == ["512", "768", "1,280"]
    assert main(["fit", "--config", str(config), "--trainer.max_steps", "500"]) == 0
    assert "run: 6,656 tokens in 26 steps of 256 (" in capsys.readouterr().out


@pytest.mark.medium
def test_nothing_is_logged_where_that_is_asked_for(tiny: Path) -> None:
    config = ["--config", str(tiny / "tiny.yaml"), "--trainer.max_steps", "2", "--trainer.log_every_n_steps"]
    for every in ("0", "1"):
        assert main(["fit", *config, every, "--name", f"every-{every}"]) == 0
    silent, loud = (
        EventAccumulator(str(tiny / "runs" / f"every-{every}" / "version_0")).Reload().Tags()["scalars"]
        for every in "01"
    )
    assert "loss/train" in loud and "loss/train" not in silent


@pytest.mark.medium
def test_a_summary_without_a_ledger_says_what_is_missing(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny / "tiny.yaml"
    config.write_text(config.read_text().replace("    - class_path: lightning_danube.callbacks.TokenLedger\n", ""))
    assert main(["fit", "--config", str(config)]) == 2
    assert "name lightning_danube.callbacks.TokenLedger in trainer.callbacks" in capsys.readouterr().err


@pytest.mark.medium
def test_a_sample_prompt_longer_than_the_context_is_named(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny / "tiny.yaml"
    config.write_text(config.read_text().replace("The river", "The river " * 40))
    assert main(["fit", "--config", str(config)]) == 2
    assert "tokens, the context 32" in capsys.readouterr().err


@pytest.mark.medium
def test_old_checkpoints_go_and_stage_ends_stay(tiny: Path) -> None:
    config = tiny / "tiny.yaml"
    config.write_text(config.read_text().replace("every_n_steps: 5", "every_n_steps: 2, keep: 2"))
    assert main(["fit", "--config", str(config), "--trainer.max_steps", "19"]) == 0
    names = sorted(path.name for path in (tiny / "runs/tiny/version_0/checkpoints").glob("*.ckpt"))
    # The last two of every second step; the run ends at another one, and is saved there.
    assert names == ["stage_1_foundation_step_00000012.ckpt", "step_00000018.ckpt", "step_00000019.ckpt"]
