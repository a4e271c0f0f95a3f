"""Text classification with a linear head and LoRA, compared with baselines."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_danube import lazy_attributes

if TYPE_CHECKING:
    from lightning_danube.classification.data import ClassificationData
    from lightning_danube.classification.task import TextClassification

__all__ = ["ClassificationData", "TextClassification"]

__getattr__ = lazy_attributes(__name__, {"ClassificationData": "data", "TextClassification": "task"})
