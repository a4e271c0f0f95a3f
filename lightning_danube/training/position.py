"""Where a run stands: what several callbacks ask."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_danube.pretraining.curriculum import Curriculum
from lightning_danube.pretraining.data import CurriculumData
from lightning_danube.training.replicas import replicas_of


def curriculum_of(trainer: Trainer) -> tuple[CurriculumData, Curriculum]:
    """The data module of the run and its curriculum.

    Raises:
        ValueError: the run has other data.
    """
    data = trainer.datamodule  # type: ignore[attr-defined]
    if not isinstance(data, CurriculumData):
        raise ValueError("this callback counts the stages of CurriculumData: remove it, or use that data module")
    return data, data.curriculum


class TokenData(Protocol):
    """What every data module of next-token prediction knows about the length of a run."""

    context_length: int
    batch_tokens: int
    total_tokens: int


def data_of(trainer: Trainer) -> TokenData:
    """The data module of the run."""
    data: TokenData = trainer.datamodule  # type: ignore[attr-defined]
    return data


def tokens_done(trainer: Trainer) -> int:
    """Tokens of finished optimizer steps."""
    return trainer.global_step * data_of(trainer).batch_tokens


def end_of_run(trainer: Trainer) -> int:
    """Tokens after which the run ends: those of the data, or fewer where `trainer.max_steps` ends it before."""
    data = data_of(trainer)
    limit = trainer.max_steps * data.batch_tokens
    return data.total_tokens if limit < 0 else min(data.total_tokens, limit)


def steps_ahead(trainer: Trainer, total: int) -> str:
    """ "250", or "20 of 250" where `trainer.max_steps` ends the run before."""
    return f"{total:,}" if not 0 <= trainer.max_steps < total else f"{trainer.max_steps:,} of {total:,}"


def is_done(trainer: Trainer) -> bool:
    """Whether the last step of the run is over."""
    return tokens_done(trainer) >= data_of(trainer).total_tokens


def speaks_for_replica(trainer: Trainer) -> bool:
    """Whether this rank is the first of those that share a data-parallel replica, and so have the same rows."""
    replicas, _ = replicas_of(trainer)
    return trainer.global_rank % (trainer.world_size // replicas) == 0


def samples_done(trainer: Trainer) -> int:
    """Samples consumed by finished optimizer steps."""
    data, _ = curriculum_of(trainer)
    return trainer.global_step * data.batch_samples


def finished_stage(trainer: Trainer) -> int | None:
    """Number of the stage that ends exactly here, if one does; of data without stages, none does."""
    if not isinstance(trainer.datamodule, CurriculumData):  # type: ignore[attr-defined]
        return None
    _, curriculum = curriculum_of(trainer)
    done = samples_done(trainer)
    return next((k for k, span in enumerate(curriculum.spans) if span.stop == done), None)


def run_directory(trainer: Trainer) -> Path:
    """Directory of this run, for use on rank zero alone.

    `trainer.log_dir` is a broadcast: asked by one rank only, it waits for the others for ever.
    """
    assert trainer.is_global_zero, "other ranks have not agreed on the version: use trainer.log_dir on all of them"
    logger = trainer.logger
    return Path(logger.log_dir if isinstance(logger, TensorBoardLogger) else trainer.default_root_dir)


def stage_name(trainer: Trainer) -> str | None:
    """Name of the stage in which the next sample lies, of data that have stages."""
    if not isinstance(trainer.datamodule, CurriculumData):  # type: ignore[attr-defined]
        return None
    _, curriculum = curriculum_of(trainer)
    return curriculum.stages[curriculum.stage_index(samples_done(trainer))].name


def at_logged_step(trainer: Trainer, batch_idx: int) -> bool:
    """Whether this micro-batch ended an optimizer step that is logged."""
    at_step = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return at_step and every > 0 and trainer.global_step % every == 0
