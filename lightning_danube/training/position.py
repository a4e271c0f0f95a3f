"""The position of a run: its tokens, its steps, its directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from lightning_danube.training.contract import TrainingData, data_of


class RunTrainer(Trainer):
    """A trainer whose files go into its `default_root_dir`, whatever logs the run."""

    @property
    def log_dir(self) -> str:
        """Returns the run's directory. A broadcast: a rank that reads it alone waits for the others forever."""
        return str(self.strategy.broadcast(self.default_root_dir))


def replicas_of(trainer: Trainer | None) -> tuple[int, int]:
    """Returns the number of data-parallel replicas, and the number of this process's replica.

    `global_rank` would be wrong under tensor parallelism.
    """
    replicas = (trainer and trainer.distributed_sampler_kwargs) or {"num_replicas": 1, "rank": 0}
    return int(replicas["num_replicas"]), int(replicas["rank"])


def training_data_of(trainer: Trainer) -> TrainingData:
    """Returns the run's data module.

    Raises:
        ValueError: the data module is not for training.
    """
    return data_of(trainer, TrainingData, "{data} does not say how long a run is: see training/contract.py")


def tokens_done(trainer: Trainer) -> int:
    """Returns the tokens of finished optimizer steps."""
    return trainer.global_step * training_data_of(trainer).batch_tokens


def end_of_run(trainer: Trainer) -> int:
    """Returns the tokens after which the run ends: all tokens of the data, or fewer if `trainer.max_steps` is lower."""
    data = training_data_of(trainer)
    limit = trainer.max_steps * data.batch_tokens
    return data.total_tokens if limit < 0 else min(data.total_tokens, limit)


def steps_ahead(trainer: Trainer, total: int) -> str:
    """Returns the steps of the run as text: "250", or "20 of 250" if `trainer.max_steps` ends the run earlier."""
    return f"{total:,}" if not 0 <= trainer.max_steps < total else f"{trainer.max_steps:,} of {total:,}"


def is_done(trainer: Trainer) -> bool:
    """Returns whether the last step of the run is finished."""
    return tokens_done(trainer) >= training_data_of(trainer).total_tokens


def ends_after_this_step(trainer: Trainer) -> bool:
    """Returns whether the run ends here: it is done, or `trainer.max_steps`, a timer or a callback stops it."""
    return trainer.should_stop or 0 <= trainer.max_steps <= trainer.global_step or is_done(trainer)


def holds_whole_model(trainer: Trainer) -> bool:
    """Returns whether this is rank zero and can run the model alone. For a sharded model, other ranks would have to."""
    return trainer.is_global_zero and isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy)


def tensorboards(trainer: Trainer) -> list[Any]:
    """Returns the run's writers of TensorBoard events. Ranks other than zero have none, or write nothing."""
    return [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]


def place_in_tensorboard(trainer: Trainer) -> int:
    """Returns where TensorBoard shows what is written now: at the training tokens in `fit`, else at the step."""
    return tokens_done(trainer) if trainer.state.fn == "fit" else trainer.global_step


def speaks_for_replica(trainer: Trainer) -> bool:
    """Returns whether this rank is the first rank of its data-parallel replica. All ranks of a replica share rows."""
    replicas, _ = replicas_of(trainer)
    return trainer.global_rank % (trainer.world_size // replicas) == 0


def logged_directory(trainer: Trainer) -> Path:
    """Returns the directory that this rank takes for the run's. `run_directory` is the one to write to."""
    if isinstance(trainer, RunTrainer):
        return Path(trainer.default_root_dir)
    logger = trainer.logger  # a trainer of Lightning's own class: where Lightning puts its files
    return Path(logger.log_dir if isinstance(logger, TensorBoardLogger) else trainer.default_root_dir)


def run_directory(trainer: Trainer) -> Path:
    """Returns the directory of this run. Only rank zero may call it.

    `trainer.log_dir` is a broadcast: a rank that reads it alone waits for the others forever.
    """
    assert trainer.is_global_zero, "other ranks have not agreed on the version: use trainer.log_dir on all of them"
    return logged_directory(trainer)


@runtime_checkable
class HasLogInterval(Protocol):
    """What Lightning's logger connector sets on a trainer; its class does not declare it."""

    log_every_n_steps: int


def log_interval(trainer: Trainer) -> int:
    """Returns every how many optimizer steps the trainer logs; 0 means never."""
    assert isinstance(trainer, HasLogInterval)
    return trainer.log_every_n_steps


def limit_log_interval(trainer: Trainer, steps: int) -> None:
    """Has the trainer log at least every `steps` optimizer steps. It warns if a run is shorter than its interval."""
    assert isinstance(trainer, HasLogInterval)
    trainer.log_every_n_steps = min(trainer.log_every_n_steps, steps)


def at_logged_step(trainer: Trainer, batch_idx: int) -> bool:
    """Returns whether this micro-batch ended an optimizer step that is logged."""
    at_step = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
    every = log_interval(trainer)
    return at_step and every > 0 and trainer.global_step % every == 0
