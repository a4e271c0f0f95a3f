"""YAML configurations, found by path or by the name of a configuration in this package (`sft/quickstart`).

The only reader of YAML. The keys of mappings are text as they are written, as in JSON: `no`, `on` and `2024` are names,
which YAML 1.1 gives other types. A key that stands twice is refused, because its first value would be lost.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_danube.terminal import nearest_name

if TYPE_CHECKING:
    import yaml

FOLDER = Path(__file__).parent / "configs"


def config_names() -> list[str]:
    """Returns the names of all configurations in this package; names without a folder come first."""
    folder = FOLDER.resolve()  # a symbolic link in a clone, which rglob would not enter
    names = [file.relative_to(folder).with_suffix("").as_posix() for file in folder.rglob("*.yaml")]
    return sorted(names, key=lambda name: ("/" in name, name))


def config_file(config: str) -> str:
    """Returns the file that `--config` names: a path, or the name of a configuration in this package.

    A path takes precedence.

    Raises:
        ValueError: there is no such file and no such name.
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
    near = nearest_name(wanted, names) or by_last_part.get(nearest_name(wanted.rpartition("/")[2], by_last_part) or "")
    return f"did you mean {near}?" if near else "the command `configs` lists those that need no file"


def description(config: str) -> str:
    """Returns the description in the first line of a configuration (path or name); empty if the line is no comment."""
    first = Path(config_file(config)).read_text("utf-8").partition("\n")[0]
    return first.removeprefix("#").strip().rstrip(":.") if first.startswith("#") else ""


def read_config(file: str) -> dict[str, Any]:
    """Reads the mapping in a configuration, given by path or name.

    Raises:
        ValueError: there is no such file and no such name, or the content is no YAML mapping.
    """
    import yaml  # here, because the command `configs` reads no file and its help must be fast

    file = config_file(file)
    try:
        config = load_yaml(Path(file).read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text") from error
    except DuplicateKey as error:
        raise ValueError(f"{file}, {error}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise ValueError(f"{file}{where}: not YAML ({getattr(error, 'problem', None) or error})") from error
    if not isinstance(config, dict):
        found = "is empty" if config is None else f"holds a {type(config).__name__}"
        raise ValueError(f"{file} {found}: a configuration is a mapping of keys such as data, model, trainer")
    return config


class DuplicateKey(ValueError):
    """A key stands twice in a mapping of YAML."""


def load_yaml(text: str) -> Any:
    """Returns the value of a YAML text, with keys that are text.

    Raises:
        yaml.YAMLError: the text is not YAML.
        DuplicateKey: a key stands twice; the message begins with the line.
    """
    import yaml

    loader = yaml.SafeLoader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            return None
        _make_keys_text(root)
        return loader.construct_document(root)
    finally:
        loader.dispose()


def with_text_keys(text: str) -> str:
    """Returns a YAML text with quotes around the keys that another reader would take for no text.

    Other texts, and texts that are not YAML, are returned unchanged.

    Raises:
        DuplicateKey: a key stands twice; the message begins with the line.
    """
    import yaml

    if not any(mark in text for mark in ":?{"):  # no mapping is written without one of them
        return text
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError:
        return text
    if root is None or not _make_keys_text(root):
        return text
    return str(yaml.serialize(root, Dumper=yaml.SafeDumper))


def _make_keys_text(root: yaml.Node) -> bool:
    """Marks all keys below a node as text, in quotes where that is needed. Returns whether a key was not.

    Raises:
        DuplicateKey: a key stands twice.
    """
    changed, nodes, done = False, [root], set()
    while nodes:
        node = nodes.pop()
        if id(node) in done or node.id == "scalar":
            continue
        done.add(id(node))
        if node.id == "sequence":
            nodes += reversed(node.value)
            continue
        lines: dict[str, int] = {}
        for key, value in node.value:
            nodes.append(value)
            if key.id != "scalar" or key.tag == "tag:yaml.org,2002:merge":
                continue
            line = key.start_mark.line + 1
            if key.value in lines:
                raise DuplicateKey(
                    f"line {line}: the key {key.value!r} stands twice, first in line {lines[key.value]}: remove or "
                    "rename one of them"
                )
            lines[key.value] = line
            # A plain key that begins as a number does is one for other readers, such as 1e3.
            if key.tag != "tag:yaml.org,2002:str" or (key.style is None and key.value[:1] in "-+.0123456789"):
                changed, key.style, key.tag = True, "'", "tag:yaml.org,2002:str"
    return changed


def lines_of_keys(file: str) -> dict[tuple[str, ...], int]:
    """Returns key path → line of the configuration, counted from 1. Items of a list are numbered from 0."""
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
