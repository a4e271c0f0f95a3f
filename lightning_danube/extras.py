"""Packages that only some features need, and the command that installs a missing package."""

from __future__ import annotations

import importlib
import importlib.metadata
from pathlib import Path

from lightning_danube.terminal import program

MODULES = {
    "datatrove": ("datatrove",),
    "dedup": ("rensa",),
    "evaluation": ("lm_eval",),
    "figures": ("matplotlib",),
    "float8": ("torchao",),
    "gigatoken": ("gigatoken",),
    "llama-cpp": ("llama_cpp",),
    "mlflow": ("mlflow", "alembic", "sqlalchemy"),
    "notebooks": ("jinja2", "matplotlib", "pandas", "statsmodels"),
    "quantization": ("hqq",),
    "ray": ("ray",),
    "s3": ("s3fs",),
    "study": ("optuna", "sqlalchemy", "statsmodels"),
    "wandb": ("wandb",),
}
"""Extra of pyproject.toml → the modules that this project imports from it."""


def need(extra: str, purpose: str) -> None:
    """Imports the modules of an extra, so that a missing package is found before the work begins.

    Args:
        purpose: the feature that needs the modules; it is the subject of the message.

    Raises:
        ValueError: a module is not installed; the message has the command that installs it.
    """
    missing = missing_module(extra)
    if missing is not None:
        raise ValueError(f"{purpose} needs {missing}, which is not installed; type: {install_command(extra)}")


def missing_module(extra: str) -> str | None:
    """Returns the first module of an extra that is not installed; None if all are installed."""
    for module in MODULES[extra]:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            # If an installed package lacks one of its own requirements, its own error says so.
            if error.name != module:
                raise
            return module
    return None


def install_command(extra: str) -> str:
    """Returns the command that installs an extra."""
    in_clone = Path("constraints.txt").is_file() and Path("lightning_danube").is_dir()
    return pip_command(f"-e '.[{extra}]'" if in_clone else f"'lightning-danube[{extra}]'")


def pip_command(requirements: str) -> str:
    """Returns the pip command that installs requirements into this environment and keeps the installed torch.

    The command pins the installed torch version, without its build (+cpu): an indirect requirement could otherwise
    replace torch. In a clone, the command also uses the pinned versions of constraints.txt.
    """
    torch = importlib.metadata.version("torch").partition("+")[0]
    pins = "-c constraints.txt " if Path("constraints.txt").is_file() else ""
    return f"{program('python')} -m pip install {pins}torch=={torch} {requirements}"
