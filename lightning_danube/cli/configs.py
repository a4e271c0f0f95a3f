"""The parts of a configuration, for commands that do not train: read, checked and overridden as `fit` does it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightning_danube.yaml_files import config_file

if TYPE_CHECKING:
    from lightning.pytorch import LightningDataModule

    from lightning_danube.pretraining.data import CurriculumData
    from lightning_danube.pretraining.task import Pretraining

LINKED = ("vocab_size", "context_length", "batch_tokens", "total_tokens")
"""Attributes of a data module that reach the task of that parameter name."""


@dataclass(frozen=True)
class PretrainingRun:
    """A pre-training run as its configuration describes it.

    Args:
        name: of the run.
        data: the data module, nothing of it read.
        task: on the meta device, where weights weigh nothing.
        trainer: what the configuration says of the trainer, which is not made: the devices may be elsewhere.
    """

    name: str
    data: CurriculumData
    task: Pretraining
    trainer: Any


def configured_data(configs: Sequence[str], overrides: Sequence[str]) -> LightningDataModule:
    """The data module alone; the model and the trainer are not looked at.

    Raises:
        ValueError: a configuration is wrong, in one line.
    """
    from lightning.pytorch import LightningDataModule

    configs = [config_file(config) for config in configs]
    parser = _parser(configs, others=("model", "trainer"))
    parser.add_subclass_arguments(LightningDataModule, "data", required=True)
    data: LightningDataModule = _instantiate(parser, _parse(parser, configs, _known(overrides)), configs).data
    return data


def configured_pretraining(configs: Sequence[str], overrides: Sequence[str]) -> PretrainingRun:
    """
    Raises:
        ValueError: a configuration is wrong, in one line, or it is none of pre-training.
    """
    import torch
    from lightning.pytorch import LightningDataModule, LightningModule, Trainer

    configs = [config_file(config) for config in configs]
    parser = _parser(configs)
    parser.add_subclass_arguments(LightningDataModule, "data", required=True)
    parser.add_subclass_arguments(LightningModule, "model", required=True)
    parser.add_class_arguments(Trainer, "trainer", fail_untyped=False, instantiate=False)
    for fact in LINKED:
        parser.link_arguments(f"data.{fact}", f"model.init_args.{fact}", apply_on="instantiate")
    parsed = _parse(parser, configs, overrides)
    # Before anything is made: other tasks would fetch weights first.
    task, data = (parsed[key].class_path.rpartition(".")[2] for key in ("model", "data"))
    if (task, data) != ("Pretraining", "CurriculumData"):
        raise ValueError(f"only pre-training can be planned (Pretraining on CurriculumData), not {task} on {data}")
    with torch.device("meta"):
        run = _instantiate(parser, parsed, configs)
    return PretrainingRun(run.get("name") or "run", run.data, run.model, run.trainer)


def _parser(configs: Sequence[str], others: Sequence[str] = ()) -> Any:
    from jsonargparse import ArgumentParser, set_parsing_settings

    from lightning_danube.cli.errors import TOP_LEVEL
    from lightning_danube.training.optim import AdamW
    from lightning_danube.yaml_files import read_config

    for config in configs:
        read_config(config)
    # A section that is not looked at is not made, either: a model of billions of weights may stand there.
    set_parsing_settings(
        omegaconf_absolute_to_relative_paths=True, instantiate_subclass_spec_in_any=False, subclasses_enabled=[AdamW]
    )
    parser = ArgumentParser(exit_on_error=False, allow_abbrev=False, parser_mode="omegaconf+")
    parser.add_argument("--config", action="config")
    for name in {*TOP_LEVEL, *others} - {"config", *({"data", "model", "trainer"} - {*others})}:
        parser.add_argument(f"--{name}", type=Any)
    return parser


def _parse(parser: Any, configs: Sequence[str], overrides: Sequence[str]) -> Any:
    from lightning_danube.cli.errors import parse

    flags = [flag for config in configs for flag in ("--config", config)]
    return parse(parser, [*flags, *overrides], configs, {})


def _instantiate(parser: Any, parsed: Any, configs: Sequence[str]) -> Any:
    from lightning_danube.cli.errors import explain

    try:
        return parser.instantiate(parsed)
    except ValueError as error:
        # What a class says of its arguments arrives wrapped in the types that were tried.
        if str(error).startswith("Does not validate"):
            raise ValueError(explain(str(error), configs, {})) from error
        raise


def _known(overrides: Sequence[str]) -> list[str]:
    """Overrides without those of the model and the trainer, whose keys are not known here."""
    kept: list[str] = []
    skipping = False
    for argument in overrides:
        if argument.startswith("--"):
            skipping = re.match(r"--(model|trainer)[.=\s]", argument + " ") is not None
        if not skipping:
            kept.append(argument)
    return kept
