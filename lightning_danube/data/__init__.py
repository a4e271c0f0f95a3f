"""Text, tokens, mixtures and the data modules that serve them; knows no model."""

from lightning_danube.data.pretraining import CurriculumData

__all__ = ["CurriculumData"]
