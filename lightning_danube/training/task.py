"""The task that all training tasks extend: the optimizer step and its log, held-out losses, checkpoints.

Tasks differ in their loss and in what trains."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins import DoublePrecision
from torch import Tensor
from torchmetrics import MeanMetric

from lightning_danube.checkpoints.content import check_restored
from lightning_danube.checkpoints.strategy import ShardedStrategy
from lightning_danube.device import usable_memory, widest_float
from lightning_danube.model import Decoder, next_token_loss, token_losses
from lightning_danube.model.parallel import Sharding, parallelize
from lightning_danube.options import options
from lightning_danube.terminal import show, tell
from lightning_danube.tokens.tokenizer import DocumentTokenizer
from lightning_danube.training.contract import DataWithTokenizer, TokenBatch, TrainingData, data_of, places_of
from lightning_danube.training.optim import AdamW, LearningRate
from lightning_danube.training.position import log_interval, replicas_of, training_data_of
from lightning_danube.training.run_facts import RunFacts, metrics_of_sources
from lightning_danube.training.trackers.loss_curve import LossCurve
from lightning_danube.training.trainer import check_trainer
from lightning_danube.weights.adapters import base_digest
from lightning_danube.weights.lora import Lora

FORWARD = "decoder"
"""Name in the trainer's profiler for the forward pass of a training step up to the loss."""


class CountedMean(MeanMetric):
    """A mean over the batches of all ranks that keeps the sum of their weights."""

    count = 0.0

    def compute(self) -> Tensor:
        self.count = float(self.weight)
        mean: Tensor = super().compute()
        return mean


class DecoderTask(LightningModule):
    """A decoder, its optimizer and a learning rate in tokens.

    A task adds `training_step`, which appends the detached loss of each micro-batch to `self._losses`.

    Logs `loss/train` (nats/token, mean over the optimizer step), `optimizer/gradient_norm` (before clipping),
    `optimizer/learning_rate`, and after each validation `loss/held_out_<source>` (nats/token, mean over the
    source's tokens), and `held_out/<source>`, the same of a few rows (training/trackers/loss_curve.py).

    Args:
        decoder: random or trained weights.
        learning_rate: schedule in tokens.
        optimizer: its settings.
        weights: the name of the trained weights; None for random weights.
        lora: adapter to train on the frozen weights, instead of all weights.
    """

    def __init__(
        self,
        decoder: Decoder,
        learning_rate: LearningRate,
        optimizer: AdamW,
        *,
        weights: str | None = None,
        lora: Lora | None = None,
    ) -> None:
        super().__init__()
        self.decoder, self.config = decoder, decoder.config
        self.weights = weights
        self.lora = None if lora is None else options(Lora, lora, "model.lora")
        self._base_digest: str | None = None
        if self.lora is not None:
            self.lora.apply(decoder)
            self._base_digest = base_digest(decoder)
            # A checkpoint does not contain the frozen weights; on_load_checkpoint checks that the adapter is complete.
            self.strict_loading = False
        self.learning_rate = options(LearningRate, learning_rate, "model.learning_rate")
        self.optimizer_settings = options(AdamW, optimizer, "model.optimizer")
        self.run_facts = RunFacts()
        self._losses: list[Tensor] = []
        self._gradient_norm: Tensor | None = None
        self._step_loss: Tensor | None = None
        self.step_verdict: Callable[[Tensor, Tensor], Tensor] | None = None
        """Set by a callback: (loss of the step, gradient norm) → whether to skip the step, as a tensor on the device.

        Both inputs are means over the ranks, so all ranks decide alike: a value that is not finite on one rank makes
        the mean not finite.
        """
        self._rate = 0.0
        self.curve = LossCurve()
        self._evaluation_means: dict[str, CountedMean] = {}
        self._seed = torch.initial_seed()
        self._is_parallel = False

    def configure_model(self) -> None:
        """Distributes the decoder as the trainer's strategy says. Each verb in one process calls this again."""
        strategy = self.trainer.strategy
        if isinstance(strategy, ShardedStrategy) and not self._is_parallel:
            # Autocast multiplies in bfloat16: gather the weights in that type, which is half of the bytes.
            products = torch.bfloat16 if self.trainer.precision == "bf16-mixed" else None
            parallelize(self.decoder, *strategy.meshes, Sharding(products, strategy.gather_again))
            self._is_parallel = True

    def setup(self, stage: str) -> None:
        """Sets the trainer's number of micro-batches per step from the data, which Lightning has already set up."""
        if stage == "fit":
            check_trainer(self.trainer)
            self.trainer.accumulate_grad_batches = self.training_data.accumulation(replicas_of(self.trainer)[0])
            self._warn_of_memory()

    def _warn_of_memory(self) -> None:
        """Warns of a run on a CPU whose weights, gradients and optimizer do not fit into the memory of the machine.

        The system ends a process that takes more memory than there is, and no line says why.
        """
        strategy = self.trainer.strategy
        if strategy.root_device.type != "cpu" or isinstance(strategy, ShardedStrategy) or self.trainer.local_rank:
            return
        trained = sum(one.nbytes for one in self.parameters() if one.requires_grad)
        needed = sum(one.nbytes for one in self.parameters()) + trained * (1 + min(self.optimizer_settings.averages))
        needed, there = needed * self.trainer.num_devices, usable_memory()
        if needed > there:
            tell(
                f"warning: weights, gradients and optimizer take {needed / 1e9:,.1f} GB, more than the "
                f"{there / 1e9:,.1f} GB of memory here: the system may end this run without a line (see `plan`)"
            )

    @property
    def training_data(self) -> TrainingData:
        """The run's data module.

        Raises:
            ValueError: the data module is not for training.
        """
        return training_data_of(self.trainer)

    def length_in_tokens(self) -> tuple[int, int]:
        """Returns the tokens of an optimizer step and of the whole run; the learning rate depends on both."""
        return self.training_data.batch_tokens, self.training_data.total_tokens

    def hidden_states(self, batch: TokenBatch) -> Tensor:
        """Returns the states after the last norm, (B, T, D)."""
        profiler = getattr(self._trainer, "profiler", None) if self.training else None
        with nullcontext() if profiler is None else profiler.profile(FORWARD):
            return self.decoder.hidden_states(
                batch["input_ids"],
                position_ids_BT=batch.get("position_ids"),
                document_ids_BT=batch.get("document_ids"),
                document_runs=batch.get("document_runs"),
            )

    def sum_of_losses(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Returns the sum of nats of a `TokenBatch`, and the number of counted tokens.

        A task with another loss or another batch overrides this method.
        """
        return next_token_loss(self.hidden_states(batch), self.decoder.lm_head.weight, batch["labels"])

    # --- training -----------------------------------------------------------------------------------------------------

    @property
    def has_dropout(self) -> bool:
        """Whether a training step draws random numbers, so that `seed_dropout` has to come before it."""
        return bool(self.config.attention_dropout or (self.lora and self.lora.dropout))

    def seed_dropout(self, micro_batch: int) -> None:
        """Seeds dropout by seed, micro-batch and replica alone, so a resumed run draws the same dropout masks."""
        _, replica = replicas_of(self.trainer)
        digest = hashlib.blake2b(f"{self._seed}/{micro_batch}/{replica}".encode(), digest_size=7).digest()
        torch.manual_seed(int.from_bytes(digest))

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips by the global norm here, because Lightning 2.6 refuses fused AdamW with clipping under bf16-mixed."""
        if gradient_clip_algorithm not in (None, "norm"):
            name = getattr(gradient_clip_algorithm, "value", gradient_clip_algorithm)
            raise ValueError(f"trainer.gradient_clip_algorithm is {name!r}: only 'norm' is supported")
        if gradient_clip_val is not None and gradient_clip_val < 0:
            raise ValueError(f"trainer.gradient_clip_val is {gradient_clip_val}: give the largest norm, or 0 for none")
        limit = gradient_clip_val if gradient_clip_val else float("inf")
        self._rate = optimizer.param_groups[0]["lr"]
        norm: Any = torch.nn.utils.clip_grad_norm_(self.parameters(), limit)
        # For sharded gradients `norm` is only this rank's part; `full_tensor` reduces it over the ranks.
        self._gradient_norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        self._step_loss = torch.stack(self._losses).mean()
        self._losses.clear()
        if self.step_verdict is not None:
            together = torch.stack([self._step_loss, self._gradient_norm.to(self._step_loss)])
            together = self._mean_over_ranks(together)
            self._step_loss = together[0]
            # If this is 1, the fused kernel changes no weights, moments or step counts, as for a gradient scaler. The
            # kernel reads the flag on the device, so the host does not wait for it.
            optimizer.found_inf = self.step_verdict(together[0], together[1]).float()  # type: ignore[attr-defined]

    def _mean_over_ranks(self, values: Tensor) -> Tensor:
        """Returns the mean over all ranks, as a tensor on the device. The host does not wait for it.

        The trainer's own `strategy.reduce` begins with a barrier, at which each host waits for its device.
        """
        ranks = self.trainer.world_size
        if ranks == 1:
            return values
        total = values.clone()
        torch.distributed.all_reduce(total)
        return total / ranks

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._log_step()

    def _log_step(self) -> None:
        """Logs an optimizer step once, when all its micro-batches are done."""
        if self._step_loss is None:  # in the middle of an accumulation, or logged already
            return
        loss, self._step_loss = self._step_loss, None
        step = self.trainer.global_step
        every = log_interval(self.trainer)
        if every and (step % every == 0 or step == 1):
            if self.step_verdict is None:
                loss = self._mean_over_ranks(loss)
            values = {
                "loss/train": float(loss),
                "optimizer/learning_rate": self._rate,
                **self.more_of_the_step(),
            }
            if self._gradient_norm is not None:
                values["optimizer/gradient_norm"] = float(self._gradient_norm)
            for logger in self.trainer.loggers:
                logger.log_metrics(values, step=step)
            self.trainer.callback_metrics["loss/train"] = loss

    def more_of_the_step(self) -> dict[str, float]:
        """Returns further values of an optimizer step to log, over all ranks. Every rank calls it."""
        return {}

    def on_train_start(self) -> None:
        """Applies the config's optimizer settings and learning rate. A checkpoint's optimizer brings its old settings,
        and the rate of its next step from the old schedule. Prints both rates if they differ."""
        for optimizer, config in zip(self.trainer.optimizers, self.trainer.lr_scheduler_configs, strict=True):
            check_restored(getattr(optimizer, "_optimizer", optimizer))
            scheduler = config.scheduler
            assert isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR)
            before, now = optimizer.param_groups[0]["lr"], scheduler.lr_lambdas[0](scheduler.last_epoch)
            if self.trainer.is_global_zero and not math.isclose(before, now, rel_tol=1e-6, abs_tol=1e-12):
                step = scheduler.last_epoch + 1
                show(f"the learning rate of step {step} is {now:.4g}; the config before gave it {before:.4g}")
            groups = zip(optimizer.param_groups, self._group_settings, scheduler.lr_lambdas, strict=True)
            for group, settings, rate_of_step in groups:
                group.update(settings)
                group["lr"] = rate_of_step(scheduler.last_epoch)

    def _rate_of_step(self, step: int) -> float:
        batch_tokens, total_tokens = self.length_in_tokens()
        if total_tokens <= batch_tokens:  # the only step would have the rate of the end, which is usually 0
            return self.learning_rate.peak
        return self.learning_rate.at((step + 1) * batch_tokens, total_tokens)

    def _rate_of_group(self, multiple: float, step: int) -> float:
        return multiple * self._rate_of_step(step)

    def build_optimizer(self) -> tuple[torch.optim.Optimizer, list[float]]:
        """Returns the optimizer, and for each parameter group the factor between its learning rate and the
        schedule's rate."""
        optimizer = self.optimizer_settings.build(self, lr=1.0)
        peak = self.learning_rate.peak
        return optimizer, [self.optimizer_settings.peak_of(group, peak) / peak for group in optimizer.param_groups]

    def configure_optimizers(self) -> Any:
        optimizer, multiples = self.build_optimizer()
        self._group_settings = [
            {name: value for name, value in group.items() if name not in ("params", "lr")}
            for group in optimizer.param_groups
        ]
        rates: list[Callable[[int], float]] = [partial(self._rate_of_group, multiple) for multiple in multiples]
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rates)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # --- evaluation ---------------------------------------------------------------------------------------------------

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        in_curve = batch_idx < self.curve.batches
        if self.curve.is_brief and not in_curve:
            return
        total, count = self.sum_of_losses(batch)
        if not self.curve.is_brief:
            self.update_mean(f"loss/held_out_{batch['source']}", total, count)
        if in_curve:
            self.update_mean(f"held_out/{batch['source']}", total, count)

    def on_validation_epoch_start(self) -> None:
        self._evaluation_means.clear()

    def on_validation_epoch_end(self) -> None:
        means = {name: metric.compute() for name, metric in self._evaluation_means.items()}
        if not self.curve.is_brief:
            counts = {name: metric.count for name, metric in self._evaluation_means.items()}
            self.run_facts.held_out_counts = {
                source: round(count) for source, count in metrics_of_sources(counts).items()
            }
        self.log_dict(means, logger=False)
        # Not through Lightning's log: it restarts the step count of loggers after a resume at a stage's end.
        for logger in self.trainer.loggers:
            logger.log_metrics({name: float(mean) for name, mean in means.items()}, step=self.trainer.global_step)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.validation_step(batch, batch_idx, dataloader_idx)

    on_test_epoch_start = on_validation_epoch_start
    on_test_epoch_end = on_validation_epoch_end

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> list[dict[str, Any]]:
        """Returns for each row of a `HeldOutBatch` its source, number, tokens, mean loss (nats/token) and text.

        A row that is one example has the file, row and `id` of that example instead of a number.
        """
        nats = (
            token_losses(self.hidden_states(batch), self.decoder.lm_head.weight, batch["labels"])
            .cpu()
            .double()
            .sum(1)
            .tolist()
        )
        tokens = (batch["labels"] >= 0).sum(1).tolist()
        return [
            {"source": batch["source"], **place, "tokens": n, "loss": loss / n, "text": text}
            for place, n, loss, text in zip(places_of(batch), tokens, nats, self.texts_of(batch), strict=True)
            if n
        ]

    def texts_of(self, batch: TokenBatch) -> list[str]:
        """Returns the text of each row, from its first token to the last one that is predicted."""
        data = data_of(self.trainer, DataWithTokenizer, "{data} has no tokenizer to write the texts of rows")
        tokenizer = data.tokenizer.hf if isinstance(data.tokenizer, DocumentTokenizer) else data.tokenizer
        texts: list[str] = []
        for ids, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
            end = max((place for place, label in enumerate(labels) if label >= 0), default=-1) + 1
            text = tokenizer.decode([*ids[:end], *labels[end - 1 : end]])
            assert isinstance(text, str)
            texts.append(text)
        return texts

    def update_mean(self, name: str, total: Tensor, count: Tensor) -> None:
        """Adds a batch to the mean that is logged under a name after the evaluation."""
        # A plain dict: the metrics are new for each validation, and no checkpoint contains them.
        if name not in self._evaluation_means:
            # In float64 only the last digits of the mean depend on the distribution of rows over ranks.
            metric = CountedMean().to(self.device)
            metric.set_dtype(widest_float(self.device))
            self._evaluation_means[name] = metric
        total, weight = (x.to(widest_float(self.device)) for x in (total, count))
        self._evaluation_means[name].update(total / weight.clamp(min=1), weight=weight)

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # Write the logs up to this step before the checkpoint, so a run that is killed afterwards resumes without gaps.
        self._log_step()
        for logger in self.trainer.loggers:
            logger.save()
        checkpoint["decoder_config"] = self.config.facts()
        checkpoint["seed"] = self._seed
        checkpoint["optimizer"] = type(self.optimizer_settings).__name__
        if self.weights is not None:
            checkpoint["base_weights"] = self.weights
        if self.lora is not None:
            checkpoint["lora"] = asdict(self.lora)
            checkpoint["base_digest"] = self._base_digest
            checkpoint["state_dict"] = {name: checkpoint["state_dict"][name] for name in self._trained()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a different adapter or decoder, naming the fields that differ, before torch lists every tensor.

        Also converts the module to float64 for double precision. Lightning does so only after it has loaded the
        weights, which would round float64 weights.

        Raises:
            ValueError: the checkpoint has a different adapter or decoder, or training would continue with another seed
                or another optimizer.
        """
        adapter, saved_adapter = (None if self.lora is None else asdict(self.lora)), checkpoint.get("lora")
        if saved_adapter != adapter:
            raise ValueError(
                f"the checkpoint was trained with lora {saved_adapter}, the config has {adapter}: set it back, or "
                "begin a new run without --ckpt_path"
            )
        saved, mine = checkpoint.get("decoder_config"), self.config.facts()
        if saved is None:
            raise ValueError("the checkpoint holds no decoder of lightning-danube")
        if saved != mine:
            different = [
                f"{_OPTION_OF_FIELD.get(key, key)} {saved.get(key)} (here {mine.get(key)})"
                for key in {**mine, **saved}
                if saved.get(key) != mine.get(key)
            ]
            raise ValueError(
                f"the checkpoint holds another decoder than the config: {', '.join(different)}: set what differs back, "
                "or begin a new run without --ckpt_path"
            )
        if self.lora is not None and checkpoint["state_dict"].keys() != set(self._trained()):
            raise ValueError("the checkpoint holds another adapter than the config describes: begin a new run")
        if self.lora is not None and checkpoint.get("base_digest", self._base_digest) != self._base_digest:
            raise ValueError(
                f"the checkpoint was trained on other weights ({checkpoint['base_weights']}) than model.weights "
                f"{self.weights} names now: bring those back"
            )
        if self._trainer is None:
            return
        if isinstance(self.trainer.precision_plugin, DoublePrecision):
            self.double()
        if self.trainer.state.fn != "fit":
            return
        if checkpoint.get("seed", self._seed) != self._seed:
            raise ValueError(
                f"seed_everything is {self._seed}, the run began with {checkpoint['seed']}: set it back, or begin a "
                "new run without --ckpt_path"
            )
        mine_is = type(self.optimizer_settings).__name__
        saved_by = checkpoint.get("optimizer")
        if saved_by is None and self.trainer.is_global_zero:
            tell(f"warning: the checkpoint does not say which optimizer it is of, so {mine_is} could not be compared")
        if saved_by not in (None, mine_is):
            raise ValueError(
                f"the run was trained with {saved_by}, model.optimizer is {mine_is}: set it back, or begin a new run "
                "without --ckpt_path"
            )
        # Lightning would begin with new moments, or with the learning rate of the first step, and say nothing.
        # `optimizer_groups` stands for the states that all ranks have saved together.
        lost = [] if checkpoint.get("optimizer_states") or checkpoint.get("optimizer_groups") else ["optimizer_states"]
        if lost := lost + [name for name in ("lr_schedulers",) if not checkpoint.get(name)]:
            raise ValueError(
                f"the checkpoint has no {' and no '.join(lost)}: no run can resume from it, so begin a new run"
            )
        _restate_micro_batches(checkpoint, self.trainer.accumulate_grad_batches)

    def _trained(self) -> list[str]:
        """Returns the names of the parameters that train, in the order of the modules, so that files are equal."""
        return [name for name, parameter in self.named_parameters() if parameter.requires_grad]


_OPTION_OF_FIELD = {"max_position_embeddings": "data.context_length", "vocab_size": "vocabulary of data.tokenizer"}


def _restate_micro_batches(checkpoint: dict[str, Any], accumulation: int) -> None:
    """Converts the trainer's count of micro-batches to the present accumulation.

    The trainer derives its position in the epoch from this count. A count from another micro-batch size or number of
    devices would end the run early or late.
    """
    loop = checkpoint["loops"]["fit_loop"]
    counted = loop["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]["total"]["completed"]
    if checkpoint["global_step"] != counted:
        raise ValueError(
            f"the checkpoint says that it is of step {checkpoint['global_step']}, its optimizer has done {counted}: "
            "it was changed; name another checkpoint"
        )
    progress = loop["epoch_loop.batch_progress"]
    done = counted * accumulation
    for counts in (progress["total"], progress["current"]):
        # While a batch ends, "completed" is one less than "ready": add the difference, do not set the values.
        ahead = counts["ready"]
        for name in ("ready", "started", "processed", "completed"):
            counts[name] += done - ahead
