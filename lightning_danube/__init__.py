"""The H2O-Danube3 recipe as a PyTorch Lightning laboratory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazy_attributes(package: str, modules: Mapping[str, str]) -> Callable[[str], Any]:
    """Returns a `__getattr__` for a package (PEP 562) that imports a public name when it is first used.

    The rooms use it because torch, Lightning and transformers take seconds to import.

    Args:
        package: dotted name of the package.
        modules: public name → the package's module that defines it.
    """

    def __getattr__(name: str) -> Any:
        if name in modules:
            return getattr(import_module(f"{package}.{modules[name]}"), name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return __getattr__
