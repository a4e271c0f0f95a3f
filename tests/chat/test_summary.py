"""The texts of the summaries of fine-tuning and preference tuning. Whole runs: test_fine_tuning.py and others."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lightning_danube.chat.preference_summary import (
    pair_results,
    preference_fit_summary,
    results_table,
    with_intervals,
)
from lightning_danube.chat.summary import Answers, ChatLosses, chat_fit_summary, chat_result_text, source_lines
from lightning_danube.training.run_facts import RunFacts, Trained
from tests.tiny_models import tiny_decoder, tiny_tokenizer


def test_answers_are_shown_side_by_side_and_not_interpreted() -> None:
    answers = Answers(["a|b?"], 8)
    answers.latest, answers.step = ["*x*\ny"], 5
    assert answers.cards() == ["| question | step 5 |\n| --- | --- |\n| a\\|b? | \\*x\\*<br>y |"]
    answers.before = ["no"]
    assert answers.cards() == ["| question | before | step 5 |\n| --- | --- | --- |\n| a\\|b? | no | \\*x\\*<br>y |"]
    assert answers.compared() == [{"question": "a|b?", "before": "no", "after": "*x*\ny"}]


def test_a_question_that_fills_the_context_is_named() -> None:
    answers = Answers(["why? " * 500], 8)
    with pytest.raises(ValueError, match=r"the question 'why\? .* tokens, more than the context holds"):
        answers.ask(tiny_decoder(), tiny_tokenizer(), 0)
    answers = Answers(["why?"], 3)
    answers.ask(tiny_decoder(), tiny_tokenizer(), 4)
    assert len(answers.latest) == 1 and answers.step == 4


def test_what_was_left_out_is_told_with_its_cause() -> None:
    report: Any = {
        "pairs": 1200, "pairs_held_out": 30, "tokens": 4000, "answer_tokens": 900, "shortened_pairs": 2,
        "left_out": {"too long": 3, "empty": 1}, "first_left_out": ["a.jsonl, line 7: empty"],
    }  # fmt: skip
    table, *rest = source_lines({"mine": report}, "pairs")
    assert table.splitlines()[0].split() == [
        "source", "pairs", "held", "out", "tokens", "of", "answers", "shortened", "left", "out",
    ]  # fmt: skip
    assert table.splitlines()[-1].split() == ["mine", "1,200", "30", "4,000", "900", "2", "4"]
    assert rest == ["mine: 3 left out: too long", "mine: 1 left out: empty", "  a.jsonl, line 7: empty"]
    report |= {"dropped_leading_answers": 1200, "answers_not_learned": 0}
    assert source_lines({"mine": report}, "pairs")[4:] == [
        "mine: 1,200 answers before the first question left out of their conversations"
    ]


def test_a_source_that_was_not_measured_has_no_loss(tmp_path: Path) -> None:
    summary = {
        "val_loss_before": {}, "val_loss": {"a": 1.5}, "val_step": 1200, "steps": 1300, "seconds": 61.0,
        "answers": [{"question": "why?", "before": "no  idea", "after": "so"}],
    }  # fmt: skip
    text = chat_result_text(summary, ["a"], tmp_path)
    assert re.search(r"^before +–\nafter step 1,200 +1\.500$", text, re.MULTILINE)
    assert "question: why?\n  before: no idea\n  after: so\n1,300 steps in 1 min 01 s\n" in text


def test_pairs_are_reported_with_intervals() -> None:
    metrics = {
        f"{prefix}held_out_web": torch.tensor(value)
        for prefix, value in (
            ("loss/", 0.7), ("rewards/accuracy_", 0.5), ("rewards/margin_", -0.25), ("ranking/accuracy_", 1.0),
        )
    }  # fmt: skip
    results = pair_results(metrics)
    assert results["val_loss"]["web"] == pytest.approx(0.7) and results["val_reward_chosen"] == {}
    # Wilson's interval of 10 in 20, by Newcombe (1998), and of 20 in 20: 1 / (1 + z² / n) to 1.
    found = with_intervals(results, {"web": 20})
    assert found["val_reward_accuracy_interval"]["web"] == [0.2993, 0.7007]
    assert found["val_ranking_accuracy_interval"]["web"] == [round(1 / (1 + 1.959964**2 / 20), 4), 1.0]
    row = results_table([("before", {}), ("after", results)], {"web": 20}).splitlines()[-1]
    assert row.split() == ["web", "after", "20", "0.7000", "50.0", "%", "(30–70)", "-0.250", "100.0", "%", "(84–100)"]


def test_an_answer_is_no_longer_than_the_context() -> None:
    tokenizer, decoder = tiny_tokenizer(), tiny_decoder()
    question = "why " * 30
    room = 128 - len(tokenizer(f"<bos>{question}<eos>", add_special_tokens=False).input_ids)
    assert 0 < room < 16
    for asked, given in ((50, room), (3, 3)):
        answers = Answers([question], asked)
        answers.ask(decoder, tokenizer, 0)
        # A random model does not end its answer.
        ids = tokenizer(answers.latest[0], add_special_tokens=False).input_ids
        assert 0 < len(ids) <= 3 * given
    with pytest.raises(ValueError, match="more than the context holds"):
        Answers([question + "why " * 10], 1).ask(decoder, tokenizer, 0)


def a_run() -> tuple[Any, Any, Trained]:
    """A task, its data and its progress, as far as a summary asks for them."""
    task: Any = torch.nn.Linear(3, 2)
    task.bias.requires_grad_(False)
    task.weights, task.beta, task.config = "base", 0.25, SimpleNamespace(parameters=8)
    counts = {5: {"web": 50}, None: {"web": 500}}
    data = SimpleNamespace(
        tokens_of_steps=lambda first, behind: 64 * (behind - first), reports=dict, fill=lambda: 0.98765,
        validation_conversations=5, validation_examples=5,
        evaluation_tokens=counts.__getitem__, evaluation_pairs=counts.__getitem__,
    )  # fmt: skip
    return task, data, Trained(10, "32-true", 12.3456)


def test_a_summary_of_fine_tuning_tells_before_from_after() -> None:
    task, data, trained = a_run()
    answers = Answers(["why?"], 3)
    answers.before, answers.latest = ["no"], ["so"]
    summary = chat_fit_summary(
        task, RunFacts(training_seconds=4.0), data, trained,
        ChatLosses(before={"web": 3.0}, after={"web": 2.0}, step=9), answers,
    )  # fmt: skip
    assert summary == {
        "weights": "base", "steps": 10, "parameters": 8, "trained_parameters": 6, "precision": "32-true",
        "seconds": 12.346, "tokens_per_second": 160.0, "fill": 0.9877, "sources": {}, "val_loss_before": {"web": 3.0},
        "val_loss": {"web": 2.0}, "val_step": 9, "val_tokens": {"web": 50},
        "answers": [{"question": "why?", "before": "no", "after": "so"}],
    }  # fmt: skip


def test_a_summary_of_preference_tuning_tells_before_from_after() -> None:
    task, data, trained = a_run()
    before, after = ({"val_loss": {"web": loss}, "val_ranking_accuracy": {"web": loss / 4}} for loss in (3.0, 2.0))
    summary = preference_fit_summary(task, RunFacts(training_seconds=4.0), data, trained, before=before, after=after)
    assert (summary["val_loss_before"], summary["val_loss"]) == ({"web": 3.0}, {"web": 2.0})
    assert (summary["beta"], summary["val_pairs"], summary["tokens_per_second"]) == (0.25, {"web": 50}, 160.0)
    # Wilson's interval of 50 %: half of the normal one's width √(1 / (n + z²)) z.
    half = 1.959964 / (50 + 1.959964**2) ** 0.5 / 2
    ends = summary["val_ranking_accuracy_interval"]["web"]
    assert ends == pytest.approx([0.5 - half, 0.5 + half], abs=1e-4)
    low, high = summary["val_ranking_accuracy_interval_before"]["web"]
    assert low < 0.75 < high


def test_each_metric_has_its_own_name() -> None:
    names = {
        "loss/held_out_a": "val_loss", "rewards/chosen_held_out_a": "val_reward_chosen",
        "rewards/rejected_held_out_a": "val_reward_rejected", "rewards/margin_held_out_a": "val_reward_margin",
        "rewards/accuracy_held_out_a": "val_reward_accuracy", "ranking/accuracy_held_out_a": "val_ranking_accuracy",
    }  # fmt: skip
    found = pair_results({name: torch.tensor(float(number)) for number, name in enumerate(names)})
    assert found == {metric: {"a": float(number)} for number, metric in enumerate(names.values())}
