"""Packages that only some features need: what they are, and how to install them where one is missing."""

from __future__ import annotations

import importlib
import importlib.metadata
from pathlib import Path

from lightning_danube.terminal import program

MODULES = {
    "dedup": ("rensa",),
    "evaluation": ("lm_eval",),
    "figures": ("matplotlib",),
    "gigatoken": ("gigatoken",),
    "llama-cpp": ("llama_cpp",),
    "notebooks": ("jinja2", "matplotlib", "pandas", "statsmodels"),
    "quantization": ("hqq",),
    "s3": ("s3fs",),
    "study": ("optuna", "sqlalchemy", "statsmodels"),
}
"""Extra of pyproject.toml → the modules that this project imports from it."""


def need(extra: str, purpose: str) -> None:
    """Imports the modules of an extra, so that a missing package is found before the work begins.

    Args:
        purpose: what needs them, the subject of the message.

    Raises:
        ValueError: one is not installed; with the command that installs it.
    """
    missing = missing_module(extra)
    if missing is not None:
        raise ValueError(f"{purpose} needs {missing}, which is not installed; type: {install_command(extra)}")


def missing_module(extra: str) -> str | None:
    """The first module of an extra that is not installed."""
    for module in MODULES[extra]:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            # An installed package that lacks one of its own requirements says so itself.
            if error.name != module:
                raise
            return module
    return None


def install_command(extra: str) -> str:
    """What to type to install an extra."""
    in_clone = Path("constraints.txt").is_file() and Path("lightning_danube").is_dir()
    return pip_command(f"-e '.[{extra}]'" if in_clone else f"'lightning-danube[{extra}]'")


def pip_command(requirements: str) -> str:
    """What to type to install something into this environment without another torch getting in.

    The installed torch is named at its version, without its build (+cpu): a requirement of it further down could
    otherwise replace it. The pinned versions are asked for in a clone, whose root has them.
    """
    torch = importlib.metadata.version("torch").partition("+")[0]
    pins = "-c constraints.txt " if Path("constraints.txt").is_file() else ""
    return f"{program('python')} -m pip install {pins}torch=={torch} {requirements}"
