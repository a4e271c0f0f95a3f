"""What a checkpoint says of its decoder, and what a task makes of it."""

import dataclasses
from typing import Any

import pytest
from lightning.pytorch import LightningModule, Trainer

from lightning_danube.model import Decoder, DecoderConfig
from lightning_danube.training.optim import AdamW, LearningRate
from lightning_danube.training.task import DecoderTask
from tests.tiny_models import CONFIG, VARIANTS


def task_of(config: DecoderConfig) -> DecoderTask:
    return DecoderTask(Decoder(config), LearningRate(peak=1e-3, final=0.0, warmup=0), AdamW())


@pytest.mark.parametrize("config", [CONFIG, *VARIANTS.values()])
def test_a_decoder_takes_its_own_checkpoint(config: DecoderConfig) -> None:
    task_of(config).on_load_checkpoint({"decoder_config": config.facts()})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sliding_window": 7}, r"another decoder than the config: sliding_window 7 \(here None\): set what differs"),
        ({"qk_norm": True}, r"another decoder than the config: qk_norm True \(here None\): set what differs"),
        ({"hidden_size": 128, "head_dim": None}, r"hidden_size 128 \(here 64\), head_dim 32 \(here 16\): set what"),
    ],
)
def test_another_decoder_is_refused_by_what_differs(changes: dict[str, Any], message: str) -> None:
    other = dataclasses.replace(CONFIG, **changes)
    with pytest.raises(ValueError, match=message):
        task_of(CONFIG).on_load_checkpoint({"decoder_config": other.facts()})


# --- private parts of Lightning ---------------------------------------------------------------------------------------


def test_a_module_without_a_trainer_says_so_in_a_private_attribute() -> None:
    assert LightningModule()._trainer is None


def test_checkpoints_count_micro_batches_where_a_resume_restates_them() -> None:
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    progress = trainer.fit_loop.state_dict()["epoch_loop.batch_progress"]
    for counts in (progress["total"], progress["current"]):
        assert {"ready", "started", "processed", "completed"} <= counts.keys()
