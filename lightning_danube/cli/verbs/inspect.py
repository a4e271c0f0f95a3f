"""`inspect`: shows a configuration's data as the model will see it: tokens, what is learned, what is left out.

It needs the tokenizer and the data, and neither weights nor a GPU. Nothing is trained.
"""

from __future__ import annotations

import os
import shutil
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

from lightning_danube.cli.verbs.configuration import add_configuration


def add_arguments(parser: ArgumentParser) -> None:
    add_configuration(parser)
    parser.add_argument(
        "--examples", type=int, default=2, metavar="N", help="examples of each source that are shown as tokens (2)"
    )
    parser.add_argument(
        "--rows",
        type=int,
        default=1000,
        metavar="N",
        help="rows of each source that are read (1000); 0 reads all rows",
    )
    parser.add_argument("--html", metavar="FILE", help="also write a page for the browser, with longer examples")


def run(arguments: Namespace) -> None:
    for option in ("examples", "rows"):
        if getattr(arguments, option) < 0:
            raise ValueError(f"--{option} is {getattr(arguments, option)}: give 0 or more")

    from lightning_danube.cli.configs import configured_data

    data = configured_data("inspect", arguments.config, arguments.overrides)
    from lightning_danube.inspection.lines import LEGEND, Style, lines_of, wants_colour
    from lightning_danube.inspection.shown import ShownSource, ShowsSources, nothing_seen

    if not isinstance(data, ShowsSources):
        raise ValueError(f"data is {type(data).__name__}, which has no method shown_sources: it cannot be inspected")
    style, width = Style(wants_colour(sys.stdout)), shutil.get_terminal_size((100, 24)).columns
    found: list[ShownSource] = []
    for shown in data.shown_sources(arguments.examples, arguments.rows or sys.maxsize):
        if not found:
            _say(style(LEGEND, "edge"))
        found.append(shown)
        if not _say("\n" + "\n".join(lines_of(shown, width, style))) and not arguments.html:
            return
    empty = [shown for shown in found if shown.is_empty]
    if empty:
        named = ", ".join(shown.name for shown in empty)
        _say("\n" + style(f"✗ {nothing_seen(empty[0])}: {named}", "warning"))
    if arguments.html:
        from lightning_danube.files import write_text
        from lightning_danube.inspection.page import page_of_sources

        title = f"Data of {' + '.join(arguments.config)}"
        write_text(Path(arguments.html), page_of_sources(title, found))
        _say(f"\nwritten: {arguments.html}")


def _say(text: str) -> bool:
    """Prints a text. Returns False if nobody reads it any more, as after `| head`; later texts then go nowhere."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return False
    return True
