"""Optimizers and the learning rate. Each optimizer has its own file; `groups.py` says which parameters decay."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_danube import lazy_attributes

if TYPE_CHECKING:
    from lightning_danube.training.optim.adamw import AdamW
    from lightning_danube.training.optim.groups import parameter_groups
    from lightning_danube.training.optim.muon import Muon
    from lightning_danube.training.optim.schedule import LearningRate

__all__ = ["AdamW", "LearningRate", "Muon", "parameter_groups"]

# The settings of AdamW and of the learning rate need no PyTorch.
__getattr__ = lazy_attributes(
    __name__,
    {
        "AdamW": "adamw",
        "LearningRate": "schedule",
        "Muon": "muon",
        "parameter_groups": "groups",
    },
)
