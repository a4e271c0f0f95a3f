"""What the task decides from its options and the device of its run."""

import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lightning_danube.checkpoints.strategy import ShardedStrategy
from lightning_danube.model import DecoderShape
from lightning_danube.model.compilation import missing_for_gpu_code
from lightning_danube.pretraining import Pretraining
from lightning_danube.training.optim import LearningRate
from lightning_danube.weights.lora import Lora


def task_on(device: str, verb: str = "fit", shape: DecoderShape | None = None, **options: Any) -> Pretraining:
    """A task whose trainer runs on a device; the device need not exist."""
    task = Pretraining(
        LearningRate(1e-3, 1e-4, 0),
        decoder=shape or DecoderShape(32, 64, 2, 4, 2),
        vocab_size=64,
        context_length=16,
        batch_tokens=64,
        total_tokens=640,
        **options,
    )
    strategy = SimpleNamespace(root_device=torch.device(device))
    trainer: Any = SimpleNamespace(strategy=strategy, state=SimpleNamespace(fn=verb), is_global_zero=True)
    task._trainer = trainer
    return task


@pytest.mark.parametrize(
    ("device", "verb", "option", "compiled"),
    [
        ("cuda", "fit", None, True),
        ("cuda", "fit", False, False),
        ("cuda", "validate", None, False),
        ("cuda", "validate", True, True),
        ("cpu", "fit", None, False),
        ("cpu", "fit", True, True),
        ("mps", "fit", None, False),
    ],
)
def test_blocks_are_compiled_in_a_fit_on_a_gpu(
    device: str, verb: str, option: bool | None, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_danube.pretraining.task.missing_for_gpu_code", lambda: None)
    monkeypatch.setattr("lightning_danube.pretraining.task.check_compiler", lambda *_: None)
    task = task_on(device, verb, compile_blocks=option)
    names = list(task.state_dict())
    for _ in range(2):  # each verb of a process
        task.configure_model()
        assert task.decoder.has_compiled_blocks == compiled
    assert list(task.state_dict()) == names


def test_what_is_missing_for_compiled_blocks_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    task = task_on("cuda")
    task.configure_model()
    assert not task.decoder.has_compiled_blocks
    assert capsys.readouterr().err == "blocks are not compiled, because there is no Triton: training is slower\n"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace())
    monkeypatch.setenv("CC", "no-such-compiler")
    assert missing_for_gpu_code() == "C compiler (no-such-compiler)"
    monkeypatch.setenv("CC", "sh")
    assert missing_for_gpu_code() is None


def test_new_tokens_beside_an_adapter_need_whole_weights() -> None:
    task = task_on("cpu")
    task.lora, task.new_tokens = Lora(), [64]
    task._trainer.strategy = ShardedStrategy()  # type: ignore[misc, union-attr]
    with pytest.raises(ValueError, match=r"data\.new_tokens with model\.lora train on one device or with ddp"):
        task.configure_model()
