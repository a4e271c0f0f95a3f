"""Reads the names and options of this package's classes from their source, without importing it.

Importing PyTorch and Lightning takes seconds. A misspelled class or option, or a text where an option takes a number,
can be found before. Whatever is not plain here is accepted: `cli.options` reads all values again with the imported
classes.
"""

from __future__ import annotations

import ast
import builtins
import collections.abc
import dataclasses
import functools
import importlib
import importlib.util
import os
import re
import sys
import typing
from collections.abc import Mapping
from pathlib import Path as FilePath
from typing import Any

import lightning_danube
from lightning_danube.cli.options import Path, Reader, Refusal, descendants, no_class, no_subclass
from lightning_danube.terminal import name_meant, nearest_name

ROOT = FilePath(lightning_danube.__file__).parent
CHECKED = {
    "ConversationSource": "lightning_danube.chat.conversations",
    "DecoderShape": "lightning_danube.model.config",
    "Filters": "lightning_danube.text.quality",
    "LearningRate": "lightning_danube.training.optim.schedule",
    "Lora": "lightning_danube.weights.lora",
    "PreferenceSource": "lightning_danube.chat.preferences",
    "RopeScaling": "lightning_danube.model.config",
    "Source": "lightning_danube.text.corpora",
    "Stage": "lightning_danube.pretraining.curriculum",
}
"""Dataclass that checks its values, and whose module imports nothing large → its module."""

OPEN = ("AdamW",)
"""Names of the dataclasses of which a configuration may name a subclass, as `cli.configs.open_classes` has them."""

BASES = {"data": "LightningDataModule", "model": "LightningModule", "callbacks": "Callback", "logger": "Logger"}
"""Section → Lightning's class of which the section names a subclass."""

_BUILTINS = ("bool", "dict", "float", "int", "list", "str", "tuple")


@dataclasses.dataclass(frozen=True)
class WrittenClass:
    """A class of this package, as it is written.

    Args:
        module: path of the file.
    """

    module: FilePath
    node: ast.ClassDef

    @property
    def is_dataclass(self) -> bool:
        return any(ast.unparse(one).partition("(")[0].endswith("dataclass") for one in self.node.decorator_list)


class SourceReader(Reader):
    """Checks values against classes as `class_as_written` gives them. Classes of other packages are accepted."""

    def _object(self, base: type, value: Any, path: Path) -> Any:
        named = value.get("class_path") if isinstance(value, Mapping) else value
        if isinstance(value, Mapping) and named is None:
            return super()._object(base, value, path)
        if not isinstance(named, str) or os.path.isfile(named):
            return value
        if "." not in named and named not in self._kinds(base) and named != base.__name__:
            if isinstance(value, Mapping):
                raise no_subclass(base.__name__, named, self._kinds(base) or [base.__name__], path)
            raise self._no_such(base, named, path)
        self.named_class(named, value, path)
        return value

    def _kinds(self, base: type) -> list[str]:
        source = _SOURCES.get(base)
        if source is None or base.__name__ not in OPEN:
            return []
        package = source.module.with_name("__init__.py")
        return [name for name in _public(package) if source.node in _ancestors(_defined(package, name))]

    def named_class(self, named: str, section: Any, path: Path) -> None:
        """Checks a class path, and the options that a section gives to the class.

        Raises:
            Refusal: this package has no such class, or the class does not take an option.
        """
        module, _, name = named.rpartition(".")
        if module.partition(".")[0] == ROOT.name:
            file = _file(module)
            if file is None:
                siblings = [f"{module.rpartition('.')[0]}.{one}" for one in _modules(module.rpartition(".")[0])]
                reason = f"there is no module {module}: {name_meant(module, siblings)}"
                raise Refusal((*path, "class_path"), reason, shown=path)
            if not re.search(rf"\b{re.escape(name)}\b", file.read_text(encoding="utf-8")):
                raise Refusal((*path, "class_path"), no_class(named, _public(file)), shown=path)
        written = class_as_written(named)
        if written is not None and isinstance(section, Mapping):
            self.class_options(written, section, path)

    def short_name(self, named: str, section: Any, path: Path) -> None:
        """Checks the name of a class without its module, as in `--trainer.callbacks+=Progress`, and its options.

        Raises:
            Refusal: it is nearly the name of a class that the section takes, or the class does not take an option.
        """
        kind = path[min(1, len(path) - 1)]
        if kind == "callbacks" and (class_path := callback_of(named)) is not None:
            self.named_class(class_path, section, path)
            return
        known = _classes_of(BASES[kind])
        lightning: Any = sys.modules.get("lightning.pytorch")
        if lightning is not None:  # a program that has imported it may have classes of its own
            base = getattr(lightning if kind != "logger" else lightning.loggers, BASES[kind])
            known = {one.__name__: one.__name__ for one in descendants(base)} | known
        near = nearest_name(named, known)
        if near is not None and near != named:
            reason = f"there is no {BASES[kind]} called {named!r}: did you mean {known[near]}?"
            raise Refusal((*path, "class_path"), reason, shown=path)

    def _made(self, owner: type, options: dict[str, Any], path: Path) -> Any:
        if owner.__name__ in CHECKED:
            checking = getattr(importlib.import_module(CHECKED[owner.__name__]), owner.__name__)
            Reader(check=True)._made(checking, options, path)
        return super()._made(owner, options, path)


def callback_of(named: str) -> str | None:
    """Returns the class path of a callback of this project that is named without its module; None for other names."""
    return f"{ROOT.name}.callbacks.{named}" if named in _public(ROOT / "callbacks" / "__init__.py") else None


def class_as_written(class_path: str) -> type | None:
    """Returns a class with the name and the constructor's options of a class of this package.

    Options have their types if the types are plain: numbers, texts, lists and mappings of them, dataclasses of this
    package. Other options have the type `Any`. None is required, because some verbs read only the section of the data.

    Returns:
        None for a class that is not in this package, or whose options are not all in it.
    """
    module, _, name = class_path.rpartition(".")
    found = _defined(_file(module), name)
    return None if not isinstance(found, WrittenClass) else _made(found, required=False)


@functools.cache
def _made(source: WrittenClass, *, required: bool) -> type | None:
    options = _options(source)
    if options is None:
        return None
    known, open_ended = options
    if open_ended:
        return None
    fields = [
        (name, hint, dataclasses.field() if required and not has_default else dataclasses.field(default=None))
        for name, (hint, has_default) in known.items()
    ]
    made = dataclasses.make_dataclass(source.node.name, fields, kw_only=True)
    # dataclasses names a module of Python itself, and the reader takes classes from there as they are.
    made.__module__ = __name__
    _SOURCES[made] = source
    return made


_SOURCES: dict[type, WrittenClass] = {}
"""Class that `_made` has made → where it is written."""


_Options = tuple[dict[str, tuple[Any, bool]], bool]
"""Name of an option → its type, and whether it has a default. Then whether others are taken, too."""


def _options(source: WrittenClass) -> _Options | None:
    """Returns the options of a class, None if they are those of a class outside this package."""
    if source.is_dataclass:
        inherited = _options_of_bases(source)
        fields = {
            one.target.id: (_type(one.annotation, source.module), one.value is not None)
            for one in source.node.body
            if isinstance(one, ast.AnnAssign)
            and isinstance(one.target, ast.Name)
            and "ClassVar" not in ast.unparse(one.annotation)
        }
        return None if inherited is None else (inherited[0] | fields, inherited[1])
    constructor = next(
        (one for one in source.node.body if isinstance(one, ast.FunctionDef) and one.name == "__init__"), None
    )
    if constructor is None:
        return _options_of_bases(source)
    listed = constructor.args
    places = [*listed.posonlyargs, *listed.args][1:]
    optional = {one.arg for one in places[len(places) - len(listed.defaults) :]}
    optional |= {one.arg for one, default in zip(listed.kwonlyargs, listed.kw_defaults, strict=True) if default}
    own = {
        one.arg: (_type(one.annotation, source.module), one.arg in optional) for one in [*places, *listed.kwonlyargs]
    }
    if listed.kwarg is None:
        return own, False
    for call in ast.walk(constructor):
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "super().__init__":
            given = [one.arg for one in call.keywords]
            inherited = _options_of_bases(source)
            if None in given and inherited is not None:
                rest = {name: one for name, one in inherited[0].items() if name not in own and name not in given}
                return own | rest, inherited[1]
    return own, True


def _options_of_bases(source: WrittenClass) -> _Options | None:
    if not source.node.bases:
        return {}, False
    if source.is_dataclass and len(source.node.bases) > 1:
        return None
    base = source.node.bases[0]
    found = _defined(source.module, base.id) if isinstance(base, ast.Name) else None
    return _options(found) if isinstance(found, WrittenClass) else None


# --- names ------------------------------------------------------------------------------------------------------------


@functools.cache
def _public(module: FilePath) -> list[str]:
    """Returns the names in `__all__` of a module."""
    listed = [one.value for one in _statements(module) if isinstance(one, ast.Assign) and _is_all(one)]
    return [str(name) for value in listed for name in ast.literal_eval(value)]


def _is_all(statement: ast.Assign) -> bool:
    return ast.unparse(statement.targets[0]) == "__all__"


def _modules(package: str) -> list[str]:
    """Returns the names of the modules and packages in a package of this project."""
    file = _file(package)
    return [] if file is None else sorted(one.stem for one in file.parent.iterdir() if not one.name.startswith("_"))


def _ancestors(found: Any) -> list[Any]:
    """Returns the definitions of a class and of its bases, and the dotted names of the bases outside this package."""
    if not isinstance(found, WrittenClass):
        return [found]
    bases = [_defined(found.module, base.id) for base in found.node.bases if isinstance(base, ast.Name)]
    return [found.node, *(one for base in bases for one in _ancestors(base))]


def _classes_of(base: str) -> dict[str, str]:
    """Returns the subclasses of a class of Lightning, in this package and in Lightning: name → how to name it."""
    if base in ("Callback", "Logger"):
        known = list(_public(ROOT / "callbacks" / "__init__.py")) if base == "Callback" else []
        spec = importlib.util.find_spec("lightning")
        for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
            known += _public(FilePath(folder, "pytorch", f"{base.lower()}s", "__init__.py"))
        return {name: name for name in known}
    return {
        name: f"{ROOT.name}.{package.parent.name}.{name}"
        for package in sorted(ROOT.glob("*/__init__.py"))
        for name in _public(package)
        if f"lightning.pytorch.{base}" in _ancestors(_defined(package, name))
    }


def _file(module: str) -> FilePath | None:
    package, _, inner = module.partition(".")
    if package != ROOT.name:
        return None
    return _beside(ROOT / "__init__.py", inner) if inner else ROOT / "__init__.py"


def _beside(module: FilePath, name: str) -> FilePath | None:
    path = module.parent.joinpath(*name.split("."))
    return next((one for one in (path.with_suffix(".py"), path / "__init__.py") if one.is_file()), None)


@functools.cache
def _statements(module: FilePath) -> list[ast.stmt]:
    """Returns the statements of a module, and those that only a type checker runs."""
    body = ast.parse(module.read_text(encoding="utf-8")).body
    checked = [one for one in body if isinstance(one, ast.If) and ast.unparse(one.test) == "TYPE_CHECKING"]
    return [*body, *(inner for one in checked for inner in one.body)]


def _defined(module: FilePath | None, name: str) -> WrittenClass | tuple[FilePath, ast.expr] | str | None:
    """Finds what a name stands for in a module.

    Returns:
        A class of this package; the file and expression of another name; the dotted name of something outside this
        package; None if the name is not found.
    """
    if module is None:
        return None
    for one in _statements(module):
        if isinstance(one, ast.ClassDef) and one.name == name:
            return WrittenClass(module, one)
        if isinstance(one, ast.Assign) and ast.unparse(one.targets[0]) == name:
            return module, one.value
        if isinstance(one, ast.ImportFrom) and one.module:
            imported = [alias.name for alias in one.names if (alias.asname or alias.name) == name]
            if imported:
                inner = _beside(module, one.module) if one.level == 1 else _file(one.module)
                return f"{one.module}.{imported[0]}" if inner is None else _defined(inner, imported[0])
    return name if name in _BUILTINS else None


# --- types ------------------------------------------------------------------------------------------------------------


def _type(node: ast.expr | None, module: FilePath) -> Any:
    """Returns the type that an annotation stands for, `Any` if it is not plain."""
    if isinstance(node, ast.Constant) and node.value is None:
        return type(None)
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return _type(ast.parse(node.value, mode="eval").body, module)
    if isinstance(node, ast.Name):
        return _type_named(node.id, module)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        left, right = _type(node.left, module), _type(node.right, module)
        return Any if Any in (left, right) else left | right
    if isinstance(node, ast.Subscript):
        outer = _type(node.value, module)
        inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        if outer is typing.Literal:
            choices = [one.value for one in inner if isinstance(one, ast.Constant)]
            return typing.Literal[tuple(choices)] if len(choices) == len(inner) else Any
        if outer in (list, dict, collections.abc.Sequence, collections.abc.Mapping):
            return outer[tuple(_type(one, module) for one in inner)]
    return Any


def _type_named(name: str, module: FilePath) -> Any:
    found = _defined(module, name)
    if isinstance(found, WrittenClass):
        return (_made(found, required=True) if found.is_dataclass else None) or Any
    if isinstance(found, tuple):
        return _type(found[1], found[0])
    if found in _BUILTINS:
        return getattr(builtins, found)
    outside = {"typing.Literal": typing.Literal}
    outside |= {f"collections.abc.{one}": getattr(collections.abc, one) for one in ("Sequence", "Mapping")}
    return outside.get(found or "", Any)
