"""Training from Python: `fit` as on the command line, and access to the files of a run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_danube.checkpoints.runs import newest_whole_checkpoint, read_saved_config, versions_of
from lightning_danube.files import read_json
from lightning_danube.signals import SIGNALS, Stopped

if TYPE_CHECKING:
    from lightning_danube.generation.language_model import LanguageModel


class Run:
    """The files of a run in its directory.

    Args:
        path: `<runs>/<name>/version_<n>`, or `<runs>/<name>` for its newest version.

    Raises:
        ValueError: there is no such run.
    """

    def __init__(self, path: str | Path) -> None:
        directory = Path(path).expanduser()
        versions = versions_of(directory)
        self.directory = versions[0] if versions else directory
        if not (self.directory / "config.yaml").is_file():
            raise ValueError(f"{path} is not a run: it holds no config.yaml and no version_<n>")

    def __repr__(self) -> str:
        return f"Run({str(self.directory)!r})"

    @cached_property
    def summary(self) -> dict[str, Any]:
        """Returns `summary.json`: metrics by name, with what they were measured on.

        Raises:
            ValueError: the run wrote none, because it was stopped before its first validation.
        """
        file = self.directory / "summary.json"
        if not file.is_file():
            raise ValueError(f"{file} does not exist: the run was stopped before its first validation")
        return read_json(file)

    @cached_property
    def config(self) -> dict[str, Any]:
        """Returns the config that the run was trained with.

        Raises:
            ValueError: the config cannot be read.
        """
        config = read_saved_config(self.directory / "config.yaml")
        if config is None:
            raise ValueError(f"{self.directory / 'config.yaml'} cannot be read")
        return config

    @property
    def checkpoint(self) -> Path:
        """Returns the newest complete checkpoint.

        Raises:
            ValueError: there is no complete checkpoint.
        """
        checkpoint, _ = newest_whole_checkpoint(self.directory)
        return checkpoint

    def load(self) -> LanguageModel:
        """Returns the trained model, to generate text with.

        Raises:
            ValueError: the run has no complete checkpoint.
        """
        from lightning_danube.generation.language_model import load

        return load(str(self.directory))


def fit(config: str, **overrides: Any) -> Run:
    """Trains as `fit --config <config>` does, and returns the run.

    `danube.fit("quickstart", name="more-web", trainer={"max_steps": 100}, data={"seed": 1})`

    Args:
        config: a config's name or file.
        overrides: options that override the config's. The sections `data`, `model` and `trainer` are mappings of
            options.

    Raises:
        ValueError: a user's mistake, with the message of the command line.
        KeyboardInterrupt: the run was stopped, and saved if it had begun.
    """
    from lightning_danube.cli.trainer_verbs import run_verb
    from lightning_danube.training.position import logged_directory

    arguments = ["fit", "--config", config, *(f"--{key}={value}" for key, value in _options(overrides))]
    try:
        with SIGNALS.listening(own_process=False):
            cli = run_verb(arguments)
    except Stopped as stop:
        raise KeyboardInterrupt(stop.message) from None
    return Run(logged_directory(cli.trainer))


def _options(overrides: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yields options of the command line: a mapping's keys one by one, with their values as JSON."""
    for section, given in overrides.items():
        inner = given.items() if section in ("data", "model", "trainer") and isinstance(given, Mapping) else None
        if inner is None:
            yield section, _written(given)
            continue
        prefix = section if section == "trainer" else f"{section}.init_args"
        for key, value in inner:
            yield (f"{section}.class_path" if key == "class_path" else f"{prefix}.{key}"), _written(value)


def _written(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
