"""YAML configurations, found by path or by the name of a configuration in this package (`sft/quickstart`).

The only reader of YAML: whatever the library raises on a text of a user becomes `NotYaml`, and a text that stands for
values without end is refused. The keys of mappings are text as they are written, as in JSON: `no`, `on` and `2024` are
names, which YAML 1.1 gives other types. A key that appears twice is refused, because its first value would be lost.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_danube.terminal import as_typed, nearest_name, quoted

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
    """Returns the description in the first line of a configuration (path or name); empty without such a comment."""
    first = Path(config_file(config)).read_text("utf-8").partition("\n")[0]
    return first.removeprefix("#").strip().rstrip(":.") if first.startswith("#") else ""


def way_to_make(runs: str | Path, name: str) -> str | None:
    """Returns "`lightning-danube fit --config sft/quickstart` makes one" for the run `runs/sft-quickstart`.

    Returns:
        None if no configuration of this package that saves checkpoints gives its runs this name.
    """
    for config in config_names():
        text = (FOLDER / f"{config}.yaml").read_text("utf-8")
        if re.search(rf"^name: {re.escape(name)}$", text, re.MULTILINE) and "callbacks.Checkpoints" in text:
            where = "" if Path(runs) == Path("runs") else f" --runs {quoted(runs)}"
            return f"`{as_typed()} fit --config {config}{where}` makes one"
    return None


def read_config(file: str) -> dict[str, Any]:
    """Reads the mapping in a configuration, given by path or name.

    Raises:
        ValueError: there is no such file and no such name, or the content is not a YAML mapping.
    """
    file = config_file(file)
    try:
        config = load_yaml(Path(file).read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text") from error
    except NotYaml as error:
        raise ValueError(f"{file}{', ' if str(error).startswith('line ') else ': '}{error}") from error
    if not isinstance(config, dict):
        found = "is empty" if config is None else f"holds a {type(config).__name__}"
        raise ValueError(f"{file} {found}: a configuration is a mapping of keys such as data, model, trainer")
    return config


class NotYaml(ValueError):
    """A text is not YAML; the message says why in one line, and begins with the number of the line if that is known."""


class RefusedYaml(NotYaml):
    """A key appears twice in a mapping, or the values are nested or repeated without end."""


DEEPEST = 50
"""Values may be nested so deep. The libraries behind this module call themselves several times for each level."""
MOST_REPEATED = 10_000
"""Aliases may repeat so many values. With ten lines of aliases, a text stands for more values than any memory holds."""


def load_yaml(text: str) -> Any:
    """Returns the value of a YAML text, with keys that are text.

    Raises:
        NotYaml: the text is not YAML, or is refused.
    """
    return _read(text, _value)


def _read(text: str, use: Callable[[yaml.SafeLoader, yaml.Node], Any]) -> Any:
    """Returns what `use` makes of a text's nodes, None for an empty text. Translates every error of the library."""
    import yaml

    *faster, own = _loaders()
    loader = None
    try:
        for kind in faster:
            with suppress(yaml.YAMLError, UnicodeError):
                loader = kind(text)
                root = loader.get_single_node()
                break
        else:
            # Its errors say more. What the other reader refuses, this one may read.
            loader = own(text)
            root = loader.get_single_node()
        if root is None:
            return None
        _check_size(root)
        return use(loader, root)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        raise NotYaml(f"{where}not YAML ({getattr(error, 'problem', None) or ' '.join(str(error).split())})") from error
    finally:
        if loader is not None:
            loader.dispose()


@cache
def _loaders() -> list[type[yaml.SafeLoader]]:
    """Returns loaders that stop at the depth where a text is refused. The library would call itself once a level.

    The last one is written in Python. The one before it, where the library was built with it, reads the text eight
    times as fast, in C.
    """
    import yaml
    from yaml.composer import Composer
    from yaml.constructor import SafeConstructor
    from yaml.resolver import Resolver

    class Limited(Composer):
        depth = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.depth == DEEPEST:
                raise RefusedYaml(_TOO_DEEP)
            self.depth += 1
            node = super().compose_node(parent, index)
            self.depth -= 1
            return node

    class InPython(Limited, yaml.SafeLoader):
        pass

    if not yaml.__with_libyaml__:
        return [InPython]
    from yaml.cyaml import CParser

    class InC(Limited, CParser, SafeConstructor, Resolver):
        def __init__(self, text: str) -> None:
            CParser.__init__(self, str(text))
            Composer.__init__(self)
            SafeConstructor.__init__(self)
            Resolver.__init__(self)

    return [InC, InPython]


def _value(loader: yaml.SafeLoader, root: yaml.Node) -> Any:
    _make_keys_text(root)
    for node in _nodes(root):
        # No option is a date, and what looks like one may be a name. OmegaConf reads it as text, too.
        if node.tag == "tag:yaml.org,2002:timestamp":
            node.tag = "tag:yaml.org,2002:str"
    try:
        return loader.construct_document(root)
    except (ValueError, KeyError, AttributeError, TypeError, OverflowError) as error:
        # The library leaves these to Python: an integer of too many digits, `!!int x`.
        raise _wrong_scalar(root) or NotYaml(f"not YAML ({error})") from error


def _wrong_scalar(root: yaml.Node) -> NotYaml | None:
    """Names the first value that its type cannot hold."""
    import yaml

    loader = yaml.SafeLoader("")  # the loader that failed takes each value for one that holds itself
    for node in _nodes(root):
        if node.id != "scalar":
            continue
        try:
            loader.construct_object(node)
        except Exception:
            shown = node.value if len(node.value) <= 40 else f"{node.value[:20]}… ({len(node.value):,} characters)"
            kind = node.tag.rpartition(":")[2]
            return NotYaml(
                f"line {node.start_mark.line + 1}: {shown} cannot be read as {kind}: put quotes around a text"
            )
    return None


_TOO_DEEP = f"nested more than {DEEPEST} deep: a configuration is never so deep"


def _check_size(root: yaml.Node) -> None:
    """
    Raises:
        RefusedYaml: the values are too deep, or aliases repeat too many of them, or a value that holds itself.
    """
    sizes: dict[int, int] = {}  # with all repeated values
    heights: dict[int, int] = {}
    begun: set[int] = set()
    stack = [root]
    while stack:
        node = stack[-1]
        inner = _inner(node)
        if id(node) not in begun:
            begun.add(id(node))
            if any(id(one) in begun and id(one) not in sizes for one in inner):
                raise RefusedYaml(f"line {node.start_mark.line + 1}: an alias stands inside the value that it repeats")
            stack += [one for one in inner if id(one) not in sizes]
            continue
        stack.pop()
        if id(node) not in sizes:
            sizes[id(node)] = 1 + sum(sizes[id(one)] for one in inner)
            heights[id(node)] = 1 + max((heights[id(one)] for one in inner), default=0)
    if heights[id(root)] > DEEPEST:
        raise RefusedYaml(_TOO_DEEP)
    if (repeated := sizes[id(root)] - len(sizes)) > MOST_REPEATED:
        shown = f"{repeated:,}" if repeated < 10**12 else "too many"
        raise RefusedYaml(f"its aliases repeat {shown} values, more than {MOST_REPEATED:,}: write them out")


def _inner(node: yaml.Node) -> list[yaml.Node]:
    if node.id == "mapping":
        return [one for pair in node.value for one in pair]
    return node.value if node.id == "sequence" else []


def _nodes(root: yaml.Node) -> Iterator[yaml.Node]:
    """Yields each node once, in the order of the text."""
    nodes, done = [root], set()
    while nodes:
        node = nodes.pop()
        if id(node) not in done:
            done.add(id(node))
            yield node
            nodes += reversed(_inner(node))


def with_text_keys(text: str) -> str:
    """Returns a YAML text with quotes around the keys that another reader would take for no text.

    Other texts, and texts that are not YAML, are returned unchanged.

    Raises:
        RefusedYaml: a key appears twice, or the values are nested or repeated without end.
    """
    import yaml

    if not any(mark in text for mark in ":?{["):  # no mapping and no list in brackets is written without one of them
        return text

    def written(loader: yaml.SafeLoader, root: yaml.Node) -> str | None:
        return str(yaml.serialize(root, Dumper=yaml.SafeDumper)) if _make_keys_text(root) else None

    try:
        return _read(text, written) or text
    except RefusedYaml:
        raise
    except NotYaml:
        return text


def _make_keys_text(root: yaml.Node) -> bool:
    """Marks all keys below a node as text, in quotes where that is needed. Returns whether a key was not.

    Raises:
        RefusedYaml: a key appears twice.
    """
    changed = False
    for node in _nodes(root):
        if node.id != "mapping":
            continue
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if key.id != "scalar" or key.tag == "tag:yaml.org,2002:merge":
                continue
            line = key.start_mark.line + 1
            if key.value in lines:
                raise RefusedYaml(
                    f"line {line}: the key {key.value!r} appears twice, first in line {lines[key.value]}: remove or "
                    "rename one of them"
                )
            lines[key.value] = line
            # A plain key that begins as a number does is one for other readers, such as 1e3.
            if key.tag != "tag:yaml.org,2002:str" or (not key.style and key.value[:1] in "-+.0123456789"):
                changed, key.style, key.tag = True, "'", "tag:yaml.org,2002:str"
    return changed


def lines_of_keys(file: str) -> dict[tuple[str, ...], int]:
    """Returns key path → line of the configuration, counted from 1. Items of a list are numbered from 0."""
    text = Path(config_file(file)).read_text(encoding="utf-8")
    return dict(_read(text, lambda loader, root: list(_lines(root, ()))) or ())


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
