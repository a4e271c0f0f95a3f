"""Makers of the reference pages: the options of the verbs, the configurations, the tags of TensorBoard."""

from __future__ import annotations

import argparse
import importlib
import re
from pathlib import Path
from typing import Any

from docs.making.results import markdown
from lightning_danube.cli.verbs import COMMANDS
from lightning_danube.reports.tags import TAGS
from lightning_danube.yaml_files import config_file, config_names, description

MAKERS = ("verbs", "configurations", "tags")


class _Recorder(argparse.ArgumentParser):
    """A parser that remembers its options, in order."""

    def __init__(self) -> None:
        super().__init__(add_help=False, allow_abbrev=False)
        self.options: list[argparse.Action] = []

    def add_argument(self, *names: Any, **settings: Any) -> argparse.Action:
        option = super().add_argument(*names, **settings)
        self.options.append(option)
        return option


def _in_cell(text: str) -> str:
    """Returns a text as it can stand in a cell of a table."""
    return " ".join(text.replace("%%", "%").split()).replace("|", "\\|").replace("<", "&lt;")


def _shown(option: argparse.Action) -> list[str]:
    """Returns the cells of an option: its name with its value, and what it does."""
    value = option.metavar or ("|".join(map(str, option.choices)) if option.choices else "")
    if not value and option.nargs != 0:
        value = option.dest.upper()
    name = option.option_strings[-1] if option.option_strings else ""
    form = " ".join(filter(None, [name, str(value)]))
    return [f"`{form}`".replace("|", "\\|"), _in_cell(option.help or "")]


def verbs() -> str:
    """Returns a section for each verb of this project, with a table of its options."""
    parts = []
    for verb in COMMANDS:
        module = importlib.import_module(f"lightning_danube.cli.verbs.{verb}")
        parser = _Recorder()
        module.add_arguments(parser)
        text = " ".join((module.__doc__ or "").split()).removeprefix(f"`{verb}`: ")
        rows = [_shown(option) for option in parser.options]
        parts += [
            f"### `{verb}`",
            "",
            _in_cell(text[0].upper() + text[1:]),
            "",
            markdown(["option", "meaning"], rows),
            "",
        ]
    return "\n".join(parts)


def configurations() -> str:
    """Returns the configurations of the package, with what each is for."""
    rows = []
    for name in config_names():
        text = Path(config_file(name)).read_text(encoding="utf-8")
        found = re.search(r"lightning-danube (\w+) ", text)
        rows.append([f"`{found[1] if found else 'fit'} --config {name}`", _in_cell(description(name))])
    return markdown(["command", "what it is for"], rows)


def tags() -> str:
    """Returns the tags that a pre-training run logs to TensorBoard."""
    rows = []
    for name, tag in TAGS.items():
        shown = f"{name}<…>" if name.endswith(("/", "_")) else name
        rows.append([f"`{shown}`", _in_cell(tag.meaning), f"`{tag.callback}`" if tag.callback else "the task"])
    return markdown(["tag", "meaning", "logged by"], rows)
