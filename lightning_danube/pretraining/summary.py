"""The plan and the result of a pre-training run, as text and as the content of `summary.json`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from lightning_danube.checkpoints.runs import closing_lines, newest_checkpoint, read_step
from lightning_danube.model import Decoder, DecoderConfig
from lightning_danube.pretraining.curriculum import Curriculum
from lightning_danube.pretraining.data import CurriculumData
from lightning_danube.pretraining.position import curriculum_of
from lightning_danube.pretraining.settings import step_layout
from lightning_danube.terminal import amount, minutes_and_seconds, program, quoted, text_table
from lightning_danube.training.position import end_of_run, replicas_of, steps_ahead
from lightning_danube.training.run_facts import RunFacts, Trained, rate, trained_parameters

Losses = Mapping[str, float]
"""Source → held-out loss in nats/token."""


@dataclass(frozen=True)
class HeldOutText:
    """Tokens of the held-out texts that measure a run, by source, and the factors that convert their losses."""

    tokens: dict[str, int]
    bits_per_nat: dict[str, float]
    """Factor from nats/token to bits/byte of the text."""

    @classmethod
    def of(cls, data: CurriculumData, rows: int | None) -> HeldOutText:
        """Returns the facts about the held-out texts of a data module.

        Args:
            rows: largest number of held-out rows of a source; None: all rows.
        """
        tokens, sizes = data.evaluation_tokens(rows), data.evaluation_bytes(rows)
        return cls(tokens, {name: n / max(1, sizes[name]) / math.log(2) for name, n in tokens.items()})

    def counted(self, facts: RunFacts) -> HeldOutText:
        """Returns the same with the tokens that the last evaluation has counted, if there was one."""
        return replace(self, tokens=facts.held_out_counts or self.tokens)

    def bits_per_byte(self, losses: Losses) -> dict[str, float]:
        """Returns source → held-out loss in bits/byte, a unit that does not depend on the tokenizer."""
        return {name: loss * self.bits_per_nat[name] for name, loss in losses.items()}


# --- the plan ---------------------------------------------------------------------------------------------------------


def pretraining_plan_text(trainer: Trainer, decoder: Decoder) -> str:
    """Returns what a run is going to do. `trainer.log_dir` is a broadcast, so every rank must call it."""
    data, curriculum = curriculum_of(trainer)
    length = length_line(
        data,
        end=end_of_run(trainer),
        steps=steps_ahead(trainer, curriculum.total_steps),
        replicas=replicas_of(trainer)[0],
        accumulation=trainer.accumulate_grad_batches,
        run=str(trainer.log_dir),
    )
    return "\n".join([*model_lines(decoder, trained_parameters(decoder)), source_table(data), length])


def model_lines(decoder: Decoder, trained: int) -> list[str]:
    """Returns the shape of the model, and a warning if the first step has to compile its blocks.

    Args:
        trained: parameters that train.
    """
    config = decoder.config
    lines = [
        f"model: {config.num_hidden_layers} layers × {config.hidden_size} hidden, "
        f"{config.num_attention_heads} query and {config.num_key_value_heads} key-value heads, "
        f"{config.parameters:,} parameters" + ("" if trained == config.parameters else f", of which {trained:,} train")
    ]
    if decoder.has_compiled_blocks:
        lines.append(
            "its blocks are compiled at the first step and at the first held-out loss, which take about half a minute "
            "longer; model.compile_blocks: false turns this off"
        )
    return lines


def source_table(data: CurriculumData) -> str:
    """Returns a table of the sources: documents, tokens, and the number of epochs over them."""
    epochs = data.curriculum.passes()
    rows = []
    for name, shards in data.shards.items():
        train, held_out = shards.counts("train"), shards.counts("validation")
        documents = "not listed" if train.documents is None else f"{train.documents:,}"
        rows.append([name, documents, f"{train.tokens:,}", f"{held_out.tokens:,}", f"{epochs[name]:.2f}"])
    return text_table(["source", "documents", "tokens", "held-out tokens", "epochs"], rows)


def length_line(data: CurriculumData, *, end: int, steps: str, replicas: int, accumulation: int, run: str) -> str:
    """Returns a line with the length of the run, the parts of an optimizer step, and the run's directory.

    Args:
        end: tokens after which the run ends.
        steps: optimizer steps of the run, as text.
        accumulation: micro-batches of an optimizer step on each replica.
    """
    total = data.curriculum.total_tokens
    tokens = f"{total:,}" if end >= total else f"{end:,} of {total:,}"
    return (
        f"run: {tokens} tokens in {steps} steps of {data.batch_tokens:,} "
        f"({step_layout(replicas, accumulation, data.micro_batch_size, data.context_length)}), into {run}"
    )


# --- the result of `fit` ----------------------------------------------------------------------------------------------


def with_stage_losses(losses: Sequence[Losses], stage: int, measured: Losses) -> list[Losses]:
    """Returns the held-out losses at the ends of the stages up to `stage`, whose losses are `measured`.

    A stage has no losses if a changed config ended it exactly where the run was resumed.
    """
    return [*([*losses] + [{}] * stage)[:stage], measured]


def stage_summaries(
    curriculum: Curriculum, tokens_by_source: Sequence[Mapping[str, int]], losses: Sequence[Losses]
) -> list[dict[str, Any]]:
    """Returns for each stage its tokens, their shares by source, and the held-out losses at its end."""
    stages = []
    for k, (stage, by_source) in enumerate(zip(curriculum.stages, tokens_by_source, strict=True)):
        total = sum(by_source.values())
        stages.append(
            {
                "name": stage.name,
                "tokens": total,
                "mix": {name: n / total if total else 0.0 for name, n in by_source.items()},
                "tokens_by_source": by_source,
                "val_loss": losses[k] if k < len(losses) else {},
            }
        )
    return stages


def fit_summary(
    task: LightningModule,
    facts: RunFacts,
    curriculum: Curriculum,
    losses: Sequence[Losses],
    held_out: HeldOutText,
    unigram: Losses,
    trained: Trained,
    *,
    before: Losses,
    counted: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Returns the content of `summary.json` of `fit`. A collective call: every rank must make it.

    `skipped_steps` did not change the model. `tokens_per_second` is the speed of training without validation. `stages`
    has for each stage its tokens, the shares and tokens by source, and the held-out loss by source in nats/token.
    `val_bits_per_byte` is the last held-out loss in a unit that does not depend on the tokenizer. `recall` exists if
    FactRecall asks for facts.

    Args:
        losses: held-out losses at the end of each finished stage.
        unigram: losses of a model that knows only the frequency of each token.
        counted: training tokens in which the frequencies were counted, for sources that have more.
        before: held-out losses before the first step; empty if they were not measured.

    Raises:
        ValueError: no TokenLedger counts the tokens.
    """
    if facts.tokens_by_source is None:
        raise ValueError(
            "PretrainingSummary reads the TokenLedger: name lightning_danube.callbacks.TokenLedger in trainer.callbacks"
        )
    seen = facts.tokens_by_source()
    tokens = sum(sum(by_source.values()) for by_source in seen)
    config = task.config
    assert isinstance(config, DecoderConfig)
    last = losses[-1] if losses else {}
    weights = getattr(task, "weights", None)
    return {
        **({} if weights is None else {"weights": weights}),
        "tokens": tokens,
        "steps": trained.steps,
        "skipped_steps": facts.skipped_steps() if facts.skipped_steps else 0,
        "parameters": sum(parameter.numel() for parameter in task.parameters()),
        "trained_parameters": trained_parameters(task),
        "parameters_without_embedding": config.parameters_without_embedding,
        "flops": config.flops_per_token(curriculum.context_length) * tokens,
        "precision": trained.precision,
        "seconds": round(trained.seconds, 3),
        "tokens_per_second": rate(tokens, facts.training_seconds),
        "stages": stage_summaries(curriculum, seen, losses),
        **({"val_loss_before": before} if before else {}),
        "val_loss": last,
        "val_bits_per_byte": held_out.bits_per_byte(last),
        "val_tokens": held_out.tokens,
        "unigram_loss": unigram,
        **({"unigram_counted_tokens": dict(counted)} if counted else {}),
        **({} if facts.recall is None else {"recall": facts.recall}),
    }


def early_stop_text(summary: Mapping[str, Any], total_steps: int, run: Path) -> str:
    """Returns the last step of a stopped run and of its last checkpoint; also the run's directory if no stage ended.

    Args:
        summary: as from `fit_summary`.
    """
    saved = newest_checkpoint(run)
    last = f"the last checkpoint is of step {read_step(saved)}" if saved is not None else "nothing was saved"
    text = f"stopped after {summary['steps']} of {amount(total_steps, 'step')}; {last}"
    return text if any(stage["val_loss"] for stage in summary["stages"]) else f"{text}\nrun:  {run}"


def result_text(
    summary: Mapping[str, Any],
    sources: Sequence[str],
    run: Path,
    samples: Mapping[str, str],
    *,
    in_tensorboard: bool = True,
) -> str:
    """Returns the tables of a finished run, a sample of its text, and the next commands.

    Args:
        summary: as from `fit_summary`.
        samples: prompt → the prompt and its continuation.
        in_tensorboard: whether the run has curves in TensorBoard.
    """
    counted = summary.get("unigram_counted_tokens", {})
    notes = [f"unigram baseline of {name}: counted in {n:,} of its training tokens" for name, n in counted.items()]
    lines = ["", _loss_table(summary, sources), *notes, "", _share_table(summary, sources), ""]
    prompt = next(iter(samples), None)
    if prompt is not None:
        lines += ["sample: " + " ".join(samples[prompt].split()), ""]
    done = f"{summary['tokens']:,} tokens in {minutes_and_seconds(summary['seconds'])}"
    if summary["tokens_per_second"] is not None:
        done += f", {summary['tokens_per_second']:,.0f} tokens/s in training"
    asked = quoted("The" if prompt is None else prompt)
    lines += closing_lines(done, run, "generate", "--weights", run, "--prompt", asked)
    if in_tensorboard:
        lines.append(f"      {program('tensorboard')} --logdir {quoted(run.parent)}")
    return "\n".join(lines)


def _loss_table(summary: Mapping[str, Any], sources: Sequence[str]) -> str:
    rows = [["unigram baseline", *(f"{summary['unigram_loss'][name]:.3f}" for name in sources)]]
    if before := summary.get("val_loss_before"):
        rows.append(["before training", *(f"{before[name]:.3f}" if name in before else "–" for name in sources)])
    for stage in summary["stages"]:
        if losses := stage["val_loss"]:
            # Sources that were added later have no loss at this stage.
            shown = (f"{losses[name]:.3f}" if name in losses else "–" for name in sources)
            rows.append([f"after {stage['name']}", *shown])
    if bits := summary["val_bits_per_byte"]:
        rows.append(["the last in bits/byte", *(f"{bits[name]:.3f}" for name in sources)])
    return text_table(["held-out loss, nats/token", *sources], rows)


def _share_table(summary: Mapping[str, Any], sources: Sequence[str]) -> str:
    rows = [
        [stage["name"], f"{stage['tokens']:,}", *(f"{100 * stage['mix'][name]:.1f} %" for name in sources)]
        for stage in summary["stages"]
    ]
    return text_table(["tokens seen", "tokens", *sources], rows)


# --- the result of `validate` and `test` ------------------------------------------------------------------------------


def evaluation_summary(losses: Losses, held_out: HeldOutText, *, weights: str, precision: str | int) -> dict[str, Any]:
    """Returns the content of `summary.json` of `validate` and `test`. Losses are in nats/token."""
    return {
        "weights": weights,
        "precision": precision,
        "val_loss": losses,
        "perplexity": {name: math.exp(loss) for name, loss in losses.items()},
        "val_bits_per_byte": held_out.bits_per_byte(losses),
        "val_tokens": held_out.tokens,
    }


def evaluation_table(losses: Losses, held_out: HeldOutText) -> str:
    """Returns a table of the held-out loss and the perplexity of each source."""
    rows = [
        [name, f"{held_out.tokens[name]:,}", f"{loss:.4f}", f"{math.exp(loss):.2f}"] for name, loss in losses.items()
    ]
    return text_table(["held-out text", "tokens", "nats/token", "perplexity"], rows)
