"""What all fine-tuning tasks share. Whole runs: tests/chat/test_fine_tuning.py."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lightning_danube.model import next_token_loss
from lightning_danube.training.optim import AdamW, LearningRate
from lightning_danube.training.optim.tuning import TuningSettings
from lightning_danube.training.tuning import TuningTask
from lightning_danube.weights.huggingface import save_hf
from lightning_danube.weights.lora import Lora
from tests.tiny_models import CONFIG, save_tiny, tiny_decoder


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("model") / "tiny"))


def task_of(weights: str, lora: Lora | None = None) -> TuningTask:
    return TuningTask(
        TuningSettings(weights, LearningRate(peak=1e-3, final=0.0, warmup=0), lora=lora, optimizer=AdamW())
    )


def under(task: TuningTask, **facts: Any) -> TuningTask:
    task._trainer = SimpleNamespace(loggers=[], **facts)  # type: ignore[assignment]
    return task


def uneven_rows() -> dict[str, torch.Tensor]:
    """Four rows that count 9, 1, 0 and 5 labels."""
    ids = torch.randint(0, CONFIG.vocab_size, (4, 10), generator=torch.Generator().manual_seed(3))
    labels = ids[:, 1:].clone()
    for row, counted in enumerate((9, 1, 0, 5)):
        labels[row, counted:] = -100
    return {"input_ids": ids[:, :-1], "labels": labels}


@pytest.mark.parametrize(("micro_batches", "replicas"), [(1, 1), (4, 1), (1, 4), (2, 2)])
def test_the_loss_of_a_step_is_the_mean_over_its_labels_however_it_is_dealt(
    weights: str, micro_batches: int, replicas: int
) -> None:
    task, rows = task_of(weights), uneven_rows()
    parts = [dict(zip(rows, each, strict=True)) for each in zip(*(x.chunk(4) for x in rows.values()), strict=True)]
    held = 4 // (micro_batches * replicas)
    mean = 0.0
    for replica in range(replicas):
        sampler = {"num_replicas": replicas, "rank": replica}
        under(task, accumulate_grad_batches=micro_batches, distributed_sampler_kwargs=sampler)
        for number in range(micro_batches):
            first = (number * replicas + replica) * held
            batch = {name: torch.cat([part[name] for part in parts[first : first + held]]) for name in rows}
            # The trainer divides by the micro-batches, the strategy averages over the replicas.
            loss = task.training_step({**batch, "step_labels": 15}, number).detach()
            mean += float(loss) / micro_batches / replicas
    total, count = next_token_loss(
        task.decoder.hidden_states(rows["input_ids"]), task.decoder.lm_head.weight, rows["labels"]
    )
    assert int(count) == 15
    assert mean == pytest.approx(float(total.detach()) / 15, rel=1e-5)  # float32


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_dropout_of_an_adapter_is_seeded(weights: str, dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    seeded: list[int] = []
    monkeypatch.setattr(TuningTask, "seed_dropout", lambda self, micro_batch: seeded.append(micro_batch))
    task = under(
        task_of(weights, Lora(rank=2, dropout=dropout)), accumulate_grad_batches=1, distributed_sampler_kwargs=None
    )
    task.training_step({**uneven_rows(), "step_labels": 15}, 7)
    assert seeded == ([7] if dropout else [])


def test_data_may_be_as_large_as_the_model_and_no_larger(weights: str) -> None:
    vocabulary, context = CONFIG.vocab_size, CONFIG.max_position_embeddings
    task = task_of(weights)

    def set_up(vocab_size: int, context_length: int) -> None:
        data = SimpleNamespace(vocab_size=vocab_size, context_length=context_length)
        under(task, datamodule=data).setup("validate")

    set_up(vocabulary, context)
    with pytest.raises(ValueError, match=rf"data.tokenizer has {vocabulary + 1} tokens, the model of .* {vocabulary}"):
        set_up(vocabulary + 1, context)
    with pytest.raises(ValueError, match=rf"data.context_length is {context + 1}, the model of .* made for {context}"):
        set_up(vocabulary, context + 1)


def test_weights_of_16_bits_are_trained_in_32(tmp_path: Path) -> None:
    save_hf(tiny_decoder().bfloat16(), tmp_path / "model")
    assert {parameter.dtype for parameter in task_of(str(tmp_path / "model")).parameters()} == {torch.float32}


def test_a_checkpoint_of_an_adapter_holds_what_trains(weights: str) -> None:
    lora = Lora(rank=2, targets=("q_proj", "down_proj"))
    task = under(task_of(weights, lora))
    checkpoint: dict[str, Any] = {"state_dict": task.state_dict()}
    task.on_save_checkpoint(checkpoint)
    names = {f"{layer}.lora_{part}" for layer in ("q_proj", "down_proj") for part in "AB"}
    assert {".".join(name.split(".")[-4:-2]) for name in checkpoint["state_dict"]} == names
    assert len(checkpoint["state_dict"]) == 2 * len(names)
    assert checkpoint["base_weights"] == weights and checkpoint["lora"]["targets"] == ("q_proj", "down_proj")
    with pytest.raises(ValueError, match=r"was trained with lora .*'rank': 2.*, the config has None: set it back"):
        task_of(weights).on_load_checkpoint(checkpoint)
    task_of(weights, lora).on_load_checkpoint(checkpoint)
