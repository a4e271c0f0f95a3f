"""Recorded decoding steps where there is no GPU."""

from typing import Any

import pytest
import torch

from lightning_danube.generation import compiled_steps
from lightning_danube.model import KVCache


class Replayed:
    """A recorded step on a CPU: like a graph it reads the ids that it was made with, and as many slots."""

    made = 0

    def __init__(self, step: Any, ids_B: torch.Tensor, cache: KVCache) -> None:
        Replayed.made += 1
        self.step, self.ids_B, self.cache, self.slots = step, ids_B.clone(), cache, cache.visible
        self.lengths_B = cache.lengths_B

    def replay(self, ids_B: torch.Tensor) -> torch.Tensor:
        assert self.cache.lengths_B is self.lengths_B, "a graph reads the memory that it was recorded with"
        self.ids_B.copy_(ids_B)
        self.cache.visible = self.slots
        return self.step(self.ids_B, self.cache)


def record_on(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has plain steps recorded: as CUDA graphs, or on a CPU by `Replayed`."""
    if device == "cpu":
        monkeypatch.setattr(compiled_steps, "RecordedStep", Replayed)
        monkeypatch.setattr(compiled_steps, "has_graphs", lambda device: True)
        Replayed.made = 0
