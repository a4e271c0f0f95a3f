"""Chat models: conversations and preferences, supervised fine-tuning and DPO."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_danube import lazy_attributes

if TYPE_CHECKING:
    from lightning_danube.chat.data import ChatData
    from lightning_danube.chat.fine_tuning import SupervisedFineTuning
    from lightning_danube.chat.preference_data import PreferenceData
    from lightning_danube.chat.preference_tuning import PreferenceTuning

__all__ = ["ChatData", "PreferenceData", "PreferenceTuning", "SupervisedFineTuning"]

__getattr__ = lazy_attributes(
    __name__,
    {
        "ChatData": "data",
        "PreferenceData": "preference_data",
        "PreferenceTuning": "preference_tuning",
        "SupervisedFineTuning": "fine_tuning",
    },
)
