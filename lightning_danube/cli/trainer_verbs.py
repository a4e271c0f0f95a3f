"""LightningCLI for every task: fit, validate, test, predict."""

from __future__ import annotations

import logging
import os
import pkgutil
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.plugins import CheckpointIO
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_danube.checkpoints.runs import (
    LOCK,
    read_saved_config,
    read_step,
    remove_if_unused,
    resolve_checkpoint,
)
from lightning_danube.checkpoints.schedule import is_trial
from lightning_danube.checkpoints.single import DurableCheckpointIO
from lightning_danube.cli.command_line import check_command_line, with_config_paths
from lightning_danube.cli.configs import (
    PARSER_OPTIONS,
    add_run_options,
    one_line_errors,
    read_configuration,
    set_parsing_rules,
    with_facts_of_weights,
)
from lightning_danube.cli.errors import (
    keep_texts,
    located,
    lost_by_the_parser,
    parse,
    raised_by_a_class,
    while_restoring,
)
from lightning_danube.cli.trainer_options import check_limits
from lightning_danube.device import keep_freed_memory, usable_cores
from lightning_danube.files import locked, naming
from lightning_danube.options import full_name
from lightning_danube.signals import LEAVING_TRAINER, SIGNALS
from lightning_danube.terminal import amount, as_typed, show, tell
from lightning_danube.training.contract import StagedData
from lightning_danube.training.history import append_history, differences
from lightning_danube.training.position import RunTrainer, run_directory
from lightning_danube.training.precision import (
    Choice,
    check_precision,
    choose,
    has_precision_plugin,
    kind_of_device,
)
from lightning_danube.training.precision import warning_of as precision_warning
from lightning_danube.training.ranks import (
    RankLauncher,
    check_host_name,
    end_with_launcher,
    let_rank_zero_speak,
    this_rank,
)
from lightning_danube.training.trackers.kept import end_of_session
from lightning_danube.training.trackers.loss_curve import HeldOutCurve
from lightning_danube.training.trackers.places import LoggerPlace, make_logger, record_ids
from lightning_danube.training.trackers.run_logs import RunLogs, log_settings
from lightning_danube.training.trainer import TRAINER_DEFAULTS, FastProducts, own_strategy, share_buckets
from lightning_danube.training.tuning import TuningTask
from lightning_danube.yaml_files import load_yaml

MOST_PROCESSES = 8
"""Processes that a CPU run may start on any machine. With fewer cores they are slow, but they show that a run works."""

STEPS = {"fit": "training_step", "validate": "validation_step", "test": "test_step", "predict": "predict_step"}
"""Verb → the task's method that runs it."""


class RunRecord(SaveConfigCallback):
    """Writes `config.yaml`, and a line of `history.jsonl` each time the run is started or resumed.

    `fit` writes only after the checkpoint was accepted. A refused resume must not replace the config that the run was
    trained with, because the next resume is compared with that config.
    """

    def __init__(
        self,
        *args: Any,
        resumed_from: Path | None = None,
        changes: dict[str, tuple[Any, Any]] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.resumed_from, self.changes = resumed_from, changes or {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        agreed = trainer.strategy.broadcast(trainer.precision)
        if trainer.precision != agreed:
            raise ValueError(
                f"rank {trainer.global_rank} computes in {trainer.precision}, rank 0 in {agreed}, as each is the "
                "fastest on its machine: set trainer.precision"
            )
        if stage != "fit":
            super().setup(trainer, pl_module, stage)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with naming(Path(trainer.log_dir or "")):
            super().setup(trainer, pl_module, "fit")

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Writes on rank zero only, after the config. It must not call collective operations."""
        if stage != "fit":
            return
        run = run_directory(trainer)
        record_ids(run, trainer.loggers)
        log_settings(
            trainer.loggers, read_saved_config(run / "config.yaml") or {}, resumed=self.resumed_from is not None
        )
        append_history(
            run / "history.jsonl",
            step=read_step(self.resumed_from) if self.resumed_from else 0,
            checkpoint=str(self.resumed_from) if self.resumed_from else None,
            devices=trainer.world_size,
            differences={key: list(pair) for key, pair in self.changes.items()},
        )


class RunParser(LightningArgumentParser):
    """A parser of a whole configuration that `read_configuration` has checked.

    jsonargparse also makes parsers of this class for single values inside a configuration. They have no `texts`, and
    keep jsonargparse's behaviour.
    """

    texts: Mapping[tuple[str, ...], str | None] | None = None
    """Texts as the user stated them, by their place in the configuration."""

    def validate(self, *args: Any, **options: Any) -> None:
        """Skips jsonargparse's last validation of a whole configuration, which takes a tenth of the start.

        `read_configuration` has checked every value, and jsonargparse checks each value again when it takes it.
        """
        if self.texts is None:
            super().validate(*args, **options)

    def dump(self, namespace: Namespace, *args: Any, **options: Any) -> str:
        """Returns a configuration as YAML, with texts as they were stated. `--print_config` calls it in the parsing."""
        if self.texts is not None:
            keep_texts(namespace, self.texts)
            options["skip_validation"] = True
        text: str = super().dump(namespace, *args, **options)
        return text


class DanubeCLI(LightningCLI):
    """`<verb> --config <yaml> [--overrides]` for any task.

    Beyond LightningCLI: links pass facts of the data to the model; a run's directory is `<runs>/<name>/version_<n>`;
    `--ckpt_path last` resumes the newest version that has a checkpoint; a checkpoint's own hyperparameters never
    override the user's options.

    Raises:
        ValueError: a user's mistake; the message is one line.
    """

    def __init__(self, args: ArgsType = None) -> None:
        set_parsing_rules()
        self.run: Path | None = None
        self._loggers: Any = None
        self._texts: dict[tuple[str, ...], str | None] = {}
        self._verb = args[0] if isinstance(args, list) and args else None
        # LightningCLI would write the whole config into it, for modules that call save_hyperparameters: none does.
        self.config_dump: dict[str, Any] = {}
        with ExitStack() as self._locks:
            super().__init__(
                LightningModule,
                LightningDataModule,
                trainer_class=RunTrainer,
                parser_class=RunParser,
                subclass_mode_model=True,
                subclass_mode_data=True,
                save_config_callback=RunRecord,
                save_config_kwargs={"overwrite": True},
                seed_everything_default=0,
                trainer_defaults=TRAINER_DEFAULTS,
                parser_kwargs={"prog": as_typed()},
                auto_configure_optimizers=False,
                args=args,
            )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]  # LightningCLI calls it on the object, too
        """Returns the verbs that need a parser, and the arguments that they do not offer.

        Only the verb that runs needs one. `weights_only` is not offered: checkpoints are always read as plain data, so
        their code never runs.
        """
        verbs = {verb: {*skipped, "weights_only"} for verb, skipped in LightningCLI.subcommands().items()}
        return {self._verb: verbs[self._verb]} if self._verb in verbs else verbs

    # --- parsing ------------------------------------------------------------------------------------------------------

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        parser = super().init_parser(**{**PARSER_OPTIONS, **kwargs})
        assert isinstance(parser, RunParser)
        parser.texts = self._texts
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        add_run_options(parser)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        assert isinstance(args, list)
        check_command_line(args[1:])
        args = with_facts_of_weights(args)
        self.stated = read_configuration(args[1:])
        self._texts.update(self.stated.texts)
        self.config = parse(parser, args, self.stated)

    def _parse_ckpt_path(self) -> None:
        """Does nothing. Lightning's own method lets the checkpoint's hyperparameters override the config."""

    # --- the run's place ----------------------------------------------------------------------------------------------

    def before_instantiate_classes(self) -> None:
        assert self.subcommand is not None
        self._check_accelerator()
        self._check_limits()
        self.place = resolve_checkpoint(
            self.subcommand,
            self._get(self.config, "runs"),
            self._get(self.config, "name"),
            self._get(self.config, "ckpt_path"),
            # A task that begins with a trained model can evaluate that model.
            has_weights=self._get(self.config, "model").get("init_args", {}).get("weights") is not None,
        )
        if this_rank() == 0:
            for warning in self.place.warnings:
                tell(f"warning: {warning}")
        if self.place.checkpoint is not None:
            self._tell_checkpoint(str(self._get(self.config, "ckpt_path")))
        checkpoint = self.place.checkpoint
        self.config[self.subcommand]["ckpt_path"] = None if checkpoint is None else str(checkpoint)
        saved = None
        if self.subcommand == "fit" and checkpoint is not None:
            file = checkpoint.parent.parent / "config.yaml"
            saved = read_saved_config(file)
            if saved is None and file.exists() and this_rank() == 0:
                tell(f"warning: {file} cannot be read, so what has changed since is not known")
        self.precision = self._choose_precision(saved)
        self._note_changes(saved)
        self._take_loggers()
        if self._on_cpu():
            keep_freed_memory()

    def _tell_checkpoint(self, asked_for: str) -> None:
        """Prints which checkpoint "last" or a run's directory stands for, and which directory the run continues in."""
        checkpoint = self.place.checkpoint
        assert checkpoint is not None
        if this_rank() != 0 or str(checkpoint) == asked_for:
            return
        where = ""
        if self.subcommand == "fit":
            where = "; the run continues in the same version" if self.place.continues else "; a new version begins"
        show(f"--ckpt_path {asked_for}: {checkpoint}{where}")

    def _check_accelerator(self) -> None:
        """Checks that the accelerator exists.

        Raises:
            ValueError: a GPU is requested, and there is no GPU.
        """
        accelerator = self._get(self.config, "trainer").accelerator
        there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        if accelerator in ("gpu", "cuda", "mps") and not there[kind_of_device(accelerator)]:
            raise ValueError(
                f"trainer.accelerator is {accelerator}, and PyTorch finds no such device on this machine: set it to "
                "auto or cpu, as by --trainer.accelerator auto"
            )

    def _check_limits(self) -> None:
        """Checks that the verb has something to do: Lightning would end at once, and the exit code would be 0.

        Raises:
            ValueError: a limit of the trainer is 0.
        """
        assert self.subcommand is not None
        trainer = self._get(self.config, "trainer")
        with one_line_errors(self.stated):
            check_limits(self.subcommand, trainer.as_dict())
        if self.subcommand == "fit" and trainer.fast_dev_run and self._get(self.config, "ckpt_path") is not None:
            raise ValueError(
                "trainer.fast_dev_run tries the first steps of a run, and --ckpt_path names a run that has done them: "
                "leave one of them out"
            )

    def _on_cpu(self) -> bool:
        return kind_of_device(self._get(self.config, "trainer").accelerator) == "cpu"

    def _choose_precision(self, saved: dict[str, Any] | None) -> Choice | None:
        """Writes the run's precision into its config, and returns it. Returns None if a plugin decides the precision.

        Args:
            saved: the config of the run to resume.

        Raises:
            ValueError: the run's device does not support the configured precision.
        """
        trainer = self._get(self.config, "trainer")
        kind = kind_of_device(trainer.accelerator)
        if trainer.precision is not None:
            check_precision(full_name(trainer.precision), kind)
            return Choice(full_name(trainer.precision), "as set")
        if has_precision_plugin(trainer.plugins):
            return None
        task = pkgutil.resolve_name(self._get(self.config, "model").class_path)
        before = ((saved or {}).get("trainer") or {}).get("precision")
        choice = choose(kind, trains=task.training_step is not LightningModule.training_step, before=before)
        trainer.precision = choice.precision
        return choice

    def _tell_precision(self) -> None:
        if self.precision is None or not self.trainer.is_global_zero:
            return
        show(f"precision {self.trainer.precision}: {self.precision.reason}")
        if self.precision.reason == "as set":
            warning = precision_warning(self.precision.precision, self.trainer.strategy.root_device)
            if warning:
                tell(warning)

    def _note_changes(self, saved: dict[str, Any] | None) -> None:
        """Compares the config with the config saved beside the checkpoint, before the saved config is replaced."""
        assert self.subcommand is not None
        checkpoint = self.place.checkpoint
        changes: dict[str, tuple[Any, Any]] = {}
        if self.subcommand == "fit" and checkpoint is not None:
            new = load_yaml(self._parser(self.subcommand).dump(self.config[self.subcommand], skip_unset=False))
            if saved is not None:
                changes = differences(saved, new)
            self.save_config_kwargs |= {"resumed_from": checkpoint, "changes": changes}
        self.changes = changes

    def _show_changes(self) -> None:
        """Prints what has changed since the run stopped, and what that means for the schedule."""
        if not self.changes or not self.trainer.is_global_zero:
            return
        assert self.place.checkpoint is not None
        step = read_step(self.place.checkpoint)
        show(f"the config has changed since {self.place.checkpoint}, step {step}:")
        for key, (old, new) in self.changes.items():
            show(f"  {key}: {_shown(old)} → {_shown(new)}")
        lengths = ("data.stages", "data.tokens", "data.batch_tokens")
        if isinstance(self.datamodule, StagedData) and any(key.startswith(lengths) for key in self.changes):
            total = self.datamodule.total_tokens
            show(f"  the run now has {total:,} tokens; from here on the learning rate follows that length")

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
            if self.subcommand == "fit" and isinstance(self.model, TuningTask):
                self.model.check_ahead(self.datamodule)
        except BaseException as error:
            self._leave_unused()
            if (lost := lost_by_the_parser(error)) is not None:
                raise lost from None  # its own chain may hold the parser's error
            if not isinstance(error, ValueError):
                raise
            # The parser wraps the error of a class in the error of the union "the class, or null".
            raise ValueError(located(str(raised_by_a_class(error) or error), self.stated)) from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        assert self.subcommand is not None
        self.run = self.place.claim() if this_rank() == 0 else self.place.run
        if self.subcommand == "fit" and this_rank() == 0:
            self._locks.enter_context(locked(self.run / LOCK, str(self.run)))
        kwargs["default_root_dir"] = str(self.run)
        kwargs["logger"] = self._make_loggers()
        kwargs["plugins"] = self._plugins()
        kwargs["callbacks"] = [*self._callbacks(), FastProducts(), RunLogs(), HeldOutCurve()]
        given = self._get(self.config_init, "trainer")
        kind = kind_of_device(given["accelerator"])
        kwargs["strategy"] = own_strategy(given["strategy"], kind, given["devices"], given["num_nodes"])
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (ValueError, TypeError, OverflowError, ImportError, MisconfigurationException) as error:
            # Lightning raises these for an option that this machine, or every machine, does not support.
            raise ValueError(f"trainer: {error}") from error
        nobody_tells = isinstance(trainer._accelerator_connector.cluster_environment, LightningEnvironment)
        if trainer.num_nodes > 1 and nobody_tells and "MASTER_ADDR" not in os.environ:
            raise ValueError(
                f"trainer.num_nodes is {trainer.num_nodes}, and nothing tells the machines of each other: start the "
                "run by torchrun or SLURM (docs/cluster.md), or set MASTER_ADDR, MASTER_PORT and NODE_RANK on each"
            )
        check_host_name(trainer.num_nodes)
        cores = usable_cores()
        if self._on_cpu() and nobody_tells and trainer.num_devices > max(MOST_PROCESSES, cores):
            raise ValueError(
                f"trainer.devices is {trainer.num_devices}, and this machine has {cores} cores: each process of a CPU "
                "run needs one"
            )
        RankLauncher.install(trainer)
        share_buckets(trainer.strategy)
        # Lightning installs a handler of SIGTERM at its start, which does nothing in a validation or a test.
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
        return trainer

    def _callbacks(self) -> list[Callback]:
        """Returns the user's callbacks: a list, one alone, or none."""
        callbacks = self._get(self.config_init, "trainer")["callbacks"] or []
        return list(callbacks) if isinstance(callbacks, list | tuple) else [callbacks]

    def _take_loggers(self) -> None:
        """Takes the loggers out of the config that the parser makes objects from: they need the run's directory."""
        trainer = self._get(self.config, "trainer")
        if trainer.default_root_dir is not None:
            raise ValueError(
                f"trainer.default_root_dir is {trainer.default_root_dir}: a run's directory is "
                "<runs>/<name>/version_<n>; leave it out, and give --runs or --name"
            )
        self._loggers, trainer.logger = trainer.logger, False

    def _make_loggers(self) -> list[Logger]:
        """Returns the loggers of rank zero. Other ranks have none."""
        self._get(self.config, "trainer").logger = self._loggers  # config.yaml shows them as the user set them
        given = self._loggers
        if this_rank() != 0 or given is False:
            return []
        assert self.run is not None
        checkpoint = self.place.checkpoint
        resumed_at = read_step(checkpoint) if self.place.continues and checkpoint is not None else None
        place = LoggerPlace(self.run, resumed_at)
        if given in (None, True):
            return [make_logger(TensorBoardLogger, {"save_dir": str(place.runs)}, place)]
        return [
            make_logger(
                pkgutil.resolve_name(one.class_path),
                {**(one.get("init_args") or Namespace()).as_dict(), **(one.get("dict_kwargs") or {})},
                place,
            )
            for one in (given if isinstance(given, list | tuple) else [given])
        ]

    def _plugins(self) -> list[Any]:
        """Returns the user's plugins, and this project's checkpoint plugin unless they or their strategy bring one."""
        trainer = self._get(self.config_init, "trainer")
        plugins = trainer["plugins"] or []
        plugins = list(plugins) if isinstance(plugins, list | tuple) else [plugins]
        theirs = [*plugins, getattr(trainer["strategy"], "_checkpoint_io", None)]
        if any(isinstance(one, CheckpointIO) for one in theirs):
            return plugins
        return [*plugins, DurableCheckpointIO(background=kind_of_device(trainer["accelerator"]) != "cpu")]

    def _check_verb(self, verb: str) -> None:
        """Checks that the task supports the verb.

        Raises:
            ValueError: the task does not support it.
        """
        possible = [name for name, step in STEPS.items() if is_overridden(step, self.model)]
        if verb not in possible:
            raise ValueError(f"{type(self.model).__name__} has no {verb}: say {' or '.join(possible)}")

    def _nothing_left(self) -> str | None:
        """Returns a message that the run to resume is already complete, None if it is not."""
        if not self.place.continues or self.place.checkpoint is None or not isinstance(self.datamodule, StagedData):
            return None
        if {"data.batch_tokens", "data.context_length"} & self.changes.keys():
            return None  # with another size of steps, the numbers cannot be compared
        done, limit, steps = read_step(self.place.checkpoint), self.trainer.max_steps, self.datamodule.total_steps
        run = self.place.checkpoint.parent.parent
        if not (run / "summary.json").exists():
            return None  # it was killed between its last checkpoint and its summary
        if done == steps:
            return f"{run} is complete: {done} of {amount(steps, 'step')}; nothing is left to do"
        # If `max_steps` is below the steps already done, the run is refused later with the reason.
        if 0 <= limit <= done:
            return (
                f"{run} has {done} of {amount(steps, 'step')}, and trainer.max_steps is {limit}; nothing is left to do"
            )
        return None

    def _run_subcommand(self, subcommand: str) -> None:
        self._check_verb(subcommand)
        if (nothing_left := self._nothing_left()) is not None:
            show(nothing_left)
            return
        self._show_changes()
        self._tell_precision()
        failed = True
        try:
            with one_line_errors(self.stated):
                super()._run_subcommand(subcommand)
            failed = False
        except Exception as error:
            if (told := while_restoring(error, self.place.checkpoint)) is not None:
                raise told from error
            raise
        finally:
            end_of_session(self.trainer.loggers, failed)
            if (failed and self.trainer.global_step == 0) or is_trial(self.trainer):
                self._leave_unused()

    def _leave_unused(self) -> None:
        """Removes the directory of a run that wrote no result: it failed before its first step, or was a trial."""
        if this_rank() == 0 and not self.place.continues and self.run is not None:
            remove_if_unused(self.run)


def _shown(value: Any) -> str:
    return "not set" if value is None else str(value)


def _quieten_lightning() -> None:
    """Hides messages that Lightning prints at every start or that do not apply here. Real warnings stay."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    # A user who sets a profiler wants to read its report.
    logging.getLogger("lightning.pytorch.profilers").setLevel(logging.INFO)
    # Rows are read from shards by place; worker processes would cost more than they save.
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    # A resumed table keeps its rows: training/trackers/places.py.
    warnings.filterwarnings("ignore", message=".*Experiment logs directory .* exists and is not empty.*")
    # The means of a validation are averaged over all ranks before they are logged.
    warnings.filterwarnings("ignore", message=".*sync_dist=True.*")
    # Predicted rows carry their own positions.
    warnings.filterwarnings("ignore", message=".*Couldn't infer the batch indices.*")
    # SLURM is installed, and this run is not a job step: docs/cluster.md says how to start one.
    warnings.filterwarnings("ignore", message=".*`srun` command is available.*")
    # Lightning 2.6 calls torch >= 2.12 in a deprecated way.
    warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.*")


def run_verb(args: list[str]) -> DanubeCLI:
    """Runs one of the trainer's verbs, and returns the CLI object that ran it.

    Args:
        args: the verb and its options.

    Raises:
        ValueError: a user's mistake; the message is one line.
        Stopped: a signal ended the run.
    """
    _quieten_lightning()
    end_with_launcher()
    try:
        with SIGNALS.during(LEAVING_TRAINER):
            return DanubeCLI(with_config_paths(args))
    except Exception as error:
        let_rank_zero_speak(this_rank(), error)
        raise


def main(args: list[str]) -> int:
    """Runs one of the trainer's verbs, and returns the exit code."""
    run_verb(args)
    return 0
