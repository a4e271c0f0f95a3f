"""The only parser of configurations, for the verbs that train and for the other verbs."""

from __future__ import annotations

import contextlib
import pkgutil
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
    check_classes,
    complete_loggers,
    complete_mappings,
    continued_weights,
    facts_left_to_weights,
    in_one_line,
    place_of_run,
    read_command_line,
    texts_of,
    with_config_paths,
)
from lightning_danube.cli.named_files import check_files
from lightning_danube.cli.options import CLASS_KEYS, Reader, Refusal, Typed, options_of, plain_value
from lightning_danube.cli.trainer_options import check_limits
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
    _import_callbacks(stated)
    with one_line_errors(stated):
        for section in ("data", "model"):
            if section not in stated.tree:
                raise Refusal((), "give a configuration, for example --config quickstart")
        reader = Reader(taken=FACTS_OF_DATA, check=True, open_to=open_classes())
        reader.value(LightningDataModule, stated.tree["data"], ("data",))
        reader.value(LightningModule, stated.tree["model"], ("model",))
        reader.options(Trainer, stated.tree.get("trainer") or {}, ("trainer",))
        _check_seed(reader, stated.tree.get("seed_everything", 0))
    stated.texts = reader.texts
    complete_mappings(stated, reader.mappings)
    return stated


def _import_callbacks(stated: Stated) -> None:
    """Imports the callbacks of this project that are named without their module: readers find classes that exist."""
    from lightning_danube.cli.source import callback_of

    trainer = plain_value(stated.tree.get("trainer"))
    listed = plain_value(trainer.get("callbacks")) if isinstance(trainer, Mapping) else None
    for one in listed if isinstance(listed, list) else [listed]:
        named = plain_value(one)
        named = named.get("class_path") if isinstance(named, Mapping) else named
        if isinstance(named, str) and (class_path := callback_of(named)) is not None:
            pkgutil.resolve_name(class_path)


def _check_seed(reader: Reader, given: Any) -> None:
    seed = reader.value(bool | int, given, ("seed_everything",))
    if type(seed) is int and not 0 <= seed <= LARGEST_SEED:
        raise Refusal(("seed_everything",), f"is {seed}: give a number from 0 to {LARGEST_SEED}", goes_on=True)


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


ONLY_CURRICULUM = {
    "prepare": ", which reads its files when it runs: only CurriculumData has shards",
    "tokenizer": ": only the sources of CurriculumData are plain texts",
}
"""Verb that takes only the data of pre-training → why it refuses other data."""


def configured_data(verb: str, configs: Sequence[str], overrides: Sequence[str]) -> LightningDataModule:
    """Returns the configured data module. Ignores the model and the trainer.

    Missing files and wrong settings are refused before PyTorch and Lightning are imported.

    Args:
        verb: the verb that reads the data.

    Raises:
        ValueError: a configuration is wrong, the verb does not take its data, or a file is missing; the message is one
            line.
    """
    from lightning_danube.pretraining.settings import CurriculumSettings

    args = _arguments(configs, overrides)
    stated = read_command_line(args)
    if "data" not in stated.tree:
        raise ValueError(f"{' + '.join(stated.files)}: there is no section data")
    if _settings_class(stated.tree["data"]) not in (None, CurriculumSettings) and verb in ONLY_CURRICULUM:
        raise ValueError(f"data is {_class_name(stated.tree['data'])}{ONLY_CURRICULUM[verb]}")
    check_files(stated, verb)
    stated = read_command_line(with_facts_of_weights(args))
    with one_line_errors(stated):
        _settings_of({"data": resolved_tree(stated)["data"]}, Reader(taken=FACTS_OF_DATA, make=True), in_full=False)

    from lightning.pytorch import LightningDataModule

    with one_line_errors(stated):
        reader = Reader(make=True, open_to=open_classes())
        data: LightningDataModule = reader.value(LightningDataModule, resolved_tree(stated)["data"], ("data",))
    if not isinstance(data, CurriculumSettings) and verb in ONLY_CURRICULUM:
        raise ValueError(f"data is {type(data).__name__}{ONLY_CURRICULUM[verb]}")
    return data


def planned_run(configs: Sequence[str], overrides: Sequence[str]) -> PlannedRun:
    """Returns the pre-training run that configurations and overrides describe.

    Raises:
        ValueError: a configuration is wrong or not for pre-training; the message is one line.
    """
    from lightning_danube.planning.run import TrainerSection

    stated = read_command_line(with_facts_of_weights(_arguments(configs, overrides)))
    # Checked before anything is read, because other tasks would download weights first.
    model, data = (_class_name(stated.tree.get(section)) for section in ("model", "data"))
    if (model, data) != ("Pretraining", "CurriculumData"):
        raise ValueError(f"only pre-training can be planned (Pretraining on CurriculumData), not {model} on {data}")
    with one_line_errors(stated):
        tree = resolved_tree(stated)
        reader = Reader(taken=FACTS_OF_DATA, make=True, open_to=open_classes())
        known = [field.name for field in fields(TrainerSection)]
        trainer = {key: value for key, value in (tree.get("trainer") or {}).items() if key in known}
        return PlannedRun(
            str(tree.get("name") or "run"),
            *_settings_of(tree, reader, in_full=True),
            TrainerSection(**reader.options(TrainerSection, trainer, ("trainer",), "Trainer")),
        )


SETTINGS = {
    "ChatData": "chat.settings.ChatSettings",
    "ClassificationData": "classification.settings.ClassificationSettings",
    "CurriculumData": "pretraining.settings.CurriculumSettings",
    "Evaluation": "evaluation.settings.EvaluationSettings",
    "EvaluationData": "evaluation.settings.QuestionSettings",
    "PreferenceData": "chat.settings.PreferenceSettings",
    "PreferenceTuning": "chat.settings.PreferenceTuningSettings",
    "Pretraining": "pretraining.settings.PretrainingSettings",
    "QuantizationEvaluation": "quantization.settings.QuantizationSettings",
    "SupervisedFineTuning": "training.optim.tuning.TuningSettings",
    "TextClassification": "classification.settings.ClassifierSettings",
    "TextWindows": "quantization.settings.WindowSettings",
}
"""Class of this package that a section names → the class that checks its settings and imports nothing large."""


def check_settings(stated: Stated, verb: str) -> None:
    """Checks the settings of a run before PyTorch and Lightning are imported.

    The settings of a user's own classes are checked later. So are those of a pre-training run that begins with trained
    weights, because the weights decide some of them. The tokenizer is not loaded, because it may have to be fetched.

    Args:
        verb: the verb of the trainer that runs.

    Raises:
        ValueError: the settings are refused; the message is one line.
    """
    with one_line_errors(stated):
        tree = resolved_tree(stated)
        reader = Reader(taken=FACTS_OF_DATA, make=True)
        _check_seed(reader, tree.get("seed_everything", 0))  # first: other values may refer to it
        if any("${" in text for _, text in texts_of(stated.tree)):
            check_classes(stated, tree)
        if isinstance(trainer := tree.get("trainer"), Mapping):
            check_limits(verb, trainer)
        if continued_weights(stated) is None:
            _, model = _settings_of(tree, reader, in_full=False)
            # The shape of the decoder is checked where it meets the vocabulary and the context of the data.
            getattr(model, "config", None)


def _settings_of(tree: Mapping[str, Any], reader: Reader, *, in_full: bool) -> tuple[Any, Any]:
    """Returns the settings of the data and of the model of a configuration. Neither data nor weights are created.

    Args:
        tree: the configuration, with the values of its references.
        in_full: whether the tokenizer and the optimizer are loaded. Otherwise the smallest tokenizer and an optimizer
            with default settings take their places. No check depends on them.

    Returns:
        None in place of the settings of a class of another package, and in place of the settings of a model that needs
        facts of such data.
    """
    from lightning_danube.tokens.tokenizer import DANUBE_SMALL

    data = model = None
    if (owner := _settings_class(tree.get("data"))) is not None:
        options = reader.class_options(owner, tree["data"], ("data",), _class_name(tree["data"]))
        if not in_full and owner.__name__ == "CurriculumSettings":  # the only settings that load their tokenizer
            options |= {"tokenizer": DANUBE_SMALL, "new_tokens": None}
        data = owner(**options)
    if (owner := _settings_class(tree.get("model"))) is not None:
        facts = [fact for fact in LINKED if fact in options_of(owner)[0]]
        if all(hasattr(data, fact) for fact in facts):
            given = _options(tree["model"])
            if not in_full:
                _check_optimizer(owner, given.pop("optimizer", None))
            options = reader.class_options(owner, given, ("model",), _class_name(tree["model"]))
            model = owner(**options, **{fact: getattr(data, fact) for fact in facts})
    return data, model


def _settings_class(section: Any) -> Any:
    """Returns the class of the settings of a section, None if the section names no class of this package."""
    named = section.get("class_path") if isinstance(section, Mapping) else None
    if not isinstance(named, str) or ("." in named and not named.startswith("lightning_danube.")):
        return None
    place = SETTINGS.get(_class_name(section))
    return None if place is None else pkgutil.resolve_name(f"lightning_danube.{place}")


def _check_optimizer(owner: type, optimizer: Any) -> None:
    """Refuses Muon for a task that fine-tunes. Other optimizers are checked later: Muon's module imports PyTorch."""
    from lightning_danube.training.optim.tuning import TuningSettings, not_for_tuning

    if issubclass(owner, TuningSettings) and _class_name(plain_value(optimizer)) == "Muon":
        raise not_for_tuning("Muon")


def _options(section: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options of the class that a section names, those inside and outside of `init_args` together."""
    outer = {key: value for key, value in section.items() if key not in CLASS_KEYS}
    return {**(plain_value(section.get("init_args")) or {}), **outer}


def place_of_runs(configs: Sequence[str], overrides: Sequence[str]) -> Path:
    """Returns `<runs>/<name>` of a configuration. Reads nothing else of it.

    Raises:
        ValueError: the configuration is missing or no YAML, or the name is a path.
    """
    return place_of_run(resolved_tree(read_command_line(_arguments(configs, overrides))))


def _class_name(section: Any) -> str:
    named = section.get("class_path") if isinstance(section, Mapping) else section
    return str(named).rpartition(".")[2]


def _arguments(configs: Sequence[str], overrides: Sequence[str]) -> list[str]:
    """Returns the command line of a trainer's verb with these configurations, without the verb."""
    return with_config_paths([*(flag for config in configs for flag in ("--config", config)), *overrides])


def with_facts_of_weights(args: Sequence[str]) -> list[str]:
    """Adds options of the data that trained weights decide, if a pre-training run begins with such weights.

    The data's tokenizer is then the model's, and their context the model's, unless the command line states them.

    Raises:
        ValueError: there are no such weights.
    """
    stated = read_command_line(args)
    weights, open_facts = continued_weights(stated), facts_left_to_weights(stated)
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


def runnable_config(args: Sequence[str], verb: str) -> dict[str, Any]:
    """Returns the configuration that `resolved_config` returns, after a look at the files that it names.

    Args:
        args: the arguments without the verb.
        verb: a verb of the trainer.

    Raises:
        ValueError: the configuration is refused, or a file is missing; the message is one line.
    """
    check_files(read_command_line(with_config_paths(args)), verb)
    return resolved_config(args)


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
