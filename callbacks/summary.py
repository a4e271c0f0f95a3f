"""What a pre-training run was and what came of it: a table before, a table after, and summary.json."""

from __future__ import annotations

import math
import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_danube.callbacks.checkpoints import wait_for_checkpoint
from lightning_danube.callbacks.fact_recall import FactRecall
from lightning_danube.callbacks.ledger import TokenLedger
from lightning_danube.callbacks.progress import say
from lightning_danube.callbacks.samples import TextSamples
from lightning_danube.callbacks.skipping import skipped_steps
from lightning_danube.callbacks.throughput import Throughput
from lightning_danube.checkpoints.runs import newest_checkpoint, read_step
from lightning_danube.files import write_json
from lightning_danube.model import DecoderConfig
from lightning_danube.pretraining.data import CurriculumData
from lightning_danube.pretraining.position import curriculum_of, finished_stage
from lightning_danube.terminal import program, quoted, runnable, text_table
from lightning_danube.training.position import end_of_run, run_directory, steps_ahead
from lightning_danube.training.replicas import replicas_of


class PretrainingSummary(Callback):
    """Prints the plan and the result of a run and writes `summary.json` after every stage.

    `summary.json` of `fit` holds tokens, steps, skipped_steps (those among them that left the model as it was),
    parameters, precision, seconds (all of the run, over its sessions), tokens_per_second (of training alone), and for
    each stage its tokens, the shares and tokens by source, and the held-out loss by source in nats a token;
    unigram_loss is the same for a model that only knows how frequent each token is. val_bits_per_byte is the last
    held-out loss in a unit that does not depend on the tokenizer. Beside FactRecall it has the share of facts known.
    That of `validate` and `test` holds val_loss, perplexity and val_bits_per_byte with the tokens they were measured
    on.
    """

    def __init__(self) -> None:
        self._stage_losses: list[dict[str, float]] = []
        self._seconds_before = 0.0
        self._began = time.monotonic()
        self._unigram: dict[str, float] = {}
        self._bits_per_nat: dict[str, float] = {}

    # --- fit ----------------------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._began = time.monotonic()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data, curriculum = curriculum_of(trainer)
        self._unigram, self._bits_per_nat = data.unigram_losses(), bits_per_nat(data, data.validation_rows)
        config: Any = pl_module.config
        lines = [
            f"model: {config.num_hidden_layers} layers × {config.hidden_size} hidden, "
            f"{config.num_attention_heads} query and {config.num_key_value_heads} key-value heads, "
            f"{config.parameters:,} parameters"
        ]
        if getattr(pl_module.decoder, "has_compiled_blocks", False):
            lines.append("its blocks are compiled at the first step and at the first held-out loss, which take longer")
        passes = curriculum.passes()
        rows = []
        for name, shards in data.shards.items():
            train, held_out = shards.counts("train"), shards.counts("validation")
            rows.append(
                [name, f"{train.documents:,}", f"{train.tokens:,}", f"{held_out.tokens:,}", f"{passes[name]:.2f}"]
            )
        lines.append(text_table(["source", "documents", "tokens", "held-out tokens", "passes"], rows))
        tokens = f"{curriculum.total_tokens:,}"
        if (end := end_of_run(trainer)) < curriculum.total_tokens:
            tokens = f"{end:,} of {tokens}"
        lines.append(
            f"run: {tokens} tokens in {steps_ahead(trainer, curriculum.total_steps)} steps of {data.batch_tokens:,} "
            f"({replicas_of(trainer)[0]} × {trainer.accumulate_grad_batches} × {data.micro_batch_size} rows of "
            f"{data.context_length}), into {trainer.log_dir}"  # a broadcast, so on every rank
        )
        say(trainer, "\n".join(lines))
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
                card = "\n".join("    " + line for line in "\n".join(lines).splitlines())
                logger.experiment.add_text("run/plan", card, trainer.global_step)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "validate":
            data = trainer.datamodule  # type: ignore[attr-defined]
            self._report_evaluation(trainer, data.validation_rows)
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        k = finished_stage(trainer)
        if k is None:
            return
        # A stage that a changed config ended at the place of the resume has no validation of its own.
        before = (self._stage_losses + [{}] * k)[:k]
        self._stage_losses = [*before, last_held_out_losses(trainer)]
        summary = self._fit_summary(trainer, pl_module)
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            write_json(run_directory(trainer) / "summary.json", summary)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        summary = self._fit_summary(trainer, pl_module)
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        directory = run_directory(trainer)
        write_json(directory / "summary.json", summary)
        _, curriculum = curriculum_of(trainer)
        if trainer.global_step < curriculum.total_steps:
            wait_for_checkpoint(trainer)
            saved = newest_checkpoint(directory)
            last = f"the last checkpoint is of step {read_step(saved)}" if saved is not None else "nothing was saved"
            say(trainer, f"stopped after {trainer.global_step} of {curriculum.total_steps} steps; {last}")
            if not self._stage_losses:
                say(trainer, f"run:  {directory}")
        if not self._stage_losses:
            return
        sources = list(curriculum.sources)
        rows = [["unigram baseline", *(f"{self._unigram[name]:.3f}" for name in sources)]]
        for stage in summary["stages"]:
            if losses := stage["val_loss"]:
                # A source that joined later was not measured then.
                shown = (f"{losses[name]:.3f}" if name in losses else "–" for name in sources)
                rows.append([f"after {stage['name']}", *shown])
        if bits := summary["val_bits_per_byte"]:
            rows.append(["the last in bits a byte", *(f"{bits[name]:.3f}" for name in sources)])
        lines = ["", text_table(["held-out loss, nats a token", *sources], rows), ""]
        shares = [
            [s["name"], f"{s['tokens']:,}", *(f"{100 * s['mix'][n]:.1f} %" for n in sources)] for s in summary["stages"]
        ]
        lines += [text_table(["tokens seen", "tokens", *sources], shares), ""]
        samples = next((c for c in trainer.callbacks if isinstance(c, TextSamples)), None)  # type: ignore[attr-defined]
        prompt = "The"
        if samples is not None and samples.latest:
            prompt = samples.prompts[0]
            lines += ["sample: " + " ".join(samples.latest[prompt].split()), ""]
        minutes, seconds = divmod(round(summary["seconds"]), 60)
        lines += [
            f"{summary['tokens']:,} tokens in {minutes} min {seconds:02d} s, "
            f"{summary['tokens_per_second']:,.0f} tokens/s in training",
            f"run:  {directory}",
            f"next: {runnable()} generate --weights {quoted(directory)} --prompt {quoted(prompt)}",
            f"      {program('tensorboard')} --logdir {quoted(directory.parent)}",
        ]
        say(trainer, "\n".join(lines))

    def _fit_summary(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        data, curriculum = curriculum_of(trainer)
        ledger = next((c for c in trainer.callbacks if isinstance(c, TokenLedger)), None)  # type: ignore[attr-defined]
        if ledger is None:
            raise ValueError(
                "PretrainingSummary reads the TokenLedger: name lightning_danube.callbacks.TokenLedger in "
                "trainer.callbacks"
            )
        throughput = next((c for c in trainer.callbacks if isinstance(c, Throughput)), None)  # type: ignore[attr-defined]
        recall = next((c for c in trainer.callbacks if isinstance(c, FactRecall)), None)  # type: ignore[attr-defined]
        seen = ledger.tokens_by_source(trainer)
        tokens = sum(sum(by_source.values()) for by_source in seen)
        stages = []
        for k, (stage, by_source) in enumerate(zip(curriculum.stages, seen, strict=True)):
            total = sum(by_source.values())
            stages.append(
                {
                    "name": stage.name,
                    "tokens": total,
                    "mix": {name: n / total if total else 0.0 for name, n in by_source.items()},
                    "tokens_by_source": by_source,
                    "val_loss": self._stage_losses[k] if k < len(self._stage_losses) else {},
                }
            )
        config: DecoderConfig = pl_module.config  # type: ignore[assignment]
        return {
            "tokens": tokens,
            "steps": trainer.global_step,
            "skipped_steps": skipped_steps(trainer),
            "parameters": sum(parameter.numel() for parameter in pl_module.parameters()),
            "parameters_without_embedding": config.parameters_without_embedding,
            "flops": config.flops_per_token(data.context_length) * tokens,
            "precision": trainer.precision,
            "seconds": round(self._seconds(), 3),
            "tokens_per_second": round(tokens / throughput.seconds, 1) if throughput and throughput.seconds else None,
            "stages": stages,
            "val_loss": self._stage_losses[-1] if self._stage_losses else {},
            "val_bits_per_byte": in_bits_per_byte(self._stage_losses[-1], self._bits_per_nat)
            if self._stage_losses
            else {},
            "val_tokens": data.evaluation_tokens(data.validation_rows),
            "unigram_loss": self._unigram,
            **({} if recall is None else {"recall": recall.summary()}),
        }

    def _seconds(self) -> float:
        return self._seconds_before + time.monotonic() - self._began

    def state_dict(self) -> dict[str, Any]:
        return {"stage_losses": self._stage_losses, "seconds": self._seconds()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._stage_losses = state_dict["stage_losses"]
        self._seconds_before = state_dict["seconds"]

    # --- validate and test --------------------------------------------------------------------------------------------

    def _report_evaluation(self, trainer: Trainer, limit: int | None) -> None:
        """Prints and writes the result of `validate` (limited rows) or `test` (all)."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, CurriculumData)
        losses, tokens = last_held_out_losses(trainer), data.evaluation_tokens(limit)
        summary = {
            "weights": str(trainer.ckpt_path),
            "precision": trainer.precision,
            "val_loss": losses,
            "perplexity": {name: math.exp(loss) for name, loss in losses.items()},
            "val_bits_per_byte": in_bits_per_byte(losses, bits_per_nat(data, limit)),
            "val_tokens": tokens,
        }
        if trainer.is_global_zero:
            path = run_directory(trainer) / "summary.json"
            write_json(path, summary)
            rows = [
                [name, f"{tokens[name]:,}", f"{loss:.4f}", f"{math.exp(loss):.2f}"] for name, loss in losses.items()
            ]
            say(trainer, text_table(["held-out text", "tokens", "nats a token", "perplexity"], rows))
            say(trainer, f"written to {path}")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._report_evaluation(trainer, None)


def bits_per_nat(data: CurriculumData, limit: int | None) -> dict[str, float]:
    """Returns for each source what turns its held-out loss in nats a token into bits a byte of its text."""
    tokens, sizes = data.evaluation_tokens(limit), data.evaluation_bytes(limit)
    return {name: n / max(1, sizes[name]) / math.log(2) for name, n in tokens.items()}


def in_bits_per_byte(losses: dict[str, float], factors: dict[str, float]) -> dict[str, float]:
    return {name: loss * factors[name] for name, loss in losses.items()}


def last_held_out_losses(trainer: Trainer) -> dict[str, float]:
    """Source → nats a token, of the last validation."""
    return {
        name.removeprefix("loss/held_out_"): float(value)
        for name, value in trainer.callback_metrics.items()
        if name.startswith("loss/held_out_")
    }
