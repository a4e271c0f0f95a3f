"""Benchmarks: the data module, the task, the parts that ask questions and score the answers, the report."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_danube import lazy_attributes

if TYPE_CHECKING:
    from lightning_danube.evaluation.data import EvaluationData
    from lightning_danube.evaluation.task import Evaluation

__all__ = ["Evaluation", "EvaluationData"]

__getattr__ = lazy_attributes(__name__, {"Evaluation": "task", "EvaluationData": "data"})
