"""Levels of quantization: what each costs and what quality remains."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_danube import lazy_attributes

if TYPE_CHECKING:
    from lightning_danube.quantization.task import QuantizationEvaluation
    from lightning_danube.quantization.text_windows import TextWindows

__all__ = ["QuantizationEvaluation", "TextWindows"]

__getattr__ = lazy_attributes(__name__, {"QuantizationEvaluation": "task", "TextWindows": "text_windows"})
