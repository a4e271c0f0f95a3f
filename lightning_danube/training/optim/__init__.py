"""Optimizers and the learning rate. One optimizer is one file; `groups.py` says which parameters decay."""

from lightning_danube.training.optim.adamw import AdamW
from lightning_danube.training.optim.groups import parameter_groups
from lightning_danube.training.optim.muon import Muon, optimizer_of
from lightning_danube.training.optim.schedule import LearningRate

__all__ = ["AdamW", "LearningRate", "Muon", "optimizer_of", "parameter_groups"]
