"""Reads the values of a configuration against the signatures of the classes that they configure.

For the trainer's verbs, jsonargparse checks the values afterwards, too. But its messages list everything that it tried,
because most types are unions ("a module, or null"). This module finds the mistake first, and names one option, what is
wrong with it, and what was meant. Values of types unknown to this module are left to jsonargparse.
"""

from __future__ import annotations

import ast
import collections.abc
import dataclasses
import enum
import importlib
import inspect
import os
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from lightning_danube.terminal import name_meant, nearest_name
from lightning_danube.yaml_files import NotYaml, load_yaml

Path = tuple[str, ...]
"""Keys from the top of a configuration to a value, without `init_args`. Items of a list are numbered."""

CLASS_KEYS = ("class_path", "init_args", "dict_kwargs")
BEFORE = "options of the class before"
"""Key of options that were set for the previous class. Options that the new class also has still count."""

HOW_TO_WRITE_ONE = "docs/pretraining.md, An optimizer or a schedule of your own"
"""Where the documentation says how a user's own optimizer is written."""

_SCALARS = {str: "text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}
_LISTS = (list, tuple, set, collections.abc.Sequence, collections.abc.Iterable)
_MAPPINGS = (dict, collections.abc.Mapping, collections.abc.MutableMapping)


class Typed(str):
    """A value as it was typed on the command line. The option determines its type."""


class Refusal(ValueError):
    """A value that an option does not take.

    Args:
        path: path of the option.
        reason: what is wrong and what was meant.
        shown: the keys shown before the reason; by default the path.
        expected: what the option takes, if the reason says only that.
        value: the value that was given instead.
        goes_on: whether the reason goes on after the key, as in "model.learning_rate.peak is 0".
    """

    def __init__(
        self,
        path: Path,
        reason: str,
        *,
        shown: Path | None = None,
        expected: tuple[str, ...] = (),
        value: Any = None,
        goes_on: bool = False,
    ) -> None:
        super().__init__(reason)
        self.goes_on = goes_on
        self.path, self.reason, self.expected, self.value = path, reason, expected, value
        self.shown = path if shown is None else shown

    def __str__(self) -> str:
        return self.reason


@dataclasses.dataclass(frozen=True)
class Option:
    """An option of a class.

    Args:
        hint: type of the option, `Any` if it has none.
        default: default of the option, `inspect.Parameter.empty` if it is required.
    """

    name: str
    hint: Any
    default: Any

    @property
    def required(self) -> bool:
        return self.default is inspect.Parameter.empty


@lru_cache(maxsize=256)
def options_of(owner: type) -> tuple[dict[str, Option], bool]:
    """Returns the options of a class by name, and whether it takes others, too (`**kwargs`).

    If a constructor passes its `**kwargs` to its base class, the options of the base class are included.
    """
    return _options_of(owner.__mro__)


def _options_of(mro: Sequence[type]) -> tuple[dict[str, Option], bool]:
    place = next(place for place, one in enumerate(mro) if "__init__" in vars(one))
    owner = mro[place]
    if owner is object:
        return {}, False
    constructor = vars(owner)["__init__"]
    parameters = list(inspect.signature(constructor).parameters.values())[1:]
    hints = _hints(owner, constructor)
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    own = {
        one.name: Option(one.name, hints.get(one.name, Any), one.default) for one in parameters if one.kind not in kinds
    }
    if not any(one.kind is one.VAR_KEYWORD for one in parameters):
        return own, False
    given = _given_with_the_rest(constructor)
    if given is None:
        return own, True
    inherited, open_ended = _options_of(mro[place + 1 :])
    return own | {name: one for name, one in inherited.items() if name not in own and name not in given}, open_ended


def _hints(owner: type, constructor: Any) -> dict[str, Any]:
    try:
        return typing.get_type_hints(owner if dataclasses.is_dataclass(owner) else constructor)
    except NameError:  # a name that is imported only for the type checker
        return {}


def _given_with_the_rest(constructor: Any) -> set[str] | None:
    """Returns the names of the arguments beside `**kwargs` in `super().__init__(…, **kwargs)`, None without such a
    call."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(constructor)))
    except (OSError, SyntaxError, TypeError):
        return None
    for call in ast.walk(tree):
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "super().__init__":
            names = [keyword.arg for keyword in call.keywords]
            if None in names:
                return {name for name in names if name is not None}
    return None


def is_configured_class(hint: Any) -> bool:
    """Returns whether values of a type are described by the options of a class, rather than by a text or a number."""
    if not isinstance(hint, type) or issubclass(hint, enum.Enum):
        return False
    return hint.__module__.partition(".")[0] not in sys.stdlib_module_names


NULLS = ("", "~", "null", "Null", "NULL")
"""Texts of the command line that mean null. YAML also reads null in white space and in a comment, such as "# "."""


class Reader:
    """Checks values, and converts values typed on the command line to their types.

    Args:
        taken: option → the key of the data that states it. A model's section may not state it again.
        make: whether to make the objects that a configuration describes, instead of returning their options.
        check: whether to make the dataclasses, which check their values. Values with references are not checked.
        open_to: dataclasses of which a user may name a subclass.
    """

    def __init__(
        self,
        *,
        taken: Mapping[str, str] | None = None,
        make: bool = False,
        check: bool = False,
        open_to: Collection[type] = (),
    ) -> None:
        self.taken, self.make, self.check, self.open_to = taken or {}, make, check, open_to
        self.texts: dict[Path, str | None] = {}
        """What was read for options that take a text, also where it is null."""
        self.mappings: set[Path] = set()
        """Options that take a mapping with keys of the user's choice."""

    def options(self, owner: type, given: Mapping[str, Any], path: Path, name: str | None = None) -> dict[str, Any]:
        """Returns the options of a class with their types.

        Args:
            name: name of the class in messages.

        Raises:
            Refusal: an option is unknown, missing or of a wrong type.
        """
        known, open_ended = options_of(owner)
        name = name or owner.__name__
        taken = self.taken if path[:1] == ("model",) else {}
        read = {}
        for key, value in given.items():
            if key in taken:
                raise Refusal((*path, key), f"{key!r} is taken from {taken[key]}: leave it out here", shown=path)
            if key in known:
                read[key] = self.value(known[key].hint, value, (*path, key))
            elif open_ended:
                read[key] = value
            else:
                offered = [option for option in known if option not in taken]
                raise Refusal((*path, key), no_option(key, offered, name), shown=path)
        for option in known.values():
            if option.required and option.name not in given and option.name not in taken:
                raise Refusal(path, f"{option.name!r} is missing from {name}")
        return read

    def value(self, hint: Any, value: Any, path: Path) -> Any:
        """Returns a value, converted to the type of its option.

        Raises:
            Refusal: the option does not take it.
        """
        if isinstance(value, str) and "${" in value:
            return value  # a reference to another key
        read = self._read(hint, value, path)
        if str in (hint, *typing.get_args(hint)) and (read is None or isinstance(read, str)):
            self.texts[path] = read
        return read

    def _read(self, hint: Any, value: Any, path: Path) -> Any:
        origin = typing.get_origin(hint) or hint
        if origin in (typing.Union, types.UnionType):
            return self._union(typing.get_args(hint), value, path)
        if origin is typing.Literal:
            choices = typing.get_args(hint)
            return _as_scalar(lambda: _choice(value, choices), f"one of {', '.join(map(repr, choices))}", value, path)
        if origin in _SCALARS:
            return _as_scalar(lambda: _scalar(origin, value), _SCALARS[origin], value, path)
        if origin in _LISTS:
            return self._list(hint, value, path)
        if origin in _MAPPINGS:
            return self._mapping(hint, value, path)
        if is_configured_class(origin):
            return self._object(origin, plain_value(value), path)
        return plain_value(value)

    def _union(self, members: tuple[Any, ...], value: Any, path: Path) -> Any:
        """Returns a value as a member of a union. An error names the member that the value matches most deeply."""
        # A text of the command line is tried as a number before it is accepted as a text.
        members = tuple(sorted(members, key=lambda member: member is str)) if isinstance(value, Typed) else members
        refusals, texts = [], dict(self.texts)
        for member in members:
            try:
                return self.value(member, value, path)
            except Refusal as refusal:
                refusals.append(refusal)
                self.texts = dict(texts)
        deepest = max(len(refusal.path) for refusal in refusals)
        meant = [refusal for refusal in refusals if len(refusal.path) == deepest]
        exact = [refusal for refusal in meant if not refusal.expected]
        if exact:
            raise exact[0]
        expected = dict.fromkeys(one for refusal in meant for one in refusal.expected)
        # Messages name null last, as in "a number or null".
        raise _expected(tuple(sorted(expected, key=lambda one: one == "null")), meant[0].value, meant[0].path)

    def _list(self, hint: Any, value: Any, path: Path) -> Any:
        items = plain_value(value)
        if not isinstance(items, list | tuple):
            raise _expected(("a list",), value, path)
        inner = [one for one in typing.get_args(hint) if one is not Ellipsis]
        if typing.get_origin(hint) is tuple and len(inner) > 1 and len(inner) != len(items):
            raise _expected((f"a list of {len(inner)} values",), value, path)
        if not inner:
            return items
        hints = inner if len(inner) > 1 else inner * len(items)
        return [self.value(one, item, (*path, str(n))) for n, (one, item) in enumerate(zip(hints, items, strict=True))]

    def _mapping(self, hint: Any, value: Any, path: Path) -> Any:
        given = plain_value(value)
        if not isinstance(given, Mapping):
            raise _expected(("a mapping",), value, path)
        self.mappings.add(path)
        inner = typing.get_args(hint)
        if not inner:
            return dict(given)
        return {key: self.value(inner[1], one, (*path, str(key))) for key, one in given.items()}

    def _object(self, base: type, value: Any, path: Path) -> Any:
        """Returns the options of a class, or of a subclass that is named by its class path."""
        if isinstance(value, str):
            if os.path.isfile(value):
                return value  # a configuration file for this section only
            value = {"class_path": value}
            if "." not in value["class_path"] and class_of(value["class_path"], base, path, path) is None:
                raise self._no_such(base, value["class_path"], path)
        is_plain = dataclasses.is_dataclass(base)
        if not isinstance(value, Mapping):
            raise self._no_such(base, value, path)
        named = value.get("class_path")
        if named is None and is_plain:
            return self._made(base, self.options(base, value, path), path)
        owner = self._named_class(named, base, path)
        if owner is not None and not isinstance(owner, type):
            return value  # a function that makes an object
        if owner is None:
            option = next((key for key in value if key not in CLASS_KEYS), None)
            if option is None:
                raise no_subclass(base.__name__, named, [one.__name__ for one in descendants(base)], path)
            raise Refusal(
                (*path, option),
                f"{option!r} is an option of a class, and none is named: give --{'.'.join(path)} with a class first",
                shown=path,
            )
        options = self.class_options(owner, value, path)
        made = self._made(owner, options, path)
        return {"class_path": named, "init_args": options} if made is options else made

    def _made(self, owner: type, options: dict[str, Any], path: Path) -> Any:
        """Returns the object of a class, or its options if it is not to be made.

        Raises:
            Refusal: a dataclass refuses its options.
        """
        if not dataclasses.is_dataclass(owner):
            return owner(**options) if self.make else options
        known = options_of(owner)[0]
        if not self.make and (not self.check or "${" in str(options) or _missing(known, options)):
            return options
        try:
            return owner(**options)
        except ValueError as error:
            word, _, rest = str(error).partition(" ")
            option = word.rpartition(".")[2]
            if option in known:
                raise Refusal((*path, option), rest, goes_on=True) from error
            raise Refusal(path, str(error)) from error

    def _no_such(self, base: type, value: Any, path: Path) -> Refusal:
        """Returns the refusal of a text or a number that is given in place of an object."""
        name = base.__name__
        if not dataclasses.is_dataclass(base):
            return _expected((name,), value, path)
        kinds = self._kinds(base)
        if len(kinds) > 1:
            named = f"{' or '.join(kinds)}, or your own subclass of {name} by its class path ({HOW_TO_WRITE_ONE})"
            return Refusal(path, f"expected {named}, not {value}")
        refusal = _expected((f"a mapping of the options of {name}",), value, path)
        if isinstance(value, str | int | float) and not any(key.isdigit() for key in path):
            first = next(iter(options_of(base)[0]))
            refusal.reason += f": --{'.'.join(path)}.{first} {value} sets its {first}"
        return refusal

    def _kinds(self, base: type) -> list[str]:
        """Returns the names of a class that is open, and of its subclasses beside it."""
        package = sys.modules.get(base.__module__.rpartition(".")[0])
        offered = [getattr(package, one) for one in getattr(package, "__all__", ())] if base in self.open_to else []
        return [one.__name__ for one in offered if isinstance(one, type) and issubclass(one, base)]

    def class_options(
        self, owner: type, value: Mapping[str, Any], path: Path, name: str | None = None
    ) -> dict[str, Any]:
        """Returns the options of a class from a mapping of `class_path` and `init_args`. Arguments as for `options`."""
        known, _ = options_of(owner)
        before = {key: one for key, one in (value.get(BEFORE) or {}).items() if key in known}
        outer = {key: one for key, one in value.items() if key not in (*CLASS_KEYS, BEFORE)}
        given = plain_value(value.get("init_args")) or {}
        if not isinstance(given, Mapping):
            raise Refusal(path, f"expected a mapping of the options of {owner.__name__}, not {given}")
        return self.options(owner, {**before, **given, **outer}, path, name)

    def _named_class(self, named: Any, base: type, path: Path) -> Any:
        """Returns the class of a class path; None if there is no such class."""
        if not isinstance(named, str):
            return None
        owner = class_of(named, base, (*path, "class_path"), path)
        if isinstance(owner, type) and not issubclass(owner, base):
            way_out = f": write a subclass of {base.__name__} ({HOW_TO_WRITE_ONE})" if base in self.open_to else ""
            raise Refusal((*path, "class_path"), f"{named} is not a subclass of {base.__name__}{way_out}", shown=path)
        return owner


def _missing(known: Mapping[str, Option], given: Mapping[str, Any]) -> bool:
    return any(option.required and option.name not in given for option in known.values())


def class_of(named: str, base: type, path: Path, shown: Path) -> Any:
    """Returns the class of a class path, or the subclass of `base` with this name; None for another name.

    Raises:
        Refusal: the module cannot be imported or has no such class.
    """
    module_name, _, name = named.rpartition(".")
    if not module_name:
        package = sys.modules.get(base.__module__.rpartition(".")[0])
        beside = getattr(package, name, None)
        if isinstance(beside, type):
            return beside
        by_name: dict[str, type] = {one.__name__: one for one in descendants(base)}
        return by_name.get(name)
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise Refusal(path, f"the class {named!r} cannot be imported ({error})", shown=shown) from error
    owner: Any = getattr(module, name, None)
    if owner is None:
        raise Refusal(path, no_class(named, getattr(module, "__all__", ())), shown=shown)
    return owner


def no_subclass(base: str, named: object, known: Iterable[str], path: Path) -> Refusal:
    """Returns the refusal of a class path that is the name of no subclass."""
    near = nearest_name(named, known, least=0.5)
    hint = f"did you mean {near}?" if near else "give the whole class path"
    return Refusal((*path, "class_path"), f"there is no {base} called {named!r}: {hint}", shown=path)


def no_class(named: str, known: Iterable[str]) -> str:
    """Returns the message that a module has no class of this class path, with the one that was probably meant.

    Args:
        known: the module's public names.
    """
    module, _, name = named.rpartition(".")
    names = list(known)
    near = nearest_name(name, names, least=0.5)
    hint = f"did you mean {module}.{near}?" if near else f"there are {', '.join(names) or 'none'}"
    return f"there is no class {name!r} in {module}: {hint}"


def descendants(base: type) -> Iterator[type]:
    """Yields a class and all its imported subclasses."""
    yield base
    subclasses: list[type] = base.__subclasses__()
    for one in subclasses:
        yield from descendants(one)


def no_option(option: str, known: Collection[str], owner: str) -> str:
    """Returns the message that an option is unknown, with the option that was probably meant."""
    return f"{option!r} is not an option of {owner}: {name_meant(option, known, least=0.5)}"


def _expected(expected: tuple[str, ...], value: Any, path: Path) -> Refusal:
    shown = str(value)
    but = f", not {shown}" if len(shown) <= 60 else ""
    return Refusal(path, f"expected {' or '.join(expected)}{but}", expected=expected, value=value)


def _as_scalar(read: Callable[[], Any], expected: str, value: Any, path: Path) -> Any:
    try:
        return read()
    except (OverflowError, TypeError, ValueError):
        raise _expected((expected,), value, path) from None


def _scalar(kind: type, value: Any) -> Any:
    """Converts a value to a scalar type. Raises TypeError or ValueError if that is impossible."""
    if kind is str and isinstance(value, str):
        return str(value)
    plain = plain_value(value)
    if kind is type(None) and plain is None and (value is None or value in NULLS):
        return None
    if kind is bool and isinstance(plain, bool):
        return plain
    if plain is None or isinstance(plain, bool) or kind not in (int, float):
        raise ValueError
    number = float(plain)
    if kind is float:
        return number
    if number == int(number):
        return int(number) if isinstance(plain, str) else int(plain)
    raise ValueError


def _choice(value: Any, choices: tuple[Any, ...]) -> Any:
    if value in choices:
        return str(value) if isinstance(value, str) else value
    if (plain := plain_value(value)) in choices:
        return plain
    raise ValueError


def plain_value(value: Any) -> Any:
    """Parses a text of the command line as YAML. Returns other values unchanged."""
    if not isinstance(value, Typed):
        return value
    try:
        return load_yaml(value)
    except NotYaml:
        return str(value)
