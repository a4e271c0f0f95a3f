"""What summaries report of a run: its seconds over all sessions, its losses, and what they were measured on."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_danube.callbacks import (
    ChatSummary,
    ClassificationSummary,
    PreferenceSummary,
    PretrainingSummary,
    TokenLedger,
)
from lightning_danube.callbacks.summaries import chat as chat_summary
from lightning_danube.callbacks.summaries import classification as classification_summary
from lightning_danube.callbacks.summaries import preferences as preference_summary
from lightning_danube.callbacks.summaries.run import RunSummary
from lightning_danube.chat.data import ChatData
from lightning_danube.chat.preference_data import PreferenceData
from lightning_danube.checkpoints.single import DurableCheckpointIO
from lightning_danube.pretraining.data import CurriculumData
from lightning_danube.training.task import DecoderTask
from tests.callbacks.conftest import Clock

SUMMARIES = [PretrainingSummary, ChatSummary, PreferenceSummary, ClassificationSummary]


def summary_of(directory: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((directory / "summary.json").read_text("utf-8"))
    return summary


# --- seconds ----------------------------------------------------------------------------------------------------------


def test_seconds_are_those_of_all_sessions_without_their_set_up(trainer: Any, task: DecoderTask, clock: Clock) -> None:
    first = RunSummary()
    clock.now += 50.0  # until the data are ready
    first.on_fit_start(trainer, task)
    clock.now += 7.0
    saved = first.state_dict()
    clock.now += 3600.0
    second = RunSummary()
    second.load_state_dict(saved)
    clock.now += 20.0
    second.on_fit_start(trainer, task)
    clock.now += 5.0
    assert saved == {"seconds": 7.0} and second._trained(trainer).seconds == 12.0
    clock.now += 1.0
    assert second.state_dict() == {"seconds": 13.0}


def test_the_last_checkpoint_is_on_the_disk_before_a_run_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """The report looks for a checkpoint, and a GPU run writes it in the background."""
    done: list[str] = []
    plugin = DurableCheckpointIO(background=True)
    monkeypatch.setattr(plugin, "wait", lambda: done.append("waited"))
    summary = RunSummary()
    monkeypatch.setattr(summary, "_report_fit", lambda *_: done.append("reported"))
    trainer: Any = SimpleNamespace(global_step=5, strategy=SimpleNamespace(checkpoint_io=plugin))
    summary.on_train_end(trainer, Any)  # type: ignore[arg-type]
    assert done == ["waited", "reported"]


@pytest.mark.parametrize("kind", SUMMARIES)
def test_every_summary_goes_on_counting_after_a_resume(kind: type[RunSummary], clock: Clock) -> None:
    first, second = kind(), kind()
    clock.now += 60.0
    saved = first.state_dict()
    second.load_state_dict(saved)
    second._clock.start()
    clock.now += 5.0
    assert second.state_dict()["seconds"] == 65.0
    assert second.state_dict() == {**saved, "seconds": 65.0}


def test_fine_tuning_is_timed_from_its_start(
    trainer: Any, task: DecoderTask, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_summary, "chat_length_line", lambda *arguments: "run: …")
    trainer.datamodule = chat_data()
    summary = ChatSummary()
    clock.now += 50.0
    summary.on_fit_start(trainer, task)
    clock.now += 3.0
    assert summary.state_dict()["seconds"] == 3.0


def test_the_time_of_preference_tuning_holds_the_reference(
    trainer: Any, task: DecoderTask, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("reference_line", "pair_length_line"):
        monkeypatch.setattr(preference_summary, name, lambda *arguments: "…")
    trainer.datamodule = preference_data()
    summary = PreferenceSummary()
    clock.now += 50.0
    summary.setup(trainer, task, "fit")
    clock.now += 30.0  # the reference
    summary.on_fit_start(trainer, task)
    clock.now += 3.0
    assert summary.state_dict()["seconds"] == 33.0


# --- pre-training -----------------------------------------------------------------------------------------------------


@pytest.fixture
def measured(data: CurriculumData, monkeypatch: pytest.MonkeyPatch) -> list[int | None]:
    """Data with held-out text: 10 tokens a row, of 35 bytes. Returns for which numbers of rows the data were asked."""
    asked: list[int | None] = []

    def tokens(rows: int | None) -> dict[str, int]:
        asked.append(rows)
        return {"web": 10 * (rows or 100), "wiki": 20}

    data.validation_rows, data.shards = 3, {}
    monkeypatch.setattr(data, "evaluation_tokens", tokens)
    monkeypatch.setattr(data, "evaluation_bytes", lambda rows: {"web": 35 * (rows or 100), "wiki": 100})
    monkeypatch.setattr(data, "unigram_losses", lambda: {"web": 9.0, "wiki": 8.0})
    return asked


def losses(web: float, wiki: float) -> dict[str, torch.Tensor]:
    return {"loss/held_out_web": torch.tensor(web), "loss/held_out_wiki": torch.tensor(wiki), "x": torch.tensor(0.0)}


@pytest.mark.parametrize(("verb", "rows"), [("validate", 3), ("test", None)])
def test_an_evaluation_reports_perplexity_and_bits_a_byte(
    verb: str, rows: int | None, measured: list[int | None], trainer: Any, task: DecoderTask, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    trainer.state.fn = verb
    trainer.callback_metrics = losses(math.log(64.0), 1.5)
    summary = PretrainingSummary()
    summary.on_validation_end(trainer, task) if verb == "validate" else summary.on_test_end(trainer, task)
    found = summary_of(tmp_path)
    assert found["perplexity"] == pytest.approx({"web": 64.0, "wiki": np.e**1.5}, rel=1e-6)
    # 64 = 2^6, so a token has 6 bits.
    assert found["val_bits_per_byte"] == pytest.approx({"web": 6 * 10 / 35, "wiki": 1.5 / np.log(2) * 20 / 100})
    assert found["val_tokens"] == {"web": 10 * (rows or 100), "wiki": 20} and set(measured) == {rows}
    web = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("web"))
    assert web.split() == ["web", f"{10 * (rows or 100):,}", "4.1589", "64.00"]


def test_a_run_reports_the_losses_of_each_stage_and_keeps_them(
    measured: list[int | None], trainer: Any, task: DecoderTask, tmp_path: Path
) -> None:
    TokenLedger().setup(trainer, task, "fit")
    before = PretrainingSummary()
    trainer.sanity_checking, trainer.callback_metrics = True, losses(8.0, 7.0)
    before.on_validation_end(trainer, task)
    trainer.sanity_checking = False
    before.on_train_start(trainer, task)
    trainer.global_step, trainer.callback_metrics = 2, losses(5.0, 5.0)
    before.on_validation_end(trainer, task)
    assert not (tmp_path / "summary.json").exists()  # between two ends of stages
    trainer.global_step, trainer.callback_metrics = 4, losses(3.0, 4.0)
    before.on_validation_end(trainer, task)
    assert summary_of(tmp_path)["val_loss"] == {"web": 3.0, "wiki": 4.0}

    after = PretrainingSummary()
    after.load_state_dict(before.state_dict())
    after.on_train_start(trainer, task)
    trainer.sanity_checking, trainer.callback_metrics = True, losses(9.0, 9.0)
    after.on_validation_end(trainer, task)
    assert summary_of(tmp_path)["val_loss"] == {"web": 3.0, "wiki": 4.0}
    trainer.sanity_checking, trainer.global_step, trainer.callback_metrics = False, 6, losses(1.0, 2.0)
    after.on_validation_end(trainer, task)
    found = summary_of(tmp_path)
    assert [stage["val_loss"] for stage in found["stages"]] == [{"web": 3.0, "wiki": 4.0}, {"web": 1.0, "wiki": 2.0}]
    assert found["val_loss"] == {"web": 1.0, "wiki": 2.0} and found["steps"] == 6
    bits = {"web": 1.0 * 30 / 105 / math.log(2), "wiki": 2.0 * 20 / 100 / math.log(2)}
    assert found["val_bits_per_byte"] == pytest.approx(bits)
    assert found["unigram_loss"] == {"web": 9.0, "wiki": 8.0}
    assert found["val_loss_before"] == {"web": 8.0, "wiki": 7.0}


# --- fine-tuning ------------------------------------------------------------------------------------------------------


def chat_data(kind: type = ChatData) -> Any:
    """Data whose numbers are known without any text."""
    counted = ("pairs", "pairs_held_out", "conversations", "conversations_held_out", "tokens", "answer_tokens")
    report: dict[str, Any] = dict.fromkeys((*counted, "shortened_pairs", "shortened_conversations"), 3)
    report |= {"left_out": {}, "first_left_out": []}
    numbers = {"total_steps": 4, "batch_tokens": 64, "validation_conversations": 5, "validation_examples": 5}
    answers: dict[str, Any] = {
        "fill": lambda: 0.5,
        "reports": lambda: {"web": report},
        "tokens_of_steps": lambda first, behind: 64 * (behind - first),
        "evaluation_pairs": lambda rows: {"web": 20},
        "evaluation_tokens": lambda rows: {"web": 7 if rows else 70},
    }
    known = {**numbers, "sources": {"web": None}, "tokenizer": None, "reference": None}
    methods = {name: staticmethod(answer) for name, answer in answers.items()}
    return type(kind.__name__, (kind,), {**known, **methods, "__init__": lambda self: None})()


def preference_data() -> Any:
    return chat_data(PreferenceData)


def test_losses_and_answers_before_training_are_kept(
    trainer: Any, task: DecoderTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer.datamodule = chat_data()
    summary = ChatSummary(["why?"])

    def ask(trainer: Any, task: Any) -> None:
        summary._answers.latest = [f"as of step {trainer.global_step}"]

    monkeypatch.setattr(summary, "_ask", ask)
    trainer.sanity_checking, trainer.callback_metrics = True, {"loss/held_out_web": torch.tensor(4.0)}
    summary.on_validation_end(trainer, task)
    trainer.sanity_checking = False
    for step, loss in ((2, 3.0), (4, 2.0)):
        trainer.global_step, trainer.callback_metrics = step, {"loss/held_out_web": torch.tensor(loss)}
        summary.on_validation_end(trainer, task)
    resumed = ChatSummary(["why?"])
    resumed.load_state_dict(summary.state_dict())
    assert resumed._losses.before == {"web": 4.0} and resumed._answers.before == ["as of step 0"]
    summary.on_train_end(trainer, task)
    found = summary_of(tmp_path)
    assert found["val_loss_before"] == {"web": 4.0} and found["val_loss"] == {"web": 2.0}
    assert found["val_step"] == 4 and found["val_tokens"] == {"web": 7}
    assert found["answers"] == [{"question": "why?", "before": "as of step 0", "after": "as of step 4"}]


def pairs(loss: float, accuracy: float) -> dict[str, torch.Tensor]:
    names = ("rewards/chosen_", "rewards/rejected_", "rewards/margin_", "rewards/accuracy_", "ranking/accuracy_")
    values = {"loss/held_out_web": loss} | {f"{name}held_out_web": accuracy for name in names}
    return {name: torch.tensor(value) for name, value in values.items()}


@pytest.mark.parametrize("stopped_at", [4, 5])
def test_results_of_preference_tuning_are_those_of_its_last_step(
    stopped_at: int, trainer: Any, task: DecoderTask, tmp_path: Path
) -> None:
    """A run that stops after its last validation is not validated again: it has no results of its own."""
    trainer.datamodule = preference_data()
    summary = PreferenceSummary()
    trainer.sanity_checking, trainer.callback_metrics = True, pairs(0.75, 0.5)
    summary.on_validation_end(trainer, task)
    trainer.sanity_checking, trainer.global_step, trainer.callback_metrics = False, 4, pairs(0.25, 1.0)
    summary.on_validation_end(trainer, task)
    trainer.global_step = stopped_at
    summary.on_train_end(trainer, task)
    found = summary_of(tmp_path)
    assert found["val_loss_before"] == {"web": 0.75} and found["val_reward_accuracy_before"] == {"web": 0.5}
    assert found.get("val_loss") == ({"web": 0.25} if stopped_at == 4 else None)
    assert found["val_reward_accuracy_interval"] == ({"web": [0.8389, 1.0]} if stopped_at == 4 else {})


# --- classification ---------------------------------------------------------------------------------------------------


def test_the_curve_of_two_classes_is_that_of_the_second(
    trainer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []
    logger = TensorBoardLogger(tmp_path)
    board = SimpleNamespace(
        add_figure=lambda *given: None, add_pr_curve=lambda name, *given: drawn.append((name, *given))
    )
    monkeypatch.setattr(TensorBoardLogger, "experiment", board)
    monkeypatch.setattr(classification_summary, "confusion_figure", lambda *given: None)
    trainer.loggers, trainer.global_step = [logger], 5
    classes, probabilities = torch.tensor([0, 1, 1]), torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.4, 0.6]])
    for labels in (["no", "yes"], ["no", "yes", "perhaps"]):
        compared = SimpleNamespace(
            split="test", labels=labels, model=SimpleNamespace(classes_N=classes, probabilities_NC=probabilities)
        )
        scored: Any = SimpleNamespace(compared=compared, confusion_CC=None)
        classification_summary.draw(trainer, scored)
    ((name, truth, second, step),) = drawn
    assert (name, step) == ("precision_recall/test/yes", 5 * 64)
    assert truth.tolist() == [0, 1, 1] and second.tolist() == pytest.approx([0.1, 0.8, 0.6])


def test_a_classifier_that_had_nothing_left_to_do_keeps_its_summary(
    trainer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        classification_summary, "classification_of", lambda trainer: (SimpleNamespace(), SimpleNamespace())
    )
    (tmp_path / "summary.json").write_text('{"validation": 1}')
    summary = ClassificationSummary()
    trainer.global_step = 1200
    summary.on_train_start(trainer, None)  # type: ignore[arg-type]
    summary.on_train_end(trainer, None)  # type: ignore[arg-type]
    assert capsys.readouterr().out == f"{tmp_path} is complete: 1,200 steps; nothing is left to do\n"
    assert summary_of(tmp_path) == {"validation": 1}
