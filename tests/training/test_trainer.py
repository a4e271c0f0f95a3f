"""Trainers made in Python. Whole runs: tests/test_public_api.py."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lightning_danube import device
from lightning_danube.checkpoints.single import DurableCheckpointIO
from lightning_danube.training.trainer import FastProducts, check_trainer, make_trainer


def test_a_made_trainer_has_the_settings_of_fit(tmp_path: Path) -> None:
    trainer = make_trainer("own", runs=tmp_path, accelerator="cpu", devices=1, precision="32-true")
    assert trainer.gradient_clip_val == 1.0 and trainer.max_epochs == 1 and trainer.num_sanity_val_steps == 0
    assert isinstance(trainer.strategy.checkpoint_io, DurableCheckpointIO)
    assert not trainer._accelerator_connector.use_distributed_sampler
    assert trainer.default_root_dir == str(tmp_path / "own" / "version_0")
    check_trainer(trainer)
    other = make_trainer(runs=tmp_path, accelerator="cpu", devices=1, precision="64-true", gradient_clip_val=0.5)
    assert (other.gradient_clip_val, other.precision) == (0.5, "64-true")


@pytest.mark.parametrize(("world_size", "deals", "refused"), [(2, True, True), (2, False, False), (1, True, False)])
def test_a_trainer_that_deals_the_samples_again_is_refused(world_size: int, deals: bool, refused: bool) -> None:
    connector = SimpleNamespace(use_distributed_sampler=deals)
    trainer: Any = SimpleNamespace(
        gradient_clip_val=1.0, checkpoint_callbacks=[], world_size=world_size, _accelerator_connector=connector
    )
    if refused:
        with pytest.raises(ValueError, match="the trainer would deal the samples a second time: make the trainer with"):
            check_trainer(trainer)
    else:
        check_trainer(trainer)


def test_products_are_taken_back_after_a_run_and_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "onednn_stays_exact", lambda: True)
    trainer: Any = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cpu")))
    task: Any = None
    for end in ("teardown", "on_exception"):
        products = FastProducts()
        products.setup(trainer, task, "fit")
        assert torch.get_float32_matmul_precision() == "medium"
        getattr(products, end)(trainer, task, "fit" if end == "teardown" else ValueError())
        try:
            assert torch.get_float32_matmul_precision() == "highest"
        finally:
            torch.set_float32_matmul_precision("highest")
