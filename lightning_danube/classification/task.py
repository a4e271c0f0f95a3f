"""Text classification: a trained decoder with a LoRA adapter, and a linear head on the last token of a text.

Shapes: B texts, T tokens, D hidden size, V vocabulary, C classes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_danube.classification.scores import scores
from lightning_danube.classification.settings import ClassifierSettings, Head
from lightning_danube.model import Decoder
from lightning_danube.model.config import ActivationCheckpointing
from lightning_danube.model.forward_memory import forward_memory
from lightning_danube.terminal import tell
from lightning_danube.training.contract import IGNORE_INDEX, LabelledData, TextBatch, data_of
from lightning_danube.training.optim import AdamW, LearningRate
from lightning_danube.training.tuning import TuningTask
from lightning_danube.weights.lora import Lora

NO_LABELS = (
    "TextClassification learns labels, {data} has none: set data.class_path to "
    "lightning_danube.classification.ClassificationData"
)


class Classified(NamedTuple):
    """A model's predictions for texts of a split, in their order, on the CPU.

    `rows_N` are the places of these texts in the split. With Lightning's `limit_test_batches` they are not all texts.
    """

    rows_N: Tensor
    classes_N: Tensor
    probabilities_NC: Tensor


class ClassifiedTexts(Metric):
    """Collects the predictions from all devices, in the order of the texts.

    So the scores do not depend on how texts are divided over devices, and the texts can be resampled.
    """

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        for name in ("rows", "classes", "log_probabilities"):
            self.add_state(name, [], dist_reduce_fx="cat")
        self.rows: Any
        self.classes: Any
        self.log_probabilities: Any

    def update(self, rows_B: Tensor, classes_B: Tensor, log_probabilities_BC: Tensor) -> None:
        real_B = rows_B >= 0
        self.rows.append(rows_B[real_B])
        self.classes.append(classes_B[real_B])
        self.log_probabilities.append(log_probabilities_BC[real_B])

    def compute(self) -> tuple[Tensor, Tensor, Tensor]:
        """Returns rows (N,), classes (N,) and log-probabilities (N, C)."""
        # Each state is a list before a sync, and one tensor after it.
        rows_N, classes_N, log_probabilities_NC = (
            torch.cat(state) if isinstance(state, list) else state
            for state in (self.rows, self.classes, self.log_probabilities)
        )
        order_N = rows_N.argsort()
        return rows_N[order_N].cpu(), classes_N[order_N].cpu(), log_probabilities_NC[order_N].cpu()


def last_token_states(decoder: Decoder, input_ids_BT: Tensor, attention_mask_BT: Tensor) -> Tensor:
    """Returns the state of the last token that is not padding, after the last norm: (B, D).

    Texts are padded at their ends, where causal attention does not see the padding.
    """
    hidden_BTD = decoder.hidden_states(input_ids_BT)
    last_B = (attention_mask_BT.sum(1) - 1).clamp(min=0)  # a row may be empty
    return hidden_BTD[torch.arange(len(last_B), device=last_B.device), last_B]


class TextClassification(TuningTask):
    """Cross-entropy of the classes of texts. The adapter and the head train; the decoder's own weights are frozen.

    Logs `loss/train` and after each validation or test `loss/<split>` (nats/text), `accuracy/<split>`,
    `macro_f1/<split>` and `calibration_error/<split>`.

    Args:
        weights: the model to begin with: a run, a checkpoint, a Hugging Face directory, a GGUF file, a hub id or
            "smollm2".
        learning_rate: schedule of the adapter's learning rate in tokens; each step counts as the mean tokens of a step.
        head: input of the linear head: the last token's "hidden" state, as in LlamaForSequenceClassification, or its
            "logits", as in H2O LLM Studio when the paper was written.
        head_learning_rate: peak of the head's learning rate, which follows the adapter's schedule; if not given, the
            adapter's peak.
        lora: options of the adapter.
        optimizer: AdamW's other settings.
        activation_checkpointing: recompute each block in the backward pass instead of keeping its activations: for
            long documents; "selective" keeps the results of the attention kernels and recomputes the rest.

    Raises:
        ValueError: the weights cannot be read, the head's learning rate is not above 0, or the optimizer is only for
            training from random weights.
    """

    head: nn.Linear

    def __init__(
        self,
        weights: str,
        learning_rate: LearningRate,
        *,
        head: Head = ClassifierSettings.head,
        head_learning_rate: float | None = ClassifierSettings.head_learning_rate,
        lora: Lora = ClassifierSettings.lora,
        optimizer: AdamW = ClassifierSettings.optimizer,
        activation_checkpointing: ActivationCheckpointing = ClassifierSettings.activation_checkpointing,
    ) -> None:
        super().__init__(
            ClassifierSettings(
                weights,
                learning_rate,
                head=head,
                head_learning_rate=head_learning_rate,
                lora=lora,
                optimizer=optimizer,
                activation_checkpointing=activation_checkpointing,
            )
        )
        self.head_sees: Head = head
        self.head_rate = 1.0 if head_learning_rate is None else head_learning_rate / learning_rate.peak
        self.classified = ClassifiedTexts()
        self.latest: Classified | None = None
        """The predictions of the last validation or test."""
        self.labels: list[str] = []
        self._is_configured = False

    def configure_model(self) -> None:
        """Makes the head if the data tell the number of classes. For `predict`, the checkpoint tells it."""
        if self._is_configured:
            return
        self._is_configured = True
        if self._data.labels:
            self._make_head(self._data.labels)

    @property
    def _data(self) -> LabelledData:
        return data_of(self.trainer, LabelledData, NO_LABELS)

    def _make_head(self, labels: list[str]) -> None:
        self.labels = list(labels)
        width = self.config.hidden_size if self.head_sees == "hidden" else self.config.vocab_size
        # The random state here depends on the number of processes. A fixed seed gives all processes the same head.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._seed)
            self.head = nn.Linear(width, len(labels), bias=False)

    def class_logits(self, input_ids_BT: Tensor, attention_mask_BT: Tensor) -> Tensor:
        """Returns logits (B, C), at least in float32: 8 bits of precision are too few for calibrated probabilities."""
        seen_BD = last_token_states(self.decoder, input_ids_BT, attention_mask_BT)
        if self.head_sees == "logits":
            seen_BD = self.decoder.lm_head(seen_BD)
        with torch.autocast(seen_BD.device.type, enabled=False):
            return self.head(seen_BD.to(self.head.weight.dtype))

    def sum_of_losses(self, batch: TextBatch) -> tuple[Tensor, Tensor]:
        """Returns the sum of the losses in nats, and the number of texts."""
        logits_BC = self.class_logits(batch["input_ids"], batch["attention_mask"])
        return _sum_of_losses(logits_BC, batch["classes"])

    # --- training -----------------------------------------------------------------------------------------------------

    def build_optimizer(self) -> tuple[torch.optim.Optimizer, list[float]]:
        """Returns the optimizer, and for each of its parameter groups its learning rate as a multiple of the
        schedule's."""
        optimizer = self.optimizer_settings.build(self.decoder, lr=1.0)
        multiples = [1.0] * len(optimizer.param_groups)
        decay = self.optimizer_settings.weight_decay
        optimizer.add_param_group({"params": list(self.head.parameters()), "weight_decay": decay})
        return optimizer, [*multiples, self.head_rate]

    # --- evaluation ---------------------------------------------------------------------------------------------------

    def validation_step(self, batch: TextBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        in_curve = batch_idx < self.curve.batches
        if self.curve.is_brief and not in_curve:
            return
        logits_BC = self.class_logits(batch["input_ids"], batch["attention_mask"])
        if in_curve:
            self.update_mean("held_out/validation", *_sum_of_losses(logits_BC, batch["classes"]))
        if not self.curve.is_brief:
            self.classified.update(batch["rows"], batch["classes"], logits_BC.log_softmax(1))

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self.classified.reset()

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        if not self.curve.is_brief:
            self._log_scores("validation")

    def on_test_epoch_start(self) -> None:
        self.classified.reset()

    def on_test_epoch_end(self) -> None:
        self._log_scores("test")

    def _log_scores(self, split: str) -> None:
        rows_N, classes_N, log_probabilities_NC = self.classified.compute()
        # In float64, because exp then reverses the logarithm of the softmax.
        log_probabilities_NC = log_probabilities_NC.double()
        self.latest = Classified(rows_N, classes_N, log_probabilities_NC.exp())
        loss = float(F.nll_loss(log_probabilities_NC, classes_N))
        found = {"loss": loss, **scores(self.latest.probabilities_NC, classes_N)}
        named = {f"{name}/{split}": value for name, value in found.items()}
        self.log_dict(named, logger=False)
        # The values go straight to the loggers, because Lightning restarts its count of logged steps after a resume.
        for logger in self.trainer.loggers:
            logger.log_metrics(named, step=self.trainer.global_step)

    def on_predict_start(self) -> None:
        if self.device.type == "cuda" and self.trainer.is_global_zero:
            # Only the last token of each text gets logits.
            tell(forward_memory(self.decoder, self._data.evaluation_places, head_rows=0, cached=False))

    def predict_step(self, batch: TextBatch, batch_idx: int, dataloader_idx: int = 0) -> list[dict[str, Any]]:
        """Returns for each text its place, the likeliest label, the true label if known, and the probability of each
        label."""
        data = self._data
        logits_BC = self.class_logits(batch["input_ids"], batch["attention_mask"])
        said = []
        for row, probabilities in zip(batch["rows"].tolist(), logits_BC.softmax(1).tolist(), strict=True):
            if row < 0:
                continue
            by_label = dict(zip(self.labels, probabilities, strict=True))
            place, truth = data.described(row)
            answer = {**place, "label": max(by_label, key=by_label.__getitem__), **truth}
            said.append({**answer, "probabilities": by_label})
        return said

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["classifier"] = {
            "labels": self.labels,
            "head": self.head_sees,
            "context_length": self._data.context_length,
            "keep": self._data.keep,
            "begin": self._data.begin,
        }

    def _check_texts(self, saved: dict[str, Any]) -> None:
        """Checks that texts are cut as in training. Checkpoints of earlier versions do not say how they were.

        Raises:
            ValueError: an option of the data differs.
        """
        for name in _OF_TEXTS if self._trainer is not None else ():
            now = getattr(self._data, name)
            if saved.get(name, now) != now:
                raise ValueError(
                    f"data.{name} is {_written(now)}, the classifier was trained with {_written(saved[name])}: set it "
                    "back"
                )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint.get("classifier")
        if saved is None:
            raise ValueError("the checkpoint is not a classifier: name a run of TextClassification with --ckpt_path")
        if saved["head"] != self.head_sees:
            raise ValueError(
                f"the checkpoint has model.head {saved['head']!r}, the config {self.head_sees!r}: set it back"
            )
        self._check_texts(saved)
        if "head" not in dict(self.named_children()):
            self._make_head(saved["labels"])
        if saved["labels"] != self.labels:
            raise ValueError(
                f"the checkpoint tells {_shown(saved['labels'])} apart, the data have {_shown(self.labels)}: give the "
                "data it was trained on"
            )
        super().on_load_checkpoint(checkpoint)


_OF_TEXTS = ("context_length", "keep", "begin")
"""Options of the data that decide which tokens of a text a classifier sees."""


def _sum_of_losses(logits_BC: Tensor, classes_B: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the sum of the losses in nats, and the number of texts whose class is known."""
    total = F.cross_entropy(logits_BC, classes_B, ignore_index=IGNORE_INDEX, reduction="sum")
    return total, (classes_B != IGNORE_INDEX).sum()


def _written(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _shown(labels: list[str]) -> str:
    return f"{len(labels)} classes ({', '.join(labels[:5])}{', …' if len(labels) > 5 else ''})"
