"""One LightningModule a task; they differ in their loss and in what trains."""

from lightning_danube.tasks.chat import SupervisedFineTuning
from lightning_danube.tasks.classification import TextClassification
from lightning_danube.tasks.evaluation import Evaluation
from lightning_danube.tasks.preference import PreferenceTuning
from lightning_danube.tasks.pretraining import Pretraining
from lightning_danube.tasks.quantization import QuantizationEvaluation

__all__ = [
    "Evaluation",
    "PreferenceTuning",
    "Pretraining",
    "QuantizationEvaluation",
    "SupervisedFineTuning",
    "TextClassification",
]
