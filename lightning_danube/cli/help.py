"""Help of the trainer's verbs: first the options of the configured data and model, last the trainer's options."""

from __future__ import annotations

import dataclasses
import re
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lightning_danube.cli.command_line import (
    LINKED,
    Stated,
    config_files,
    read_command_line,
    with_config_paths,
)
from lightning_danube.cli.options import CLASS_KEYS, Path, class_of, is_configured_class, options_of
from lightning_danube.cli.trainer_options import TRAINER_OPTIONS
from lightning_danube.terminal import as_typed
from lightning_danube.yaml_files import description

WIDTH = 120
COLUMN = 46
"""Column at which the explanations begin."""

RUN_OPTIONS = {
    "--config NAME": "a configuration: the name of one that comes with the package, or a file; may be repeated",
    "--name TEXT": "of the run, which goes to <runs>/<name>/version_<n> ({name})",
    "--runs PATH": "directory of all runs ({runs})",
    "--seed_everything INT": "seed of the weights and of all that is random ({seed_everything})",
    "--ckpt_path last|FILE": "last resumes the newest version of this run; a file begins a new version from it; "
    "last-or-new begins if there is no checkpoint yet, for jobs that are started again",
    "--print_config": "print the whole configuration that would run, and stop",
    "--debug": "show the traceback of an error",
}


def help_of(verb: str, args: Sequence[str]) -> str:
    """Returns the help text of a verb.

    Args:
        args: arguments of the verb, without the verb.

    Raises:
        ValueError: a configuration is missing or wrong.
    """
    args = [arg for arg in args if arg not in ("-h", "--help")]
    if not config_files(args):
        return _general_help(verb)
    from lightning_danube.cli.configs import resolved_tree

    stated = read_command_line(with_config_paths(args))
    tree = resolved_tree(stated)
    parts = [f"usage: {as_typed()} {verb} {' '.join(args)} [--key value …]"]
    parts += [text for text in map(description, stated.files) if text]
    parts += ["\n".join(lines) for lines in (_section(stated, tree, "data"), _section(stated, tree, "model")) if lines]
    parts += [_callbacks(tree), _run_options(tree), _trainer(tree)]
    return "\n\n".join(filter(None, parts))


def _general_help(verb: str) -> str:
    command = f"{as_typed()} {verb}"
    lines = [
        f"usage: {command} --config NAME [--key value …]",
        "",
        f"The options of the data and the model depend on the configuration: {command} --config quickstart --help",
        f"All configurations that come with the package: {as_typed()} configs",
    ]
    return "\n\n".join(["\n".join(lines), _run_options({}), _trainer({})])


def _run_options(tree: Mapping[str, Any]) -> str:
    values = {"name": "run", "runs": "runs", "seed_everything": 0, **tree}
    return "\n".join(["run", *(_line(flag, text.format(**values)) for flag, text in RUN_OPTIONS.items())])


def _trainer(tree: Mapping[str, Any]) -> str:
    trainer = tree.get("trainer") or {}
    title = (
        "trainer, Lightning's options, as --trainer.<option> (https://lightning.ai/docs/pytorch/stable/common/trainer)"
    )
    stated = [f"{key} {_shown(value)}" for key, value in trainer.items() if key != "callbacks"]
    others = [option for option in TRAINER_OPTIONS if option not in trainer]
    lines = [title, *([f"  set here: {', '.join(stated)}"] if stated else [])]
    lines += textwrap.wrap(", ".join(others), WIDTH, initial_indent="  ", subsequent_indent="  ")
    return "\n".join(lines)


def _callbacks(tree: Mapping[str, Any]) -> str:
    callbacks = (tree.get("trainer") or {}).get("callbacks") or []
    lines = ["callbacks, in trainer.callbacks (a list in a configuration; --trainer.callbacks+=NAME adds one)"]
    for one in callbacks if isinstance(callbacks, list) else [callbacks]:
        given = one if isinstance(one, Mapping) else {"class_path": one}
        owner = _class_named(given.get("class_path"), object)
        options = options_of(owner)[0] if owner is not None else {}
        values = {name: option.default for name, option in options.items()} | dict(given.get("init_args") or {})
        what = ", ".join(f"{name} {_shown(value)}" for name, value in values.items())
        lines.append(_line(str(given.get("class_path")).rpartition(".")[2], what or "no options", column=28))
    return "\n".join(lines) if len(lines) > 1 else ""


def _section(stated: Stated, tree: Mapping[str, Any], name: str) -> list[str]:
    """Returns lines with the options of the class that a section names."""
    import lightning.pytorch as pl

    section = tree.get(name)
    if section is None:
        return []
    given = section if isinstance(section, Mapping) else {"class_path": section}
    owner = _class_named(given.get("class_path"), {"data": pl.LightningDataModule, "model": pl.LightningModule}[name])
    if owner is None:
        return []
    title = textwrap.wrap(f"{name}: {owner.__name__}. {_summary(owner)}", WIDTH, subsequent_indent="  ")
    return [*title, *_options(owner, _arguments(given), (name,))]


def _arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    outer = {key: value for key, value in given.items() if key not in CLASS_KEYS}
    return {**(given.get("init_args") or {}), **outer}


def _class_named(named: Any, base: type) -> Any:
    return class_of(named, base, (), ()) if isinstance(named, str) else None


def _options(owner: Any, given: Mapping[str, Any], path: Path) -> Iterator[str]:
    explained = _explanations(owner)
    for option in options_of(owner)[0].values():
        if path[0] == "model" and option.name in LINKED:
            continue
        value = given.get(option.name, option.default)
        here = (*path, option.name)
        inner = _inner_class(option.hint, value)
        shown = "required" if option.required and option.name not in given else _shown(value)
        if inner is None:
            flag = f"--{'.'.join(here)} {shown_type(option.hint)}"
            yield _line(flag, " ".join(filter(None, [explained.get(option.name, ""), f"({shown})"])))
        else:
            yield _line(f"--{'.'.join(here)} {inner.__name__}", explained.get(option.name, ""))
            if isinstance(value, Mapping):
                yield from _options(inner, _arguments(value), here)
            elif dataclasses.is_dataclass(value):
                yield from _options(inner, vars(value), here)


def _inner_class(hint: Any, value: Any) -> Any:
    """Returns the class whose options a value gives, None for all other values."""
    members = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    classes = [member for member in members if is_configured_class(member)]
    if not classes or isinstance(value, str) or value is None:
        return None
    if isinstance(value, Mapping) and "class_path" in value:
        return _class_named(value["class_path"], classes[0])
    return type(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else classes[0]


def shown_type(hint: Any) -> str:
    """Returns the name of a type for readers of the help."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return "|".join(shown_type(one) for one in inner if one is not type(None))
    if origin is typing.Literal:
        return "|".join(map(str, inner))
    if origin is not None:
        return getattr(origin, "__name__", str(origin)).upper()
    return {str: "TEXT", int: "INT", float: "NUMBER", bool: "true|false", Any: "VALUE"}.get(
        hint, getattr(hint, "__name__", str(hint))
    )


def _explanations(owner: Any) -> dict[str, str]:
    """Returns option → its first sentence in the docstring of the class, or of a base class."""
    import docstring_parser

    found: dict[str, str] = {}
    for one in reversed(owner.__mro__):
        for parameter in docstring_parser.parse(one.__doc__ or "").params:
            for name in parameter.arg_name.split(","):
                found[name.strip()] = _first_sentence(parameter.description or "")
    return found


def _summary(owner: Any) -> str:
    return _first_sentence((owner.__doc__ or "").strip().partition("\n\n")[0])


def _first_sentence(text: str) -> str:
    return re.split(r"(?<=[a-z0-9)\"`])[.:;](?:\s|$)", " ".join(text.split()), maxsplit=1)[0]


def _shown(value: Any) -> str:
    """Returns a value in a few words; for mappings and lists of mappings, the names."""
    if isinstance(value, Mapping) and "class_path" in value:
        return str(value["class_path"]).rpartition(".")[2]
    if isinstance(value, list) and value and all(isinstance(one, Mapping) for one in value):
        return ", ".join(str(next(iter(one.values()), "")) for one in value)
    if isinstance(value, Mapping):
        nested = any(isinstance(one, Mapping) for one in value.values())
        return ", ".join(map(str, value) if nested else (f"{key} {one}" for key, one in value.items()))
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    return str(value)


def _line(flag: str, text: str, column: int = COLUMN) -> str:
    """Returns a flag with its explanation in a column beside it, or below it if the flag is too long."""
    rows = textwrap.wrap(text, WIDTH - column, break_on_hyphens=False) or [""]
    first = f"  {flag}"
    lines = [first.ljust(column) + rows.pop(0)] if len(first) < column - 1 else [first]
    return "\n".join(line.rstrip() for line in [*lines, *(" " * column + row for row in rows)])
