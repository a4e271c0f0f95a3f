"""Pre-training: the mixture, the curriculum, the data module, the task and its summary."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_danube import lazy_attributes

if TYPE_CHECKING:
    from lightning_danube.pretraining.data import CurriculumData
    from lightning_danube.pretraining.task import Pretraining

__all__ = ["CurriculumData", "Pretraining"]

__getattr__ = lazy_attributes(__name__, {"CurriculumData": "data", "Pretraining": "task"})
