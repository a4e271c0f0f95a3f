"""The options of verbs that read a configuration as `fit` does."""

from __future__ import annotations

from argparse import ArgumentParser


def add_configuration(parser: ArgumentParser) -> None:
    """Adds `--config`. All arguments that are not options of the verb override the configuration, as in `fit`."""
    parser.add_argument(
        "--config",
        action="append",
        required=True,
        metavar="NAME",
        help="the configuration that `fit` takes: a name or a file",
    )
    parser.set_defaults(overrides=[])
