"""The texts and numbers of a pre-training run's summary. Whole runs: test_run.py."""

from pathlib import Path
from typing import Any

import pytest

from lightning_danube.pretraining.curriculum import Curriculum, Stage
from lightning_danube.pretraining.summary import (
    HeldOutText,
    early_stop_text,
    fit_summary,
    result_text,
    stage_summaries,
    with_stage_losses,
)
from lightning_danube.training.run_facts import RunFacts, Trained
from tests.tiny_models import tiny_decoder

CURRICULUM = Curriculum(
    [Stage("one", 4096, {"web": 1.0, "wiki": 1.0}), Stage("two", 4096, {"wiki": 1.0})], {"web": 100, "wiki": 100},
    context_length=64, batch_samples=8, seed=0,
)  # fmt: skip
HELD_OUT = HeldOutText({"web": 100, "wiki": 50}, {"web": 0.5, "wiki": 0.25})


class Task:
    """A task as the summary sees it."""

    def __init__(self) -> None:
        self.decoder = tiny_decoder()
        self.config = self.decoder.config
        self.parameters = self.decoder.parameters


def summary(facts: RunFacts, *losses: dict[str, float]) -> dict[str, Any]:
    task: Any = Task()
    return fit_summary(
        task, facts, CURRICULUM, losses, HELD_OUT, {"web": 9.0, "wiki": 8.0}, Trained(12, "32-true", 65.25)
    )


def facts(**more: Any) -> RunFacts:
    return RunFacts(tokens_by_source=lambda: [{"web": 3000, "wiki": 1000}, {"web": 0, "wiki": 0}], **more)


def test_a_run_without_a_ledger_says_what_is_missing() -> None:
    with pytest.raises(ValueError, match=r"name lightning_danube\.callbacks\.TokenLedger in trainer\.callbacks"):
        summary(RunFacts())


def test_facts_that_nobody_measured_are_left_out_or_none() -> None:
    bare = summary(facts())
    assert bare["tokens"] == 4000 and bare["skipped_steps"] == 0
    assert bare["tokens_per_second"] is None and "recall" not in bare
    assert bare["val_loss"] == bare["val_bits_per_byte"] == {}
    measured = summary(
        facts(training_seconds=16.0, skipped_steps=lambda: 3, recall={"all": 0.5}), {"web": 2.0, "wiki": 4.0}
    )
    assert measured["tokens_per_second"] == 250.0 and measured["skipped_steps"] == 3
    assert measured["recall"] == {"all": 0.5}
    assert measured["val_bits_per_byte"] == {"web": 1.0, "wiki": 1.0}
    assert measured["flops"] == tiny_decoder().config.flops_per_token(64) * 4000


def test_stages_hold_their_shares_and_losses() -> None:
    first, second = stage_summaries(CURRICULUM, [{"web": 3, "wiki": 1}, {"web": 0, "wiki": 0}], [{"web": 2.0}])
    assert first["mix"] == {"web": 0.75, "wiki": 0.25} and first["val_loss"] == {"web": 2.0}
    assert second["mix"] == {"web": 0.0, "wiki": 0.0} and second["val_loss"] == {}


def test_a_stage_that_was_never_validated_has_no_losses() -> None:
    one, three = {"web": 1.0}, {"web": 3.0}
    assert with_stage_losses([one], 2, three) == [one, {}, three]
    # The end of a stage that is trained again replaces the losses of later stages.
    assert with_stage_losses([one, one, one], 1, three) == [one, three]


def test_the_result_is_shown_also_without_a_speed(tmp_path: Path) -> None:
    """Without Throughput there is no speed to print; that used to end the run with a TypeError."""
    losses = {"web": 2.0, "wiki": 4.0}
    text = result_text(summary(facts(), losses), ["web", "wiki"], tmp_path, {})
    assert "4,000 tokens in 1 min 05 s\n" in text and "--prompt The" in text and "sample:" not in text
    fast = result_text(summary(facts(training_seconds=16.0), losses), ["web", "wiki"], tmp_path, {"A b": "A b\nc"})
    assert "4,000 tokens in 1 min 05 s, 250 tokens/s in training\n" in fast
    assert "sample: A b c\n" in fast and '--prompt "A b"' in fast


def test_a_run_that_stops_within_its_first_stage_says_where_it_is(tmp_path: Path) -> None:
    stopped = "stopped after 12 of 16 steps; nothing was saved"
    assert early_stop_text(summary(facts()), 16, tmp_path) == f"{stopped}\nrun:  {tmp_path}"
    # After a stage, the result says so.
    assert early_stop_text(summary(facts(), {"web": 2.0, "wiki": 4.0}), 16, tmp_path) == stopped
