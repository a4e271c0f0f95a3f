"""Reads a command line and its configurations as one tree of values, and records where each value is stated.

This module reads only files and flags. Importing PyTorch and Lightning takes seconds, and most typing errors can be
found without them: `check_command_line` reports such errors at once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path as FilePath
from typing import Any

import yaml

from lightning_danube.cli.options import BEFORE, CLASS_KEYS, Path, Refusal, Typed, no_option, plain_value
from lightning_danube.cli.trainer_options import check_trainer_options
from lightning_danube.outside.modules import let_in
from lightning_danube.outside.names import inside, plain_name
from lightning_danube.outside.secrets import key_of, redacted, secret_in
from lightning_danube.terminal import nearest_name
from lightning_danube.text.reading import format_of
from lightning_danube.yaml_files import RefusedYaml, config_file, lines_of_keys, load_yaml, read_config, with_text_keys

TOP_LEVEL = ("name", "runs", "seed_everything", "trainer", "model", "data", "ckpt_path", "config")
"""Keys of a configuration."""

LINKED = {
    "vocab_size": "data.tokenizer",
    "context_length": "data.context_length",
    "batch_tokens": "data.batch_tokens",
    "total_tokens": "data.stages",
    "tokenizer": "data.tokenizer",
}
"""Attribute of a data module that is linked to the task's parameter of that name → the data's key that states it."""

FACTS_OF_DATA = {**LINKED, "max_position_embeddings": LINKED["context_length"]}
"""Option of a model that is a fact of the data → the data's key that states it. It may be stated only there."""

LOCAL_LOGGERS = ("CSVLogger", "TensorBoardLogger")
"""Loggers of Lightning that need a `save_dir`."""

# Options of single verbs, and of the parser itself.
_OTHER_FLAGS = ("verbose", "return_predictions", "print_config", "help", "print_shtab")


class Added(Typed):
    """A value that is added to a list, by `--key+`."""


@dataclass
class Stated:
    """What a command line and its configurations state.

    Args:
        files: the configuration files; later files override earlier ones.
        tree: all values as one mapping. Values of flags are `Typed`.
        places: key path without `init_args` → the last file and line, or flag, that states it.
        added: arguments that follow from the others, for the parser.
        texts: key path without `init_args` → the text, or null, that its option takes.
    """

    files: list[str]
    tree: dict[str, Any] = field(default_factory=dict)
    places: dict[Path, str] = field(default_factory=dict)
    added: list[str] = field(default_factory=list)
    texts: dict[Path, str | None] = field(default_factory=dict)

    def place_of(self, path: Path) -> str:
        """Returns "file, line n" or "--flag" for the innermost key of a path that is stated, "" if no key is."""
        while path and path not in self.places:
            path = path[:-1]
        return self.places.get(path, "")

    def place_and_key(self, path: Path) -> str:
        """Returns "file, line n: key" or "--flag" for a key, the key alone if no place is known."""
        place, key = self.place_of(path), ".".join(path)
        return place if place.startswith("--") else f"{place}: {key}" if place else key


def read_command_line(args: Sequence[str]) -> Stated:
    """Reads what a command line and its configurations state.

    Args:
        args: arguments of a verb that takes a configuration, without the verb.

    Raises:
        ValueError: a configuration is missing or no YAML mapping, or a key appears twice in a mapping.
    """
    stated = Stated(config_files(args))
    for file in stated.files:
        stated.tree = merged(stated.tree, read_config(file))
        stated.places |= {without_init_args(path): f"{file}, line {n}" for path, n in lines_of_keys(file).items()}
    for flag, keys, value in flags(args):
        try:
            with_text_keys(value)
        except RefusedYaml as error:
            raise ValueError(f"{flag}, {error}") from error
        _check_list_items(flag, keys, value, stated.tree)
        _check_above(flag, keys, value, stated)
        tree: Any = [Added(value)] if flag.endswith("+") else Typed(value)
        for key in reversed(_with_init_args(keys, stated.tree)):
            tree = {key: tree}
        stated.tree = merged(stated.tree, tree)
        path = without_init_args(keys)
        if not flag.endswith("+"):
            # Each value takes the place of all that files state below it. A mapping is merged with what files state.
            for leaf in _leaves(plain_value(Typed(value)), path):
                stated.places = {at: place for at, place in stated.places.items() if at[: len(leaf)] != leaf}
        stated.places[path] = flag
        for length in range(1, len(path)):
            stated.places.setdefault(path[:length], flag)
    return stated


def _leaves(value: Any, path: Path) -> Iterator[Path]:
    """Yields the paths, without `init_args`, of the values in a mapping that are not mappings."""
    if not isinstance(value, Mapping) or not value:
        yield path
        return
    for key, inner in value.items():
        yield from _leaves(inner, path if key == "init_args" else (*path, str(key)))


def complete_loggers(stated: Stated) -> None:
    """Gives loggers of local files that have no `save_dir` the directory of all runs.

    Lightning requires one. With this one, their files go into the run's own directory (training/trackers/places.py).
    """
    trainer = stated.tree.get("trainer")
    given = trainer.get("logger") if isinstance(trainer, Mapping) else None
    given = load_yaml(given) if isinstance(given, Typed) else given
    runs = str(stated.tree.get("runs", "runs"))
    loggers = [_with_save_dir(one, runs) for one in (given if isinstance(given, list) else [given])]
    if loggers != (given if isinstance(given, list) else [given]):
        completed = loggers if isinstance(given, list) else loggers[0]
        stated.tree["trainer"] = {**stated.tree["trainer"], "logger": completed}
        stated.added += ["--trainer.logger", json.dumps(completed)]


def complete_mappings(stated: Stated, mappings: Collection[Path]) -> None:
    """Restates mappings that several files state, such as `data.sources`: jsonargparse keeps that of the last file."""
    for path in mappings:
        files = {place.rpartition(", line ")[0] for at, place in stated.places.items() if at[:-1] == path} - {""}
        keys = _with_init_args(path, stated.tree)
        value: Any = stated.tree
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        if len(files) > 1 and isinstance(value, Mapping):
            stated.added += [f"--{'.'.join(keys)}", json.dumps(value)]


def _with_save_dir(logger: Any, runs: str) -> Any:
    if isinstance(logger, Typed):  # one that was added by --trainer.logger+
        logger = load_yaml(logger)
    section = {"class_path": logger} if isinstance(logger, str) else logger
    if not isinstance(section, Mapping) or str(section.get("class_path")).rpartition(".")[2] not in LOCAL_LOGGERS:
        return logger
    inner = section.get("init_args")
    outer = {key: value for key, value in section.items() if key not in CLASS_KEYS and key != BEFORE}
    options = {**(inner if isinstance(inner, Mapping) else {}), **outer}
    if "save_dir" in options:
        return logger
    return {"class_path": section["class_path"], "init_args": {**options, "save_dir": runs}}


def continued_weights(stated: Stated) -> str | None:
    """Returns the name of the weights that a pre-training run begins with, None if it begins with random ones."""
    model = stated.tree.get("model")
    if not isinstance(model, Mapping) or str(model.get("class_path")).rpartition(".")[2] != "Pretraining":
        return None
    weights = {**(model.get("init_args") or {}), **model}.get("weights")
    return None if weights in (None, "", "null") or "${" in str(weights) else str(weights)


def facts_left_to_weights(stated: Stated) -> list[str]:
    """Returns the options of the data that the weights decide with which a pre-training run begins."""
    if continued_weights(stated) is None:
        return []
    return [fact for fact in ("tokenizer", "context_length") if ("data", fact) not in stated.places]


def in_one_line(refusal: Refusal, stated: Stated) -> str:
    """Returns the message of a refusal, with the file and line or the flag that states the value."""
    place, key = stated.place_of(refusal.path), ".".join(refusal.shown)
    flag = without_init_args(tuple(place.removeprefix("--").split("."))) if place.startswith("--") else ()
    said_by_flag = flag[: len(refusal.shown)] == refusal.shown
    text = dict(texts_of(stated.tree)).get(refusal.path, "")
    reason = f"{refusal.reason} (the value of {text})" if "${" in text else refusal.reason
    if refusal.goes_on:
        return f"{place} {reason}" if said_by_flag else f"{f'{place}: ' if place else ''}{key} {reason}"
    return ": ".join(filter(None, [place, "" if said_by_flag else key, reason]))


def without_init_args(path: Path) -> Path:
    return tuple(key for key in path if key != "init_args")


def _with_init_args(keys: Path, tree: Any) -> Path:
    """Returns the keys of a flag with the `init_args` that a user may leave out: --model.learning_rate.peak."""
    full: list[str] = []
    for key in keys:
        if isinstance(tree, Mapping) and "init_args" in tree and key not in CLASS_KEYS:
            full.append("init_args")
            tree = tree["init_args"]
        full.append(key)
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tuple(full)


def _check_list_items(flag: str, keys: Path, value: str, tree: Any) -> None:
    """Refuses an option for the items of a list, because jsonargparse would set it for the last item only.

    Raises:
        ValueError: the flag names an option below a list of several items, and no flag has added the last of them.
    """
    for depth, key in enumerate(keys):
        if isinstance(tree, Mapping) and key not in tree and isinstance(tree.get("init_args"), Mapping):
            tree = tree["init_args"]
        tree = tree.get(key) if isinstance(tree, Mapping) else None
        if isinstance(tree, list) and depth + 1 < len(keys):
            if len(tree) > 1 and not _is_added(tree[-1]):
                place, option = ".".join(keys[: depth + 1]), ".".join(keys[depth + 1 :])
                names = ", ".join(filter(None, (_name_of_item(item) for item in tree)))
                raise ValueError(
                    f"{flag} {value}: {place} is a list of {len(tree)} ({names}), and the flag does not say which of "
                    f"them: give the whole list as --{place} '[…]', or state it with its {option} in a second --config"
                )
            return


def _check_above(flag: str, keys: Path, value: str, stated: Stated) -> None:
    """Refuses an option below a text that is no name of a class: a text has no options.

    Raises:
        ValueError: the flag names an option below such a text.
    """
    tree: Any = stated.tree
    path = _with_init_args(keys, tree)
    for depth, key in enumerate(path[:-1], start=1):
        tree = tree.get(key) if isinstance(tree, Mapping) else None
        if isinstance(tree, str) and not isinstance(plain_value(tree), Mapping) and not _names_a_class(tree):
            above = without_init_args(path[:depth])
            name = ".".join(above)
            raise ValueError(
                f"{flag} {value}: {name} is the text {str(tree)!r} ({stated.place_of(above)}), which has no options: "
                f"give the whole value by --{name}"
            )


def _names_a_class(text: str) -> bool:
    """Returns whether a text is the name of a class or its path, not the name of a file or of something else."""
    is_name = all(part.isidentifier() for part in text.split("."))
    return is_name and (text.rpartition(".")[2][:1].isupper() or ("." in text and not format_of(text)))


def _is_added(item: Any) -> bool:
    return isinstance(item, Added) or (isinstance(item, Mapping) and isinstance(item.get("class_path"), Added))


def _name_of_item(item: Any) -> str:
    if isinstance(item, Mapping):
        return str(item.get("name") or item.get("class_path") or "").rpartition(".")[2]
    return str(item)


def flags(args: Sequence[str]) -> Iterator[tuple[str, Path, str]]:
    """Yields the flags of a command line that set a key of the configuration: flag as typed, keys, value."""
    for arg, following in pairwise([*args, "--"]):
        match = re.match(r"--(\w[\w.-]*)(\+?)(?:=(.*))?$", arg, re.DOTALL)
        if match is None or (match[3] is None and following.startswith("--")):
            continue
        keys = tuple(match[1].split("."))
        if keys[0] in TOP_LEVEL and keys[0] != "config":
            yield f"--{match[1]}{match[2]}", keys, following if match[3] is None else match[3]


def merged(old: Any, new: Any) -> Any:
    """Merges two trees of values as jsonargparse does: new values override old ones, and lists are replaced.

    An option that is given for a list belongs to its last item, as after `--trainer.callbacks+=Progress`. An option
    that is given for a text belongs to the class of that name; a text that names no class is replaced.
    """
    if isinstance(new, list) and new and isinstance(new[0], Added):
        return [*(old if isinstance(old, list) else []), *new]
    if isinstance(old, list) and old and isinstance(new, Mapping):
        return [*old[:-1], merged(old[-1], new)]
    if isinstance(old, Typed) and isinstance(plain_value(old), Mapping):
        old = plain_value(old)
    if isinstance(old, str) and isinstance(new, Mapping) and "class_path" not in new and new and _names_a_class(old):
        old = {"class_path": old if isinstance(old, Added) else str(old)}  # --model Pretraining --model.decoder …
    if not (isinstance(old, Mapping) and isinstance(new, Mapping)):
        return new
    if "class_path" in new and "class_path" in old and new["class_path"] != old["class_path"]:
        return {**new, BEFORE: old.get("init_args") or {}}
    return {**old, **{key: merged(old[key], value) if key in old else value for key, value in new.items()}}


def config_files(args: Sequence[str]) -> list[str]:
    """Returns the files that a command line names by --config or -c, in the order in which they override each other."""
    files = []
    for arg, following in pairwise([*args, ""]):
        if arg in ("--config", "-c") and following:
            files.append(following)
        elif arg.startswith("--config="):
            files.append(arg.partition("=")[2])
    return files


def with_config_paths(args: Sequence[str]) -> list[str]:
    """Returns a command line in which each config's name is replaced by the path of the package's file.

    Raises:
        ValueError: there is no such file and no config of that name.
    """
    found = list(args)
    for place, arg in enumerate(args):
        if arg in ("--config", "-c") and place + 1 < len(args):
            found[place + 1] = config_file(args[place + 1])
        elif arg.startswith("--config="):
            found[place] = f"--config={config_file(arg.partition('=')[2])}"
    return found


def check_command_line(args: Sequence[str]) -> Stated:
    """Checks a command line without importing PyTorch or Lightning, and returns what it states.

    Args:
        args: arguments of a verb that takes a configuration, without the verb.

    Raises:
        ValueError: a configuration is missing or no YAML mapping, a section is unknown, the trainer does not take an
            option or its value, a fact of the data is stated for the model, this package has no such class, or a class
            of it does not take an option.
    """
    if args and not args[0].startswith("-"):
        raise ValueError(f"{args[0]!r} is not an option: a configuration is given by --config {args[0]}")
    _check_flags(args)
    stated = read_command_line(with_config_paths(args))
    _check_texts(stated)
    for key in stated.tree:
        if key not in (*TOP_LEVEL, *_OTHER_FLAGS):
            raise ValueError(f"{_place(stated, key)}{no_option(str(key), TOP_LEVEL, 'this command')}")
    _check_facts_of_data(stated)
    check_classes(stated, stated.tree)
    return stated


def place_of_run(tree: Mapping[str, Any]) -> FilePath:
    """Returns `<runs>/<name>` of a configuration.

    Raises:
        ValueError: the name is a path.
    """
    return inside(FilePath(str(tree.get("runs") or "runs")), tree.get("name") or "run", "--name")


def _place(stated: Stated, *path: str) -> str:
    place = stated.place_of(path)
    return f"{place}: " if place else ""


def _check_flags(args: Sequence[str]) -> None:
    for arg in args:
        match = re.match(r"--([A-Za-z]\w*)", arg)
        if match and match[1] not in (*TOP_LEVEL, *_OTHER_FLAGS):
            near = nearest_name(match[1], TOP_LEVEL)
            hint = f": did you mean --{near}?" if near else ", see --help"
            raise ValueError(f"{arg.partition('=')[0]} is not an option of this command{hint}")


def _check_texts(stated: Stated) -> None:
    """Checks the texts of a configuration, before anything is imported or written. Lets in the modules that it names.

    Raises:
        ValueError: the run's name is a path, or a text holds a secret, which `config.yaml` and logs would repeat.
    """
    for path, text in texts_of(stated.tree):
        let_in(text)
        where, key = stated.place_and_key(path), ".".join(path)
        if secret_in(text):
            raise ValueError(
                f"{where} holds a key or a password ({redacted(text)[:200]}), and a run keeps and shows its "
                "configuration: give it in an environment variable (SECURITY.md)"
            )
        if key == "name":
            plain_name(str(text), where)
        if path[-1] == "api_key_variable":
            try:
                key_of(text)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None


def texts_of(value: Any, path: Path = ()) -> Iterator[tuple[Path, str]]:
    """Yields the texts of a tree of values with their paths, without `init_args`, those of typed mappings, too."""
    if isinstance(value, str):
        yield path, value
    if isinstance(value, Typed) and value.lstrip()[:1] in ("{", "["):
        with suppress(yaml.YAMLError, ValueError):
            value = load_yaml(value)
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from texts_of(inner, path if key == "init_args" else (*path, str(key)))


def _check_facts_of_data(stated: Stated) -> None:
    """Refuses a fact of the data that is stated again for the model, because the link would silently override it."""
    for fact, key in LINKED.items():
        place = stated.places.get(("model", fact))
        if place is not None and place.startswith("--"):
            raise ValueError(f"{place} is taken from {key}: set that instead")
        if place is not None:
            raise ValueError(f"{place}: model.init_args.{fact} is taken from {key}: leave it out here")


def check_classes(stated: Stated, tree: Mapping[str, Any]) -> None:
    """Checks the options of the trainer, and the names and options of this package's classes as their source has them.

    Args:
        tree: what the command line states, with or without the values of its references.

    Raises:
        ValueError: an option or its value is refused; the message is one line.
    """
    trainer = tree.get("trainer")
    try:
        if isinstance(trainer, Mapping):
            check_trainer_options(trainer)
        _check_sources(tree, continues=continued_weights(stated) is not None)
    except Refusal as refusal:
        raise ValueError(in_one_line(refusal, stated)) from refusal


def _check_sources(tree: Mapping[str, Any], *, continues: bool) -> None:
    """Checks the names and options of this package's classes. See `check_classes`."""
    from lightning_danube.cli.source import SourceReader

    reader = SourceReader(taken=FACTS_OF_DATA)
    trainer = tree.get("trainer")
    sections: list[tuple[Path, Any]] = [((name,), tree.get(name)) for name in ("data", "model")]
    if continues and isinstance(data := tree.get("data"), Mapping):
        # The weights say what the data leave open; they are read later.
        sections[0] = (("data",), {**data, "init_args": {"context_length": 1, **(data.get("init_args") or {})}})
    for key in ("callbacks", "logger"):
        named = plain_value(trainer.get(key)) if isinstance(trainer, Mapping) else None
        listed = named if isinstance(named, list) else [named] if named else []
        sections += [(("trainer", key, str(n)), one) for n, one in enumerate(listed)]
    for path, section in sections:
        section = plain_value(section)
        named = section.get("class_path") if isinstance(section, Mapping) else section
        if not isinstance(named, str) or not named or "${" in named:
            continue
        if "." in named:
            reader.named_class(named, section, path)
        else:
            reader.short_name(named, section, path)
