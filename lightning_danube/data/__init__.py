"""Text, tokens, mixtures and the data modules that serve them; knows no model."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_danube.data.chat_data import ChatData
    from lightning_danube.data.classification import ClassificationData
    from lightning_danube.data.evaluation import EvaluationData
    from lightning_danube.data.preference_data import PreferenceData
    from lightning_danube.data.pretraining import CurriculumData
    from lightning_danube.data.text_windows import TextWindows

__all__ = ["ChatData", "ClassificationData", "CurriculumData", "EvaluationData", "PreferenceData", "TextWindows"]

_MODULES = {
    "ChatData": "chat_data",
    "ClassificationData": "classification",
    "CurriculumData": "pretraining",
    "EvaluationData": "evaluation",
    "PreferenceData": "preference_data",
    "TextWindows": "text_windows",
}


def __getattr__(name: str) -> Any:
    # On demand: the processes that tokenize need neither torch nor Lightning, which take seconds to import.
    if name in _MODULES:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
