"""The only parser of configurations, for the verbs that train and for the other verbs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from lightning_danube.cli.command_line import (
    FACTS_OF_DATA,
    LINKED,
    Stated,
    complete_loggers,
    complete_mappings,
    continued_weights,
    in_one_line,
    read_command_line,
    with_config_paths,
)
from lightning_danube.cli.options import CLASS_KEYS, Reader, Refusal, Typed, plain_value
from lightning_danube.outside.names import inside
from lightning_danube.yaml_files import load_yaml, with_text_keys

if TYPE_CHECKING:
    from lightning.pytorch import LightningDataModule

    from lightning_danube.planning.run import TrainerSection
    from lightning_danube.pretraining.settings import CurriculumSettings, PretrainingSettings

PARSER_OPTIONS: dict[str, Any] = {"exit_on_error": False, "allow_abbrev": False, "parser_mode": "omegaconf+"}


LARGEST_SEED = 2**32 - 1
"""The largest that NumPy takes."""


@dataclass(frozen=True)
class PlannedRun:
    """A pre-training run as its configuration describes it. Neither data nor weights are created.

    Args:
        trainer: the configuration's section of the trainer. This machine need not have its devices.
    """

    name: str
    data: CurriculumSettings
    model: PretrainingSettings
    trainer: TrainerSection


def read_configuration(args: Sequence[str]) -> Stated:
    """Reads a command line, and checks every value against the class that takes it.

    Args:
        args: the arguments without the verb.

    Raises:
        ValueError: a value is refused; the message is one line.
    """
    from lightning.pytorch import LightningDataModule, LightningModule, Trainer

    stated = read_command_line(args)
    complete_loggers(stated)
    with one_line_errors(stated):
        for section in ("data", "model"):
            if section not in stated.tree:
                raise Refusal((), "give a configuration, for example --config quickstart")
        reader = Reader(taken=FACTS_OF_DATA, check=True, open_to=open_classes())
        reader.value(LightningDataModule, stated.tree["data"], ("data",))
        reader.value(LightningModule, stated.tree["model"], ("model",))
        reader.options(Trainer, stated.tree.get("trainer") or {}, ("trainer",))
        seed = reader.value(bool | int, stated.tree.get("seed_everything", 0), ("seed_everything",))
        if type(seed) is int and not 0 <= seed <= LARGEST_SEED:
            raise Refusal(("seed_everything",), f"is {seed}: give a number from 0 to {LARGEST_SEED}", goes_on=True)
    stated.texts = reader.texts
    complete_mappings(stated, reader.mappings)
    return stated


@contextlib.contextmanager
def one_line_errors(stated: Stated) -> Iterator[None]:
    """Names, in a ValueError that is raised inside the block, the place that states the value."""
    from lightning_danube.cli.errors import located

    try:
        yield
    except Refusal as refusal:
        raise ValueError(in_one_line(refusal, stated)) from refusal
    except ValueError as error:
        if (message := located(str(error), stated)) == str(error):
            raise
        raise ValueError(message) from error


def open_classes() -> list[type]:
    """Returns the dataclasses of which a configuration may name a subclass, also a user's own."""
    from lightning_danube.training.optim import AdamW

    return [AdamW]


def add_run_options(parser: Any) -> None:
    """Adds the options of every run, and the links from the data to the model."""
    parser.add_argument("--name", type=str, default="run", help="Name of the run: <runs>/<name>/version_<n>.")
    parser.add_argument("--runs", type=str, default="runs", help="Directory of all runs.")
    for fact in LINKED:
        parser.link_arguments(f"data.{fact}", f"model.init_args.{fact}", apply_on="instantiate")


def set_parsing_rules() -> None:
    """Sets options of jsonargparse that hold for every parser here."""
    from jsonargparse import set_parsing_settings

    # Interpolation under subcommands: ${seed_everything} then means the subcommand's own key.
    set_parsing_settings(omegaconf_absolute_to_relative_paths=True, subclasses_enabled=[*open_classes()])
    _set_loader()


@cache
def _set_loader() -> None:
    """Makes jsonargparse read keys as `yaml_files` does."""
    from jsonargparse import ArgumentParser, get_loader, set_loader

    mode = PARSER_OPTIONS["parser_mode"]
    first = ArgumentParser(parser_mode=mode)
    first.add_argument("--key")
    first.parse_string("key: value")  # jsonargparse makes its loader when it reads the first text
    load = get_loader(mode)

    def load_with_text_keys(text: str) -> Any:
        try:
            return load(with_text_keys(text))
        except (ValueError, KeyError, AttributeError, TypeError, OverflowError, RecursionError) as error:
            raise yaml.YAMLError(str(error)) from error  # as `yaml_files` has it: not all texts raise the library's own

    set_loader(mode, load_with_text_keys, (yaml.YAMLError,))


def configured_data(configs: Sequence[str], overrides: Sequence[str]) -> LightningDataModule:
    """Returns the configured data module. Ignores the model and the trainer.

    Raises:
        ValueError: a configuration is wrong; the message is one line.
    """
    from lightning.pytorch import LightningDataModule

    stated = _stated(configs, overrides)
    if "data" not in stated.tree:
        raise ValueError(f"{' + '.join(stated.files)}: there is no section data")
    with one_line_errors(stated):
        reader = Reader(make=True, open_to=open_classes())
        data: LightningDataModule = reader.value(LightningDataModule, resolved_tree(stated)["data"], ("data",))
    return data


def planned_run(configs: Sequence[str], overrides: Sequence[str]) -> PlannedRun:
    """Returns the pre-training run that configurations and overrides describe.

    Raises:
        ValueError: a configuration is wrong or not for pre-training; the message is one line.
    """
    from lightning_danube.planning.run import TrainerSection
    from lightning_danube.pretraining.settings import CurriculumSettings, PretrainingSettings

    stated = _stated(configs, overrides)
    # Checked before anything is read, because other tasks would download weights first.
    model, data = (_class_name(stated.tree.get(section)) for section in ("model", "data"))
    if (model, data) != ("Pretraining", "CurriculumData"):
        raise ValueError(f"only pre-training can be planned (Pretraining on CurriculumData), not {model} on {data}")
    with one_line_errors(stated):
        tree = resolved_tree(stated)
        reader = Reader(taken=FACTS_OF_DATA, make=True, open_to=open_classes())
        known = [field.name for field in fields(TrainerSection)]
        trainer = {key: value for key, value in (tree.get("trainer") or {}).items() if key in known}
        settings = CurriculumSettings(**reader.class_options(CurriculumSettings, tree["data"], ("data",), data))
        facts = {fact: getattr(settings, fact) for fact in LINKED}
        options = reader.class_options(PretrainingSettings, tree["model"], ("model",), model)
        return PlannedRun(
            str(tree.get("name") or "run"),
            settings,
            PretrainingSettings(**options, **facts),
            TrainerSection(**reader.options(TrainerSection, trainer, ("trainer",), "Trainer")),
        )


def check_settings(args: Sequence[str]) -> None:
    """Checks the settings of a pre-training run from random weights, before PyTorch and Lightning are imported.

    The settings of other tasks are checked later, with their classes. The tokenizer is not loaded, because it may have
    to be fetched. No check depends on it, so the small tokenizer takes its place. The optimizer is left out, because
    some optimizers import PyTorch.

    Args:
        args: the arguments without the verb.

    Raises:
        ValueError: the settings are refused; the message is one line.
    """
    stated = read_command_line(with_config_paths(args))
    if not _is_pretraining(stated) or continued_weights(stated) is not None:
        return
    from lightning_danube.pretraining.settings import CurriculumSettings, PretrainingSettings
    from lightning_danube.tokens.tokenizer import DANUBE_SMALL

    with one_line_errors(stated):
        tree = resolved_tree(stated)
        reader = Reader(taken=FACTS_OF_DATA, make=True)
        if "seed_everything" in tree:  # before what refers to it
            reader.value(bool | int, tree["seed_everything"], ("seed_everything",))
        data = reader.class_options(CurriculumSettings, _options(tree["data"]), ("data",), "CurriculumData")
        settings = CurriculumSettings(**{**data, "tokenizer": DANUBE_SMALL, "new_tokens": None})
        model = {key: value for key, value in _options(tree["model"]).items() if key != "optimizer"}
        facts = {fact: getattr(settings, fact) for fact in LINKED}
        options = reader.class_options(PretrainingSettings, model, ("model",), "Pretraining")
        assert PretrainingSettings(**options, **facts).config


def _is_pretraining(stated: Stated) -> bool:
    return all(
        isinstance(section := stated.tree.get(name), Mapping) and _class_name(section) == class_name
        for name, class_name in (("model", "Pretraining"), ("data", "CurriculumData"))
    )


def _options(section: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options of the class that a section names, those inside and outside of `init_args` together."""
    outer = {key: value for key, value in section.items() if key not in CLASS_KEYS}
    return {**(plain_value(section.get("init_args")) or {}), **outer}


def place_of_runs(configs: Sequence[str], overrides: Sequence[str]) -> Path:
    """Returns `<runs>/<name>` of a configuration. Reads nothing else of it.

    Raises:
        ValueError: the configuration is missing or no YAML, or the name is a path.
    """
    args = [flag for config in configs for flag in ("--config", config)]
    tree = resolved_tree(read_command_line(with_config_paths([*args, *overrides])))
    return inside(Path(str(tree.get("runs") or "runs")), tree.get("name") or "run", "--name")


def _class_name(section: Any) -> str:
    named = section.get("class_path") if isinstance(section, Mapping) else section
    return str(named).rpartition(".")[2]


def _stated(configs: Sequence[str], overrides: Sequence[str]) -> Stated:
    args = [flag for config in configs for flag in ("--config", config)]
    return read_command_line(with_facts_of_weights(with_config_paths([*args, *overrides])))


def with_facts_of_weights(args: Sequence[str]) -> list[str]:
    """Adds options of the data that trained weights decide, if a pre-training run begins with such weights.

    The data's tokenizer is then the model's, and their context the model's, unless the command line states them.

    Raises:
        ValueError: there are no such weights.
    """
    stated = read_command_line(args)
    weights = continued_weights(stated)
    open_facts = [fact for fact in ("tokenizer", "context_length") if ("data", fact) not in stated.places]
    if weights is None or not open_facts:
        return list(args)
    from lightning_danube.weights.shapes import shape_of

    # Also where only the tokenizer is open: a wrong name is then refused as that of weights, not of a tokenizer.
    facts = {"tokenizer": weights, "context_length": str(shape_of(weights).max_position_embeddings)}
    return [*args, *(f"--data.init_args.{fact}={facts[fact]}" for fact in open_facts)]


def resolved_tree(stated: Stated) -> dict[str, Any]:
    """Returns the tree of values, in which each reference such as `${seed_everything}` is replaced by its value."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from lightning_danube.cli.errors import unresolved

    try:
        resolved = OmegaConf.to_container(OmegaConf.create(_untyped(stated.tree)), resolve=True)
    except OmegaConfBaseException as error:
        raise ValueError(unresolved(stated) or str(error).splitlines()[0]) from error
    tree: dict[str, Any] = _typed_again(resolved, stated.tree)
    return tree


def _untyped(value: Any) -> Any:
    """Returns a tree of values with plain texts instead of `Typed` texts, as OmegaConf requires."""
    if isinstance(value, Mapping):
        return {key: _untyped(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_untyped(one) for one in value]
    return str(value) if isinstance(value, Typed) else value


def _typed_again(resolved: Any, before: Any) -> Any:
    if isinstance(before, Mapping) and isinstance(resolved, Mapping):
        return {key: _typed_again(one, before.get(key)) for key, one in resolved.items()}
    if isinstance(before, list) and isinstance(resolved, list):
        return [_typed_again(*pair) for pair in zip(resolved, before, strict=True)]
    return Typed(resolved) if isinstance(before, Typed) and isinstance(resolved, str) else resolved


def resolved_config(args: Sequence[str]) -> dict[str, Any]:
    """Returns the whole configuration that a command line of a trainer's verb would run, including defaults.

    Args:
        args: the arguments without the verb.

    Raises:
        ValueError: the configuration is refused; the message is one line.
    """
    from lightning.pytorch import LightningDataModule, LightningModule, Trainer
    from lightning.pytorch.cli import LightningArgumentParser

    from lightning_danube.cli.errors import parse

    args = with_facts_of_weights(with_config_paths(args))
    stated = read_configuration(args)
    set_parsing_rules()
    parser = LightningArgumentParser(**PARSER_OPTIONS)
    parser.add_argument("--config", action="config")
    parser.add_argument("--seed_everything", type=bool | int, default=0)
    parser.add_argument("--ckpt_path", type=str | None, default=None)
    parser.add_lightning_class_args(Trainer, "trainer")
    parser.add_lightning_class_args(LightningModule, "model", subclass_mode=True)
    parser.add_lightning_class_args(LightningDataModule, "data", subclass_mode=True)
    add_run_options(parser)
    config: dict[str, Any] = load_yaml(parser.dump(parse(parser, list(args), stated), skip_validation=True))
    return config
