"""The shape of a model by its name."""

from pathlib import Path

import pytest
import torch

from lightning_danube.weights.gguf.files import save_gguf
from lightning_danube.weights.loading import load_decoder
from lightning_danube.weights.shapes import shape_of
from tests.tiny_models import TIED, save_tiny, tiny_decoder


def test_the_shape_is_that_of_the_loaded_model(tmp_path: Path, tiny_run: Path) -> None:
    save_tiny(tmp_path / "hf", TIED)
    save_gguf(tiny_decoder(TIED), tmp_path / "model.gguf", dtype=torch.float16)
    checkpoint = next(tiny_run.glob("checkpoints/*.ckpt"))
    for weights in (tmp_path / "hf", tmp_path / "model.gguf", tiny_run, checkpoint):
        assert shape_of(str(weights)) == load_decoder(str(weights)).config, weights


def test_weights_are_not_read_for_it(tmp_path: Path) -> None:
    save_tiny(tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors").unlink()
    assert shape_of(str(tmp_path / "hf")).hidden_size == 64


def test_a_wrong_name_is_one_of_weights() -> None:
    with pytest.raises(ValueError, match=r"--weights smollm: there is no such file or directory.*mean smollm2"):
        shape_of("smollm")
