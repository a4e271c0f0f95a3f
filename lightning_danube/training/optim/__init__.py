"""Optimizers and the learning rate. One optimizer is one file; `groups.py` says which parameters decay."""

from .adamw import AdamW
from .groups import parameter_groups
from .muon import Muon, optimizer_of
from .schedule import LearningRate

__all__ = ["AdamW", "LearningRate", "Muon", "optimizer_of", "parameter_groups"]
