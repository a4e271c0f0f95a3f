"""YAML files: configurations by path, or by the name of one that comes with the package (`sft/quickstart`)."""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import yaml

FOLDER = Path(__file__).parent / "configs"


def config_names() -> list[str]:
    """All names; those without a folder come first."""
    folder = FOLDER.resolve()  # a symbolic link in a clone, which rglob would not enter
    names = [file.relative_to(folder).with_suffix("").as_posix() for file in folder.rglob("*.yaml")]
    return sorted(names, key=lambda name: ("/" in name, name))


def config_file(config: str) -> str:
    """The file that `--config` names: a path, or the name of a configuration of the package. A path goes first.

    Raises:
        ValueError: there is neither such a file nor such a name.
    """
    if Path(config).is_file():
        return config
    names = config_names()
    if config in names:
        return str(FOLDER / f"{config}.yaml")
    raise ValueError(f"there is no config file {config}: {_what_was_meant(config, names)}")


def _what_was_meant(config: str, names: list[str]) -> str:
    wanted = config.removeprefix("./").removeprefix("configs/").removesuffix(".yaml")
    # "imdb-papr" is near classification/imdb-paper, too, so the last part of each name is compared as well.
    by_last_part = {name.rpartition("/")[2]: name for name in reversed(names)}
    close = get_close_matches(wanted, names, n=1) or [
        by_last_part[last] for last in get_close_matches(wanted.rpartition("/")[2], by_last_part, n=1)
    ]
    return f"did you mean {close[0]}?" if close else "the command `configs` lists those that need no file"


def description(config: str) -> str:
    """What the first line of a configuration, a file or a name, says about it. Empty if it is no comment."""
    first = Path(config_file(config)).read_text("utf-8").partition("\n")[0]
    return first.removeprefix("#").strip().rstrip(":.") if first.startswith("#") else ""


def read_config(file: str) -> dict[str, Any]:
    """The mapping that a configuration holds, given by its file or by its name.

    Raises:
        ValueError: there is no such file and no such name, or it is no YAML mapping.
    """
    import yaml  # here: the command `configs` reads no file, and its help has to come at once

    file = config_file(file)
    try:
        config = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise ValueError(f"{file}{where}: not YAML ({getattr(error, 'problem', None) or error})") from error
    if not isinstance(config, dict):
        found = "is empty" if config is None else f"holds a {type(config).__name__}"
        raise ValueError(f"{file} {found}: a configuration is a mapping of keys such as data, model, trainer")
    return config


def lines_of_keys(file: str) -> dict[tuple[str, ...], int]:
    """Key path → the line of a configuration that states it, counted from 1. A list's items are numbered from 0."""
    import yaml

    root = yaml.compose(Path(config_file(file)).read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    return dict(_lines(root, ()))


def _lines(node: yaml.Node, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], int]]:
    if node.id == "mapping":
        inner = [((*path, str(key.value)), key, value) for key, value in node.value]
    elif node.id == "sequence":
        inner = [((*path, str(number)), item, item) for number, item in enumerate(node.value)]
    else:
        return
    for place, key, value in inner:
        yield place, key.start_mark.line + 1
        yield from _lines(value, place)
