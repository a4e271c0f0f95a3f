"""Turns what jsonargparse says about a config into one line: the key, what is wrong, where it stands, what was meant.

jsonargparse answers with a tree of everything it tried, since most types are unions ("a module, or null"). The branch
that went deepest is the one the user meant.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import inspect
import re
import typing
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from omegaconf.errors import OmegaConfBaseException

TOP_LEVEL = ("name", "runs", "seed_everything", "trainer", "model", "data", "ckpt_path", "config")


def parse(parser: Any, args: list[str], config_files: Sequence[str], facts_of_data: dict[str, str]) -> Any:
    """What a jsonargparse parser makes of a command line.

    Raises:
        ValueError: it refuses; in one line.
    """
    try:
        return parser.parse_args(args)
    except argparse.ArgumentError as error:
        raise ValueError(explain(str(error), config_files, facts_of_data)) from error
    except OmegaConfBaseException as error:
        key = re.search(r"key '\.*([^']+)' not found", str(error))
        what = f"${{{key[1]}}} refers to a key that no config states" if key else str(error).splitlines()[0]
        raise ValueError(f"{' + '.join(config_files)}: {what}") from error


def explain(message: str, config_files: Sequence[str], facts_of_data: dict[str, str]) -> str:
    """One line for an error of the argument parser.

    Args:
        message: the parser's own words.
        config_files: files given by `--config`, to find the line of the key.
        facts_of_data: options that a config may not state, and the key that states them.
    """
    keys, class_path, reasons, value = _deepest_branch(message)
    key = ".".join(keys)
    if value is not None and (match := re.match(r"NestedArg\(key='([^']+)'", value)) and class_path is None:
        return f"{key}: {match[1]!r} is an option of a class, and none is named: give --{key} with a class first"
    reason = _reason(reasons, class_path, facts_of_data)
    if class_path is not None and reasons[0].startswith("unrecognized arguments:"):
        return f"{key}: {reason}"  # from the command line, so it stands in no file
    wrong_option = next(filter(None, map(_option_in, reasons)), None)
    if wrong_option:
        wrong_option = _refused(wrong_option, class_path)[0] if class_path else wrong_option.split(".")[-1]
    names = [wrong_option] if wrong_option else re.findall(r"class_path '([^']+)'", reason) or keys[-1:]
    if class_path is not None and (group := (_missing(reasons[0]) or "").rpartition(".")[0]):
        names = [group]  # a group stands in the file, what is missing from it does not
    where = place_of_key(
        names[0].split(".")[-1] if names and "class_path" not in reason else names[0] if names else "", config_files
    )
    if reason.startswith("expected") and ", not " not in reason and value is not None and len(value) <= 60:
        reason += f", not {value}"
    return f"{where}{key + ': ' if key else ''}{reason}"


def _deepest_branch(message: str) -> tuple[list[str], str | None, list[str], str | None]:
    """Keys on the way, the class whose options were read, the reasons at the end, the value that was given."""
    path: list[tuple[int, str, str]] = []  # indentation, kind, text
    best: tuple[int, list[str], str | None, list[str]] = (-1, [], None, [])
    value: dict[int, str] = {}
    for line in message.splitlines():
        text = line.strip().removeprefix("- ")
        indent = len(line) - len(line.lstrip())
        while path and path[-1][0] >= indent:
            path.pop()
        if match := re.match(r'Parser key "([^"]+)":\s*(.*)', text):
            path.append((indent, "key", match[1]))
            if not match[2]:
                continue
            indent, text = indent + 2, match[2]
        elif match := re.match(r"Problem with given class_path '([^']+)':", text):
            path.append((indent, "class", match[1]))
            continue
        elif match := re.match(r"Given value: (.*)", text):
            value.setdefault(indent, match[1])
            continue
        if not text or re.match(
            r"(Does not validate|Subtypes:|Errors:|Given value|Subclass types|a (class path|dict) )", text
        ):
            continue
        depth = len(path)
        if depth > best[0]:
            keys = [name for _, kind, name in path if kind == "key"]
            classes = [name for _, kind, name in path if kind == "class"]
            best = (depth, keys, classes[-1] if classes else None, [text])
        elif depth == best[0]:
            best[3].append(text)
    given = value[max(value)] if value else None
    return best[1], best[2], best[3] or [" ".join(message.split())], given


def _reason(reasons: list[str], class_path: str | None, facts_of_data: dict[str, str]) -> str:
    first = reasons[0]
    if dotted := _option_in(first):
        group, _, option = dotted.rpartition(".")
        if class_path is not None:
            option, known, owner = _refused(dotted, class_path)
        else:
            if group == "trainer":
                class_path = "lightning.pytorch.Trainer"
            known, owner = _options(class_path)
        if not _is_data_module(class_path):
            if option in facts_of_data:
                return f"{option!r} is taken from {facts_of_data[option]}: leave it out here"
            known = [name for name in known if name not in facts_of_data]
        return _no_option(option, known, owner)
    if match := re.search(r"module '([^']+)' has no attribute '([^']+)'", first):
        names = [name for name in getattr(_import(match[1]), "__all__", ())]
        close = get_close_matches(match[2], names, n=1, cutoff=0.5)
        hint = f"did you mean {match[1]}.{close[0]}?" if close else f"there are {', '.join(names)}"
        return f"there is no class {match[2]!r} in {match[1]}: {hint}"
    if "No module named" in first:
        return f"the class {class_path!r} cannot be imported ({first})"
    expected = [
        _type_name(match[1]) for r in reasons if (match := re.match(r"Expected a (.+?)(?:\. Got value: .*)?$", r))
    ]
    if expected and first.startswith("Expected"):
        got = re.search(r"Got value: (.*)$", first)
        return "expected " + " or ".join(dict.fromkeys(expected)) + (f", not {got[1]}" if got else "")
    if match := re.match(r"Not a valid subclass of (\w+)\.? ?(?:Got value: (.*))?", first):
        return f"expected a mapping of the options of {match[1]}" + (f", not {match[2]}" if match[2] else "")
    if match := re.match(r"File does not exist: '(.*)'", first):
        return f"there is no config file {match[1]}"
    if missing := _missing(first):
        if class_path is None:
            return "give a configuration, for example --config quickstart"
        group, _, option = missing.rpartition(".")
        return f"{option!r} is missing" + (f" from {group}" if group else "")
    if match := re.match(r"(?:Unrecognized|unrecognized) arguments: (.*)", first):
        flag = match[1].split()[0]
        dotted = flag.lstrip("-").partition("=")[0]
        if class_path is not None:
            return _no_option(*_refused(dotted, class_path))
        if dotted.startswith("trainer."):
            return _no_option(dotted.removeprefix("trainer."), *_options("lightning.pytorch.Trainer"))
        known, owner = _options(None)
        close = get_close_matches(dotted, known, n=1)
        return f"{flag} is not an option of {owner}" + (f": did you mean --{close[0]}?" if close else ", see --help")
    return " ".join(first.split())


def _option_in(reason: str) -> str | None:
    """The option that a reason says is not known, with the groups that it stands in."""
    if match := re.search(r"(?:Group '([^']+)' does not accept )?option '([^']+)'", reason, re.IGNORECASE):
        return f"{match[1]}.{match[2]}" if match[1] else match[2]
    return None


def _missing(reason: str) -> str | None:
    """The first required option that a reason says is not given, with the groups that it stands in."""
    match = re.search(r"the following arguments are required: ([^,\s]+)", reason)
    return match[1] if match else None


def _no_option(option: str, known: Sequence[str], owner: str) -> str:
    close = get_close_matches(option, known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(known)}"
    return f"{option!r} is not an option of {owner}: {hint}"


def _refused(option: str, class_path: str) -> tuple[str, list[str], str]:
    """The first part of a dotted option that its class does not know, the options of that class, and its name."""
    module, _, name = class_path.rpartition(".")
    owner, parts = getattr(_import(module), name), option.split(".")
    while len(parts) > 1 and (inner := _dataclass_of(owner, parts[0])) is not None:
        owner, parts = inner, parts[1:]
    return parts[0], [known for known in inspect.signature(owner).parameters if known != "self"], owner.__name__


def _dataclass_of(owner: Any, parameter: str) -> Any:
    """The dataclass that a parameter takes, if it takes one."""
    hint = typing.get_type_hints(owner.__init__).get(parameter)
    return next((one for one in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(one)), None)


def _options(class_path: str | None) -> tuple[list[str], str]:
    """Options of the class that refused one, and its name."""
    if class_path is None:
        return list(TOP_LEVEL), "this command"
    module, _, name = class_path.rpartition(".")
    parameters = inspect.signature(getattr(_import(module), name)).parameters
    return [parameter for parameter in parameters if parameter != "self"], name


def _is_data_module(class_path: str | None) -> bool:
    module, _, name = (class_path or "").rpartition(".")
    owner = getattr(_import(module), name, None) if module else None
    return isinstance(owner, type) and issubclass(owner, _import("lightning.pytorch").LightningDataModule)


def _import(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        return None


def _type_name(name: str) -> str:
    if match := re.fullmatch(r"<class '(?:.*\.)?(\w+)'>", name):
        return {
            "NoneType": "null",
            "str": "text",
            "int": "a whole number",
            "float": "a number",
            "bool": "true or false",
        }.get(match[1], match[1])
    if match := re.fullmatch(r"typing\.Literal\[(.*)\]", name):
        return "one of " + match[1]
    return name


def place_of_key(key: str, config_files: Sequence[str]) -> str:
    """ "file, line n: " of the first line that states the key (or holds the class path), "" if no file does."""
    if not key:
        return ""
    pattern = re.compile(rf"(^|[\s{{,\"'-]){re.escape(key)}[\"']?\s*:" if "." not in key else re.escape(key))
    for file in reversed(config_files):
        try:
            lines = Path(file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError):
            continue
        for number, line in enumerate(lines, start=1):
            if pattern.search(line):
                return f"{file}, line {number}: "
    return ""
