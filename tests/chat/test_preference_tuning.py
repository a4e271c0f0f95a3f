"""The loss of preference tuning beside independent implementations, on tiny random weights."""

import dataclasses
import math
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import Precision
from torch import Tensor

from lightning_danube.chat.preference_tuning import PreferenceTuning
from lightning_danube.training.optim import LearningRate, Muon
from lightning_danube.weights.adapters import weights_digest
from lightning_danube.weights.loading import load_decoder
from lightning_danube.weights.lora import Lora
from tests.tiny_models import CONFIG, save_tiny

BETA = 0.3
LENGTHS = [(17, 5), (9, 14), (30, 29)]
"""Of a pair's answers, in tokens."""


def random_pairs(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Ids and which of them are answers, (6, 45): the chosen answer of each pair, then the rejected one."""
    generator = torch.Generator().manual_seed(seed)
    # Not the tokenizer's special tokens: transformers trains no embedding of the one for padding.
    ids = torch.randint(0, 259, (6, 45), generator=generator)
    answers = torch.zeros(6, 45, dtype=torch.bool)
    for pair, lengths in enumerate(LENGTHS):
        ids[2 * pair + 1, :15] = ids[2 * pair, :15]
        for side, length in enumerate(lengths):
            answers[2 * pair + side, 15 : 15 + length] = True
    return ids, answers


def batch_of_pairs() -> Any:
    ids, answers = random_pairs()
    return {"input_ids": ids[:, :-1], "labels": ids[:, 1:].masked_fill(~answers[:, 1:], -100)}


def task_of(weights: Path, **options: Any) -> PreferenceTuning:
    return PreferenceTuning(weights=str(weights), learning_rate=LearningRate(1e-3, 0.0, 0), beta=BETA, **options)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "model", seed=0)


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "reference", seed=7)


def log_probabilities(weights: Path | torch.nn.Module) -> Tensor:
    """By the whole table of logits, one answer after the other: (3, 2)."""
    decoder: Any = load_decoder(str(weights), dtype=torch.float64) if isinstance(weights, Path) else weights
    ids, answers = random_pairs()
    sums = []
    for row, is_answer in zip(ids, answers, strict=True):
        end = int(is_answer.nonzero().max()) + 1
        logits = decoder(row[None, : end - 1])[0]
        logits = logits - logits.logsumexp(1, keepdim=True)
        sums.append(sum(logits[place - 1, row[place]] for place in range(end) if is_answer[place]))
    return torch.stack(sums).view(3, 2)


def test_loss_rewards_and_gradients_are_those_of_the_formula(model: Path, reference: Path) -> None:
    task, batch = task_of(model).double(), batch_of_pairs()
    with torch.no_grad():
        batch["reference"] = log_probabilities(reference)
    total, pairs = task.sum_of_losses(batch)
    total.backward()
    decoder = load_decoder(str(model), dtype=torch.float64)
    rewards = BETA * (log_probabilities(decoder) - batch["reference"])
    expected = sum(torch.log1p(torch.exp(rejected - chosen)) for chosen, rejected in rewards)
    assert isinstance(expected, Tensor)
    expected.backward()
    # In float64, sums of 45 terms in another order.
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(task.losses_of(batch)[1], rewards, rtol=1e-11, atol=1e-12)
    assert pairs == 3
    for name, parameter in decoder.named_parameters():
        found = task.decoder.get_parameter(name).grad
        torch.testing.assert_close(found, parameter.grad, rtol=1e-9, atol=1e-12)
    wins = float((rewards[:, 0] > rewards[:, 1]).sum())
    assert 0 < wins < 3, "all alike would hide a mistake"
    means = [*rewards.sum(0).tolist(), float((rewards[:, 0] - rewards[:, 1]).sum()), wins, 3]
    assert task._sums.tolist() == pytest.approx(means, rel=1e-11)


def test_a_step_against_the_gradient_lowers_the_loss_as_finite_differences_say(model: Path, reference: Path) -> None:
    task, batch = task_of(model).double(), batch_of_pairs()
    with torch.no_grad():
        batch["reference"] = log_probabilities(reference)
    task.sum_of_losses(batch)[0].backward()
    gradients = {parameter: parameter.grad for parameter in task.parameters() if parameter.grad is not None}
    square = sum(float(gradient.square().sum()) for gradient in gradients.values())
    step, losses = 1e-5 / math.sqrt(square), []
    with torch.no_grad():
        for sign in (-1, 2):
            for parameter, gradient in gradients.items():
                parameter.add_(gradient, alpha=sign * step)
            losses.append(float(task.sum_of_losses(batch)[0]))
    # Central differences: an error of the order of the step's square beside a slope of |gradient|.
    assert (losses[1] - losses[0]) / (2 * step) == pytest.approx(square, rel=1e-6)


def test_at_the_start_the_loss_is_log_2_whatever_the_pairs(model: Path) -> None:
    task, batch = task_of(model).double(), batch_of_pairs()
    with torch.no_grad():
        batch["reference"] = task.log_probabilities(batch)
        losses, rewards, _ = task.losses_of(batch)
    assert torch.equal(losses, torch.full((3,), math.log(2), dtype=torch.float64)) and not rewards.any()
    with torch.no_grad():
        task.sum_of_losses(batch)
    chosen, rejected, margin, accuracy, pairs = task._sums.tolist()
    # Without any difference there is nothing to be right about: half of them are.
    assert (chosen, rejected, margin, accuracy, pairs) == (0, 0, 0, 1.5, 3)


def test_rows_without_a_pair_count_for_nothing(model: Path, reference: Path) -> None:
    task, batch = task_of(model).double(), batch_of_pairs()
    with torch.no_grad():
        batch["reference"] = log_probabilities(reference)
    expected, _ = task.sum_of_losses(batch)
    sums = task._sums
    empty = {
        "input_ids": torch.zeros(2, 44).long(),
        "labels": torch.full((2, 44), -100),
        "reference": torch.zeros(1, 2),
    }
    filled: Any = {name: torch.cat([batch[name], empty[name]]) for name in batch}
    total, pairs = task.sum_of_losses(filled)
    assert pairs == 3
    # Another number of rows may be multiplied in another order.
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(task._sums, sums, rtol=1e-12, atol=0)


def test_a_fresh_adapter_leaves_the_reference_that_of_its_base(model: Path) -> None:
    plain, adapted = task_of(model).double().eval(), task_of(model, lora=Lora(rank=4)).double().eval()
    batch = batch_of_pairs()
    with torch.no_grad():
        assert torch.equal(plain.log_probabilities(batch), adapted.log_probabilities(batch))
        torch.testing.assert_close(plain.log_probabilities(batch), log_probabilities(model), rtol=1e-12, atol=0)
    assert weights_digest(plain.decoder) == weights_digest(adapted.decoder)
    # It does tell models apart, down to one weight.
    with torch.no_grad():
        plain.decoder.lm_head.weight[3, 5] += 1e-3
    assert weights_digest(plain.decoder) != weights_digest(adapted.decoder)


@pytest.mark.parametrize("beta", [0.0, -0.1, math.inf, math.nan])
def test_a_beta_of_no_use_is_refused(model: Path, beta: float) -> None:
    with pytest.raises(ValueError, match=rf"model.beta is {beta}: give a number above 0, such as 0.1"):
        PreferenceTuning(weights=str(model), learning_rate=LearningRate(1e-3, 0.0, 0), beta=beta)


def test_fine_tuning_refuses_muon(model: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.optimizer is Muon, which trains from random weights only: use AdamW"):
        PreferenceTuning(weights=str(model), learning_rate=LearningRate(1e-3, 0.0, 0), optimizer=Muon())


@pytest.mark.trl
def test_loss_rewards_and_gradients_are_trls(model: Path, reference: Path, tmp_path: Path) -> None:
    """The whole of it: TRL runs transformers' model and its own head, and computes its own reference."""
    trl = import_module("trl")
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    arguments = trl.DPOConfig(
        output_dir=str(tmp_path / "trl"), beta=BETA, report_to="none", use_cpu=True, bf16=False,
        gradient_checkpointing=False, disable_dropout=True,
    )  # fmt: skip
    trainer = trl.DPOTrainer(
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        ref_model=AutoModelForCausalLM.from_pretrained(reference, dtype=torch.float32),
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
        processing_class=AutoTokenizer.from_pretrained(model),
    )
    ids, answers = random_pairs()
    order = torch.arange(6).view(3, 2).t().flatten()  # TRL: all chosen answers, then all rejected ones
    inputs = {
        "input_ids": ids[order],
        "attention_mask": torch.ones_like(ids),
        "completion_mask": answers[order].long(),
    }
    trainer.model.train()
    theirs = trainer._compute_loss(trainer.model, inputs, False)
    theirs.backward()
    task, batch = task_of(model), batch_of_pairs()
    with torch.no_grad():
        batch["reference"] = task_of(reference).log_probabilities(batch)
    total, pairs = task.sum_of_losses(batch)
    (total / pairs).backward()
    # Float32, with logits of the order of 10 and sums of 30 tokens.
    torch.testing.assert_close(total / pairs, theirs, rtol=1e-5, atol=0)
    for name, parameter in trainer.model.named_parameters():
        found = task.decoder.get_parameter(name).grad
        assert found is not None and (found - parameter.grad).norm() <= 1e-5 * parameter.grad.norm(), name
    chosen, rejected, margin, accuracy, _ = (task._sums / pairs).tolist()
    logged = trainer._metrics["train"]
    assert logged["rewards/chosen"] == pytest.approx([chosen], rel=1e-4)
    assert logged["rewards/rejected"] == pytest.approx([rejected], rel=1e-4)
    assert logged["rewards/margins"] == pytest.approx([margin], rel=1e-4)
    assert logged["rewards/accuracies"] == pytest.approx([accuracy])


# --- the reference ----------------------------------------------------------------------------------------------------


class Pairs:
    """As much of a data module as the task asks for: it asks for the reference of the pairs above, twice."""

    vocab_size, context_length = CONFIG.vocab_size, 44
    model = ""

    def prepare_reference(self, model: str, log_probabilities: Any) -> None:
        self.model, self.values = model, [log_probabilities(batch_of_pairs()) for _ in range(2)]


def set_up(task: PreferenceTuning, precision: str = "32-true") -> Pairs:
    data, strategy = Pairs(), SimpleNamespace(root_device=torch.device("cpu"))
    facts = {"datamodule": data, "precision": precision, "strategy": strategy, "precision_plugin": Precision()}
    task.trainer = SimpleNamespace(**facts)  # type: ignore[assignment]
    task.setup("validate")
    return data


def with_dropout(directory: Path) -> PreferenceTuning:
    task = task_of(save_tiny(directory, dataclasses.replace(CONFIG, attention_dropout=0.5)))
    assert task.config.attention_dropout == 0.5
    return task


def test_the_reference_has_no_dropout_and_the_policy_trains_on(tmp_path: Path) -> None:
    task = with_dropout(tmp_path / "model").train()
    data = set_up(task)
    assert all(module.training for module in task.modules())
    with torch.no_grad():
        assert not torch.equal(task.log_probabilities(batch_of_pairs()), data.values[0])
        expected = task.eval().log_probabilities(batch_of_pairs())
    assert torch.equal(data.values[0], expected) and torch.equal(data.values[1], expected)
    assert not data.values[0].requires_grad


def test_a_task_in_evaluation_mode_stays_in_it(tmp_path: Path) -> None:
    task = with_dropout(tmp_path / "model").eval()
    set_up(task)
    assert not any(module.training for module in task.modules())


def test_the_reference_is_kept_by_the_weights_and_the_precision(model: Path, reference: Path) -> None:
    names = [set_up(task_of(weights), precision).model for weights, precision in (
        (model, "32-true"), (model, "bf16-mixed"), (reference, "32-true"), (reference, "bf16-mixed"),
    )]  # fmt: skip
    assert len(set(names)) == 4
    assert set_up(task_of(model, lora=Lora(rank=4))).model == names[0]


# --- what is logged ---------------------------------------------------------------------------------------------------


def several_batches(task: PreferenceTuning, *pairs: list[int]) -> tuple[list[Any], dict[str, list[float]]]:
    """Batches of these pairs, each with an empty row behind, and the values of all their pairs. The reference is
    chosen so that a reward is higher where a log-probability is lower."""
    whole, batches = batch_of_pairs(), []
    with torch.no_grad():
        logps = task.log_probabilities(whole)
    rewards = BETA * torch.tensor([[1.0, -0.5], [0.25, 2.0], [3.0, -1.0]])
    opposite = (logps[:, 0] > logps[:, 1]) == (rewards[:, 0] > rewards[:, 1])
    rewards[opposite] = rewards[opposite].flip(1)
    for numbers in pairs:
        rows = [row for number in numbers for row in (2 * number, 2 * number + 1)]
        batch = {name: torch.cat([values[rows], torch.full_like(values[:2], fill)]) for name, values, fill in (
            ("input_ids", whole["input_ids"], 0), ("labels", whole["labels"], -100),
        )}  # fmt: skip
        reference = torch.cat([(logps - rewards / BETA)[numbers], torch.zeros(1, 2)])
        batches.append({**batch, "reference": reference, "source": "web", "rows": [*numbers, -1]})
    seen = [number for numbers in pairs for number in numbers]
    chosen, rejected = rewards[seen].unbind(1)
    return batches, {
        "chosen": chosen.tolist(),
        "rejected": rejected.tolist(),
        "margin": (chosen - rejected).tolist(),
        "accuracy": (chosen > rejected).float().tolist(),
        "ranking": (logps[seen, 0] > logps[seen, 1]).float().tolist(),
        "loss": torch.log1p(torch.exp(rejected - chosen)).tolist(),
    }


def mean(values: list[float]) -> Any:
    # Rewards are differences of float32 log-probabilities of the order of 300.
    return pytest.approx(sum(values) / len(values), abs=1e-4)


def test_held_out_values_are_means_over_the_pairs_however_they_are_batched(model: Path) -> None:
    task = task_of(model).eval()
    batches, values = several_batches(task, [0, 1], [2])
    with torch.no_grad():
        for batch in batches:
            task.validation_step(batch, 0)
    found = {name: float(metric.compute()) for name, metric in task._evaluation_means.items()}
    names = {name: f"rewards/{name}_held_out_web" for name in ("chosen", "rejected", "margin", "accuracy")}
    names |= {"ranking": "ranking/accuracy_held_out_web", "loss": "loss/held_out_web"}
    assert found == {names[name]: mean(of_pairs) for name, of_pairs in values.items()}
    assert sum(values["ranking"]) + sum(values["accuracy"]) == 3, "a pair is won by either of the two"


def test_the_rewards_of_a_step_are_those_of_all_its_micro_batches_and_of_no_earlier_step(model: Path) -> None:
    task = task_of(model)
    facts = {"distributed_sampler_kwargs": None, "accumulate_grad_batches": 2, "world_size": 1}
    task.trainer = SimpleNamespace(**facts)  # type: ignore[assignment]
    optimizer = torch.optim.SGD(task.parameters(), lr=0.1)
    for pairs in ([[0, 1], [2]], [[2], [1]]):
        batches, values = several_batches(task, *pairs)
        for number, batch in enumerate(batches):
            task.training_step({**batch, "step_labels": sum(map(len, pairs))}, number)  # type: ignore[typeddict-item]
        task.configure_gradient_clipping(optimizer)
        logged = ("chosen", "rejected", "margin", "accuracy")
        assert task.more_of_the_step() == {f"rewards/{name}": mean(values[name]) for name in logged}
        assert task._step_loss is not None and float(task._step_loss) == mean(values["loss"])


def test_predictions_are_of_each_pair_and_not_of_the_empty_rows(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = task_of(model).eval()
    (batch,), values = several_batches(task, [0, 1, 2])
    monkeypatch.setattr(task, "texts_of", lambda batch: [f"text {row}" for row in range(len(batch["input_ids"]))])
    with torch.no_grad():
        rows = task.predict_step(batch, 0)
    assert [row["chosen_text"] for row in rows] == ["text 0", "text 2", "text 4"]
    assert [row["rejected_text"] for row in rows] == ["text 1", "text 3", "text 5"]
    assert [row["row"] for row in rows] == [0, 1, 2] and {row["source"] for row in rows} == {"web"}
    for name in ("loss", "chosen", "rejected"):
        assert [row[name] for row in rows] == pytest.approx(values[name], abs=1e-4)
    origins = [{"file": "pairs.csv", "row": row, "id": f"pair {row}"} for row in (5, 9, 2)]
    given: Any = {**batch, "origins": [*origins, {}]}  # the last row is empty
    with torch.no_grad():
        rows = task.predict_step(given, 0)
    assert [(row["file"], row["row"], row["id"]) for row in rows] == [
        ("pairs.csv", 5, "pair 5"),
        ("pairs.csv", 9, "pair 9"),
        ("pairs.csv", 2, "pair 2"),
    ]
