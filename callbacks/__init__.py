"""Trainer callbacks, each about one thing. YAML names them; lightning_danube never imports them."""

from lightning_danube.callbacks.checkpoints import Checkpoints
from lightning_danube.callbacks.curriculum import CurriculumStages
from lightning_danube.callbacks.fact_recall import FactRecall
from lightning_danube.callbacks.judge import Judge
from lightning_danube.callbacks.ledger import TokenLedger
from lightning_danube.callbacks.predictions import Predictions
from lightning_danube.callbacks.progress import Progress
from lightning_danube.callbacks.samples import TextSamples
from lightning_danube.callbacks.skipping import SkipBadSteps
from lightning_danube.callbacks.step_times import StepTimes
from lightning_danube.callbacks.summaries.chat import ChatSummary
from lightning_danube.callbacks.summaries.classification import ClassificationSummary
from lightning_danube.callbacks.summaries.evaluation import EvaluationReport
from lightning_danube.callbacks.summaries.preferences import PreferenceSummary
from lightning_danube.callbacks.summaries.pretraining import PretrainingSummary
from lightning_danube.callbacks.summaries.quantization import QuantizationSummary
from lightning_danube.callbacks.throughput import Throughput
from lightning_danube.callbacks.training_overlap import TrainingOverlap

__all__ = [
    "ChatSummary",
    "Checkpoints",
    "ClassificationSummary",
    "CurriculumStages",
    "EvaluationReport",
    "FactRecall",
    "Judge",
    "Predictions",
    "PreferenceSummary",
    "PretrainingSummary",
    "Progress",
    "QuantizationSummary",
    "SkipBadSteps",
    "StepTimes",
    "TextSamples",
    "Throughput",
    "TokenLedger",
    "TrainingOverlap",
]
