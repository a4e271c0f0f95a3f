"""The texts and numbers of a pre-training run's summary. Whole runs: test_run.py."""

import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lightning_danube.pretraining.curriculum import Curriculum, Stage
from lightning_danube.pretraining.summary import (
    HeldOutText,
    early_stop_text,
    evaluation_summary,
    evaluation_table,
    fit_summary,
    length_line,
    result_text,
    source_table,
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
        task, facts, CURRICULUM, losses, HELD_OUT, {"web": 9.0, "wiki": 8.0}, Trained(12, "32-true", 65.25), before={}
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
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step_00000012.ckpt").touch()
    text = result_text(summary(facts(), losses), ["web", "wiki"], tmp_path, {})
    assert "4,000 tokens in 1 min 05 s\n" in text and "--prompt The" in text and "sample:" not in text
    fast = result_text(summary(facts(training_seconds=16.0), losses), ["web", "wiki"], tmp_path, {"A b": "A b\nc"})
    assert "tensorboard --logdir" in text
    quiet = result_text(summary(facts(), losses), ["web", "wiki"], tmp_path, {}, in_tensorboard=False)
    assert "tensorboard" not in quiet
    assert "4,000 tokens in 1 min 05 s, 250 tokens/s in training\n" in fast
    assert "sample: A b c\n" in fast and '--prompt "A b"' in fast


def test_a_run_that_stops_within_its_first_stage_says_where_it_is(tmp_path: Path) -> None:
    stopped = "stopped after 12 of 16 steps; nothing was saved"
    assert early_stop_text(summary(facts()), 16, tmp_path) == f"{stopped}\nrun:  {tmp_path}"
    # After a stage, the result says so.
    assert early_stop_text(summary(facts(), {"web": 2.0, "wiki": 4.0}), 16, tmp_path) == stopped


def test_a_uniform_guess_among_n_tokens_has_perplexity_n() -> None:
    losses = {"web": math.log(7), "wiki": math.log(32_000)}
    found = evaluation_summary(losses, HELD_OUT, weights="run", precision="32-true")
    assert found["perplexity"] == pytest.approx({"web": 7.0, "wiki": 32_000.0})
    assert found["val_bits_per_byte"] == {"web": 0.5 * math.log(7), "wiki": 0.25 * math.log(32_000)}
    assert (found["weights"], found["precision"]) == ("run", "32-true")
    assert (found["val_loss"], found["val_tokens"]) == (losses, {"web": 100, "wiki": 50})
    rows = [re.split(r"  +", line.strip()) for line in evaluation_table(losses, HELD_OUT).splitlines()]
    assert ["web", "100", "1.9459", "7.00"] in rows and ["wiki", "50", "10.3735", "32000.00"] in rows


def test_a_uniform_guess_among_bytes_takes_eight_bits_a_byte() -> None:
    """With one token for each byte, and half as much with one token for two bytes."""
    asked = []

    def sizes(**of: int) -> Any:
        def answer(rows: int | None) -> dict[str, int]:
            asked.append(rows)
            return of

        return answer

    data: Any = SimpleNamespace(
        evaluation_tokens=sizes(web=100, wiki=100, none=0), evaluation_bytes=sizes(web=100, wiki=200, none=0)
    )
    held_out = HeldOutText.of(data, 3)
    assert asked == [3, 3] and held_out.tokens == {"web": 100, "wiki": 100, "none": 0}
    bits = held_out.bits_per_byte({"web": math.log(256), "wiki": math.log(256), "none": math.log(256)})
    assert bits == pytest.approx({"web": 8.0, "wiki": 4.0, "none": 0.0})


def test_the_last_losses_are_the_results() -> None:
    whole = summary(facts(), {"web": 2.0, "wiki": 4.0}, {"web": 1.0, "wiki": 3.0})
    assert whole["val_loss"] == {"web": 1.0, "wiki": 3.0}
    assert whole["val_bits_per_byte"] == {"web": 0.5, "wiki": 0.75}
    assert [stage["val_loss"]["web"] for stage in whole["stages"]] == [2.0, 1.0]
    assert (whole["steps"], whole["precision"], whole["seconds"]) == (12, "32-true", 65.25)
    assert whole["unigram_loss"] == {"web": 9.0, "wiki": 8.0}


def test_tables_show_each_source_in_its_column(tmp_path: Path) -> None:
    text = result_text(summary(facts(), {"web": 2.0, "wiki": 4.0}), ["web", "wiki"], tmp_path, {})
    rows = [re.split(r"  +", line.strip()) for line in text.splitlines()]
    assert ["held-out loss, nats/token", "web", "wiki"] in rows
    assert ["unigram baseline", "9.000", "8.000"] in rows
    assert ["after one", "2.000", "4.000"] in rows and ["the last in bits/byte", "1.000", "1.000"] in rows
    assert ["one", "4,000", "75.0 %", "25.0 %"] in rows and ["two", "0", "0.0 %", "0.0 %"] in rows
    # A source that was added later has no loss at the end of an earlier stage.
    text = result_text(summary(facts(), {"wiki": 4.0}, {"web": 2.0, "wiki": 4.0}), ["web", "wiki"], tmp_path, {})
    assert re.search(r"after one +– +4\.000\n", text)


@pytest.mark.parametrize(("end", "tokens"), [(8192, "8,192"), (9000, "8,192"), (1024, "1,024 of 8,192")])
def test_the_length_of_a_run_is_told_with_its_parts(end: int, tokens: str) -> None:
    data: Any = SimpleNamespace(curriculum=CURRICULUM, batch_tokens=512, micro_batch_size=2, context_length=64)
    line = length_line(data, end=end, steps="16", replicas=2, accumulation=3, run="runs/x")
    layout = "2 devices × 3 accumulation steps × micro-batch of 2 rows of 64"
    assert line == f"run: {tokens} tokens in 16 steps of 512 ({layout}), into runs/x"


def test_the_sources_are_told_with_training_and_held_out_text_apart() -> None:
    counts = {"train": SimpleNamespace(documents=1234, tokens=56_789), "validation": SimpleNamespace(tokens=321)}
    shards = SimpleNamespace(counts=counts.__getitem__)
    data: Any = SimpleNamespace(curriculum=CURRICULUM, shards={"web": shards, "wiki": shards})
    rows = [re.split(r"  +", line.strip()) for line in source_table(data).splitlines()]
    # 32 of the 64 rows of the first stage are web's; wiki has those and the 64 of the second stage.
    assert ["web", "1,234", "56,789", "321", "0.32"] in rows and ["wiki", "1,234", "56,789", "321", "0.96"] in rows


def test_parameters_are_counted_with_and_without_the_embedding() -> None:
    found, decoder = summary(facts()), tiny_decoder()
    assert found["parameters"] == sum(parameter.numel() for parameter in decoder.parameters())
    without = [parameter.numel() for name, parameter in decoder.named_parameters() if "embed" not in name]
    assert found["parameters_without_embedding"] == sum(without) < found["parameters"]


def test_shares_are_those_of_each_stage() -> None:
    stages = stage_summaries(CURRICULUM, [{"web": 3, "wiki": 1}, {"web": 0, "wiki": 12}], [])
    assert [stage["mix"] for stage in stages] == [{"web": 0.75, "wiki": 0.25}, {"web": 0.0, "wiki": 1.0}]
    assert [stage["tokens"] for stage in stages] == [4, 12]
