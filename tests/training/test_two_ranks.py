"""A run on two ranks is the run of one process. Longer runs: tests/training/test_world_size.py."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything

from lightning_danube.pretraining import CurriculumData, Pretraining
from lightning_danube.training.trainer import make_trainer
from tests.ranks import on_ranks

STEPS, ROWS = 3, 4


class Losses(Callback):
    """Notes the logged loss of each step."""

    def __init__(self) -> None:
        self.noted: dict[int, float] = {}

    def on_train_batch_start(self, trainer: Trainer, *rest: Any) -> None:
        self._note(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._note(trainer)

    def _note(self, trainer: Trainer) -> None:
        if trainer.global_step:
            self.noted[trainer.global_step] = float(trainer.callback_metrics["loss/train"])


def trained(sources: Path, runs: Path, ranks: int, micro_batch_size: int) -> dict[str, Any]:
    """Losses, held-out losses and weights after three steps of four rows in float64."""
    seed_everything(3, verbose=False)
    data = CurriculumData(
        {name: {"path": str(sources / f"{name}.jsonl")} for name in ("web", "wiki")},  # type: ignore[misc]
        [{"name": "only", "tokens": STEPS * ROWS * 16, "mix": {"web": 60.0, "wiki": 40.0}}],  # type: ignore[list-item]
        tokenizer="danube-small",
        context_length=16,
        batch_tokens=ROWS * 16,
        micro_batch_size=micro_batch_size,
        seed=3,
        held_out=0.05,
        validation_rows=3,
        cache_dir=str(sources / "cache"),
        processes=1,
    )
    shape = {"num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2}
    task = Pretraining(
        {"peak": 1e-2, "final": 1e-3, "warmup": 64},  # type: ignore[arg-type]
        decoder=shape | {"num_key_value_heads": 1},  # type: ignore[arg-type]
        vocab_size=data.vocab_size,
        context_length=data.context_length,
        batch_tokens=data.batch_tokens,
        total_tokens=data.total_tokens,
    )
    losses = Losses()
    trainer = make_trainer(
        "two",
        runs=runs,
        callbacks=[losses],
        accelerator="cpu",
        devices=ranks,
        strategy="ddp" if ranks > 1 else "auto",
        precision="64-true",
        log_every_n_steps=1,
        enable_progress_bar=False,
        limit_val_batches=0,
    )
    trainer.fit(task, data)
    trainer.limit_val_batches = 1.0
    trainer.validate(task, data, verbose=False)
    held_out = {name: float(loss) for name, loss in trainer.callback_metrics.items() if "held_out" in name}
    return {"losses": losses.noted, "held_out": held_out, "weights": task.decoder.state_dict()}


def test_two_ranks_train_what_one_process_trains(tiny: Path, tmp_path: Path) -> None:
    """Two micro-batches of a row on each rank, and four rows at once in one process."""
    one = trained(tiny, tmp_path / "one", 1, 4)

    def work(rank: int) -> None:
        torch.save(trained(tiny, tmp_path / "two", 2, 1), tmp_path / f"{rank}.pt")

    on_ranks(work, group=False)
    assert list(one["losses"]) == [1, 2, 3] and set(one["held_out"]) == {"loss/held_out_web", "loss/held_out_wiki"}
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        # Sums of float64 in another order.
        assert found["losses"] == pytest.approx(one["losses"], rel=1e-12)
        assert found["held_out"] == pytest.approx(one["held_out"], rel=1e-12)
        for name, tensor in one["weights"].items():
            assert (found["weights"][name] - tensor).norm() <= 1e-12 * tensor.norm(), name
