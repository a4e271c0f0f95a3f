"""Text, tokens, mixtures and the data modules that serve them; knows no model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_danube.data.chat_data import ChatData
    from lightning_danube.data.classification import ClassificationData
    from lightning_danube.data.preference_data import PreferenceData
    from lightning_danube.data.pretraining import CurriculumData

__all__ = ["ChatData", "ClassificationData", "CurriculumData", "PreferenceData"]


def __getattr__(name: str) -> Any:
    # On demand: the processes that tokenize need neither torch nor Lightning, which take seconds to import.
    if name == "CurriculumData":
        from lightning_danube.data.pretraining import CurriculumData

        return CurriculumData
    if name == "ChatData":
        from lightning_danube.data.chat_data import ChatData

        return ChatData
    if name == "PreferenceData":
        from lightning_danube.data.preference_data import PreferenceData

        return PreferenceData
    if name == "ClassificationData":
        from lightning_danube.data.classification import ClassificationData

        return ClassificationData
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
