"""Trainer callbacks, each about one thing. YAML names them; lightning_danube never imports them."""

from callbacks.chat_summary import ChatSummary
from callbacks.checkpoints import Checkpoints
from callbacks.classification_summary import ClassificationSummary
from callbacks.curriculum import CurriculumStages
from callbacks.evaluation_report import EvaluationReport
from callbacks.fact_recall import FactRecall
from callbacks.judge import Judge
from callbacks.ledger import TokenLedger
from callbacks.predictions import Predictions
from callbacks.preference_summary import PreferenceSummary
from callbacks.progress import Progress
from callbacks.quantization_summary import QuantizationSummary
from callbacks.samples import TextSamples
from callbacks.skipping import SkipBadSteps
from callbacks.step_times import StepTimes
from callbacks.summary import PretrainingSummary
from callbacks.throughput import Throughput
from callbacks.training_overlap import TrainingOverlap

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
