"""`configs`: lists the configurations that come with the package; `configs copy NAME` writes one for editing."""

from __future__ import annotations

import re
from argparse import ArgumentParser, Namespace
from pathlib import Path

from lightning_danube.terminal import as_typed, quoted, runnable, show
from lightning_danube.yaml_files import config_file, config_names, description


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("action", nargs="?", choices=["copy"], help="write a configuration to a file")
    parser.add_argument("name", nargs="?", metavar="NAME", help="the configuration, such as sft/quickstart")
    parser.add_argument("file", nargs="?", metavar="FILE", help="where to write it (sft-quickstart.yaml)")


def run(arguments: Namespace) -> None:
    if arguments.action is None:
        names = config_names()
        width = max(map(len, names))
        show("\n".join(f"{name:<{width}}  {description(name)}" for name in names))
        return
    if arguments.name is None:
        raise ValueError(f"which configuration? For example: {as_typed()} configs copy quickstart")
    text = Path(config_file(arguments.name)).read_text("utf-8")
    file = Path(arguments.file or f"{arguments.name.replace('/', '-')}.yaml")
    try:
        with file.open("x", encoding="utf-8") as copy:
            copy.write(text)
    except FileExistsError:
        raise ValueError(
            f"{file} exists and is left as it is: name another file, as in configs copy {arguments.name} mine.yaml"
        ) from None
    show(f"written: {file}; edit it, then: {runnable()} {_verb(text)} --config {quoted(file)}")


def _verb(text: str) -> str:
    """Returns the verb of the first command in a configuration's comment."""
    found = re.search(r"lightning-danube (\w+) ", text)
    return found[1] if found else "fit"
