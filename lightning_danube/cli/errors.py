"""Reports a mistake in a configuration in one line: the place, the key, what is wrong, what was meant."""

from __future__ import annotations

import argparse
import re
import traceback
from collections.abc import Mapping
from pathlib import Path as FilePath
from typing import Any

from lightning_danube.cli.command_line import Stated, texts_of
from lightning_danube.cli.options import Path
from lightning_danube.files import causes

_PACKAGE = FilePath(__file__).resolve().parents[1]
OUR_FOLDERS = (_PACKAGE, (_PACKAGE / "callbacks").resolve())
"""Folders of the code of this project; the callbacks of a clone lie outside the package."""


def located(message: str, stated: Stated) -> str:
    """Returns the message of a class with the place that states the option at its beginning.

    A message begins with the key, as in "data.batch_tokens is 3, …" and "data.stages: …", or with the option, as in
    "save_every is 5x: …".
    """
    word, _, rest = message.partition(" ")
    key = tuple(re.sub(r"\[(\d+)\]", r".\1", word.removesuffix(":")).split("."))
    if len(key) == 1 and not rest.startswith("is "):
        return message
    found = [path for path in stated.places if path[-len(key) :] == key]
    path = key if key in found else found[0] if len(found) == 1 else None
    if path is None:
        return message
    place, rest = stated.places[path], f": {rest}" if word.endswith(":") else f" {rest}"
    return f"{place}{rest}" if place.startswith("--") else f"{place}: {'.'.join(path)}{rest}"


def parse(parser: Any, args: list[str], stated: Stated) -> Any:
    """Parses, with a jsonargparse parser, a command line that was read before, and the arguments that follow from it.

    Raises:
        ValueError: the parser refuses a value; the message is one line.
    """
    from omegaconf.errors import OmegaConfBaseException

    try:
        config = parser.parse_args([*args, *stated.added])
    except OmegaConfBaseException as error:
        raise ValueError(unresolved(stated) or str(error).splitlines()[0]) from error
    except (argparse.ArgumentError, IndexError) as error:
        if (lost := lost_by_the_parser(error)) is not None:
            raise lost from None  # its own chain may hold the parser's error
        if isinstance(error, IndexError):
            raise
        raise ValueError(" ".join(str(error).split())) from error
    keep_texts(config, stated.texts)
    return config


def keep_texts(config: Any, texts: Mapping[Path, str | None]) -> None:
    """Sets the texts of a parsed configuration, in place, as they were stated.

    jsonargparse reads a text a second time as YAML: "# " is null then. A mapping of a flag such as
    `--data.init_args.sources.field` it writes as Python does: a line end becomes a backslash and an n, and null "None".
    """
    config = config.get(str(config.get("subcommand")), config)
    for path, text in texts.items():
        _set_text(config, path, text)


def _set_text(config: Any, path: Path, text: str | None) -> None:
    for key in path[:-1]:
        config = _inner(config, key)
    key = path[-1]
    if isinstance(config, list):
        if key.isdigit() and int(key) < len(config) and _is_text(config[int(key)]):
            config[int(key)] = text
        return
    options = _options(config)
    if key in options and _is_text(options[key]):
        options[key] = text


def _inner(config: Any, key: str) -> Any:
    if isinstance(config, list):
        return config[int(key)] if key.isdigit() and int(key) < len(config) else None
    return _options(config).get(key)


def _options(config: Any) -> dict[str, Any]:
    """Returns the options of a class, or the keys of a mapping; nothing for other values."""
    keys = config if isinstance(config, dict) else getattr(config, "__dict__", {})
    inner = keys.get("init_args")
    return keys if inner is None else _options(inner)


def _is_text(value: Any) -> bool:
    return value is None or isinstance(value, str)


def unresolved(stated: Stated) -> str | None:
    """Names the first value that refers to a missing key, such as `${nothing}`."""
    for path, text in texts_of(stated.tree):
        for reference in re.findall(r"\$\{([\w.]+)\}", text):
            if not _is_stated(stated.tree, reference.split(".")):
                return f"{stated.place_of(path)}: ${{{reference}}} refers to a key that no config states"
    return None


def _is_stated(tree: Any, keys: list[str]) -> bool:
    for key in filter(None, keys):
        if isinstance(tree, list) and key.isdigit() and int(key) < len(tree):
            tree = tree[int(key)]
        elif isinstance(tree, Mapping) and key in tree:
            tree = tree[key]
        else:
            return False
    return True


def while_restoring(error: BaseException, checkpoint: FilePath | None) -> ValueError | None:
    """Returns an error for the user if a checkpoint of another layout made Lightning or PyTorch fail; None otherwise.

    Lightning takes a checkpoint apart key by key, and raises whatever a missing or foreign value leads to.
    """
    frames = traceback.extract_tb(error.__traceback__)
    restoring = any(FilePath(frame.filename).name == "checkpoint_connector.py" for frame in frames)
    ours = isinstance(error, ValueError) and any(
        FilePath(frames[-1].filename).is_relative_to(folder) for folder in OUR_FOLDERS
    )
    if not restoring or ours or isinstance(error, OSError) or checkpoint is None:
        return None
    said = " ".join(str(error).split())
    return ValueError(
        f"{checkpoint} does not fit this run, or another program wrote it ({type(error).__name__}: {said[:200]}): name "
        "another checkpoint, or begin a new run without --ckpt_path"
    )


def raised_by_a_class(error: BaseException) -> ValueError | None:
    """Returns the ValueError that a configured class raised, if it is the cause of the parser's error.

    The parser chains the errors, and adds the types that it tried to the message.
    """
    for cause in causes(error):
        if isinstance(cause, ValueError) and not _is_of_a_parser(cause):
            return cause
    return None


def lost_by_the_parser(error: BaseException) -> BaseException | None:
    """Returns the error of a class for which the parser could not build its own message.

    jsonargparse collects the errors of all types that it tried. An error without a text, such as `MemoryError()`, then
    ends it with an IndexError that names no cause. Of a class inside a class, that IndexError is the cause of another.
    """
    waiting, seen = [error], set[int]()
    while waiting:
        for cause in causes(waiting.pop(0)):
            if id(cause) in seen or not isinstance(cause, IndexError):
                continue
            seen.add(id(cause))
            for frame, _ in traceback.walk_tb(cause.__traceback__):
                for value in frame.f_locals.values():
                    if isinstance(value, list) and value and all(isinstance(one, BaseException) for one in value):
                        if (found := next((one for one in value if not _is_of_a_parser(one)), None)) is not None:
                            return found
                        waiting += value
    return None


def _is_of_a_parser(error: BaseException) -> bool:
    import jsonargparse

    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return FilePath(frame.f_code.co_filename).is_relative_to(FilePath(jsonargparse.__file__).parent)
