"""The position of a pre-training run in its curriculum."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer

from lightning_danube.pretraining.curriculum import Curriculum
from lightning_danube.pretraining.data import CurriculumData
from lightning_danube.training.contract import data_of
from lightning_danube.training.position import replicas_of
from lightning_danube.training.trackers.loss_curve import curve_of, next_point


def curriculum_of(trainer: Trainer) -> tuple[CurriculumData, Curriculum]:
    """Returns the run's data module and its curriculum.

    Raises:
        ValueError: the run has other data.
    """
    problem = "this callback counts the stages of CurriculumData: remove it, or use that data module"
    data = data_of(trainer, CurriculumData, problem)
    return data, data.curriculum


def has_stages(trainer: Trainer) -> bool:
    """Returns whether the run's data have stages."""
    return isinstance(getattr(trainer, "datamodule", None), CurriculumData)


def samples_done(trainer: Trainer) -> int:
    """Returns the samples of finished optimizer steps."""
    data, _ = curriculum_of(trainer)
    return trainer.global_step * data.batch_samples


def samples_of_step(trainer: Trainer, step: int) -> list[dict[str, Any]]:
    """Returns what an optimizer step, counted from 1, was made of.

    The samples at a position are computed, so no rank has to tell another rank what its batch held.
    """
    data, curriculum = curriculum_of(trainer)
    keys = curriculum.samples((step - 1) * data.batch_samples, step * data.batch_samples)
    return [curriculum.described(key) for key in keys]


def finished_stage(trainer: Trainer) -> int | None:
    """Returns the number of the stage that ends at this step; None inside a stage, and for data without stages."""
    if not has_stages(trainer):
        return None
    _, curriculum = curriculum_of(trainer)
    done = samples_done(trainer)
    return next((k for k, span in enumerate(curriculum.spans) if span.stop == done), None)


def stage_name(trainer: Trainer) -> str | None:
    """Returns the name of the next sample's stage; None for data without stages."""
    if not has_stages(trainer):
        return None
    _, curriculum = curriculum_of(trainer)
    return curriculum.stages[curriculum.stage_index(samples_done(trainer))].name


def stage_line(trainer: Trainer, resumed: bool) -> str:
    """Returns a line about the stage of the next sample: its number, name, tokens and shares.

    Args:
        resumed: whether the run goes on within the stage.
    """
    data, curriculum = curriculum_of(trainer)
    k = curriculum.stage_index(samples_done(trainer))
    span, stage = curriculum.spans[k], curriculum.stages[k]
    total = sum(stage.mix.values())
    mix = ", ".join(f"{name} {100 * share / total:.1f} %" for name, share in stage.mix.items() if share)
    tokens = span.samples * data.context_length
    verb = "resuming" if resumed else "entering"
    return f"{verb} stage {k + 1} of {len(curriculum.stages)}: {stage.name}, {tokens:,} tokens: {mix}"


def begin_loss_curve(trainer: Trainer, task: LightningModule) -> None:
    """Chooses the held-out rows of the curve of a run that begins or goes on."""
    data, curriculum = curriculum_of(trainer)
    curve = curve_of(task)
    batch_rows = data.micro_batch_size * replicas_of(trainer)[0]
    curve.begin(trainer, curriculum.total_samples, len(curriculum.sources), batch_rows)


def all_held_out_rows_are_due(trainer: Trainer, interval: int | None) -> bool:
    """Returns whether all held-out rows are measured after this step: at the end of a stage or of an interval.

    Args:
        interval: optimizer steps between two such measurements, beside those of stages.
    """
    step = trainer.global_step
    return finished_stage(trainer) is not None or (interval is not None and step > 0 and step % interval == 0)


def next_validation(trainer: Trainer, interval: int | None) -> int | None:
    """Returns the step after which the run is validated next: at the end of a stage, of an interval, or of a tenth of
    the run, where the curve has a point. None at the end of the run."""
    data, curriculum = curriculum_of(trainer)
    step, total = trainer.global_step, curriculum.total_steps
    if step >= total:
        return None
    ends = [span.stop // data.batch_samples for span in curriculum.spans]
    if interval:
        ends.append((step // interval + 1) * interval)
    return min([next_point(step, total), *(end for end in ends if end > step)])
