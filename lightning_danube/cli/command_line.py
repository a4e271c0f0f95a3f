"""Finds the mistakes in a command line that show without the classes it configures, and reports them at once.

Importing PyTorch and Lightning takes seconds, and most typing errors need neither of them to be found.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import get_close_matches
from itertools import pairwise

from lightning_danube.cli.configs import LINKED
from lightning_danube.cli.errors import TOP_LEVEL, place_of_key
from lightning_danube.yaml_files import config_file, read_config

FACTS_OF_DATA = {
    "vocab_size": "data.tokenizer",
    "context_length": "data.context_length",
    "max_position_embeddings": "data.context_length",
    "batch_tokens": "data.batch_tokens",
    "total_tokens": "data.stages",
}
"""Options of a model that are facts of the data, and the key that states each. A config gives them nowhere else."""

PRECISIONS = (
    *("32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true"),
    *("64-true", "32", "16", "bf16", "64", "transformer-engine", "transformer-engine-float16", "null"),
)
"""Lightning's names of precisions, the usual ones first."""

# Of single verbs, and of the parser itself.
_OTHER_FLAGS = ("verbose", "return_predictions", "print_config", "help", "print_shtab")


def check_command_line(args: Sequence[str]) -> None:
    """
    Args:
        args: of a verb that takes a configuration, without the verb.

    Raises:
        ValueError: a configuration is missing or no YAML mapping, a section is unknown, or a fact of the data is stated
            for the model.
    """
    if args and not args[0].startswith("-"):
        raise ValueError(f"{args[0]!r} is no option: a configuration is given by --config {args[0]}")
    args = with_config_paths(args)
    for file in config_files(args):
        for key in read_config(file):
            if key not in (*TOP_LEVEL, *_OTHER_FLAGS):
                raise ValueError(
                    f"{place_of_key(str(key), [file])}{key!r} is not an option of this command: {_meant(str(key))}"
                )
    for arg in args:
        match = re.match(r"--([A-Za-z]\w*)", arg)
        if match and match[1] not in (*TOP_LEVEL, *_OTHER_FLAGS):
            close = get_close_matches(match[1], TOP_LEVEL, n=1)
            hint = f": did you mean --{close[0]}?" if close else ", see --help"
            raise ValueError(f"{arg.partition('=')[0]} is not an option of this command{hint}")
    _check_facts_of_data(args)
    _check_precision(args)


def _meant(key: str) -> str:
    close = get_close_matches(key, TOP_LEVEL, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"there are {', '.join(TOP_LEVEL)}"


def config_files(args: Sequence[str]) -> list[str]:
    """Files that a command line names by --config or -c."""
    files = [value for flag, value in pairwise(args) if flag in ("--config", "-c")]
    return files + [arg.partition("=")[2] for arg in args if arg.startswith("--config=")]


def with_config_paths(args: Sequence[str]) -> list[str]:
    """A command line where each config is the path of its file: those of the package are given by name.

    Raises:
        ValueError: there is neither a file nor a name like that.
    """
    found = list(args)
    for place, arg in enumerate(args):
        if arg in ("--config", "-c") and place + 1 < len(args):
            found[place + 1] = config_file(args[place + 1])
        elif arg.startswith("--config="):
            found[place] = f"--config={config_file(arg.partition('=')[2])}"
    return found


def _check_precision(args: Sequence[str]) -> None:
    """Refuses what is no precision. The parser of the trainer would list the parts of a union of types."""
    stated = [
        (f"{place_of_key('precision', [file])}trainer.precision", trainer.get("precision"))
        for file in config_files(args)
        if isinstance(trainer := read_config(file).get("trainer"), dict)
    ]
    flag = "--trainer.precision"
    stated += [(flag, value) for name, value in pairwise(args) if name == flag]
    stated += [(flag, arg.partition("=")[2]) for arg in args if arg.startswith(f"{flag}=")]
    for where, value in stated:
        refers = str(value).startswith("${")  # to another key
        if value is not None and not refers and str(value) not in PRECISIONS:
            raise ValueError(f"{where} is {value}: choose one of {', '.join(PRECISIONS[:5])}, or null for the fastest")


def _check_facts_of_data(args: Sequence[str]) -> None:
    """Refuses a fact of the data that is stated again for the model: the link would override it without a word."""
    for file in config_files(args):
        config = read_config(file)
        model = config.get("model")
        init_args = model.get("init_args") if isinstance(model, dict) else None
        for fact in LINKED:
            if isinstance(init_args, dict) and fact in init_args:
                raise ValueError(
                    f"{file}: model.init_args.{fact} is taken from {FACTS_OF_DATA[fact]}: leave it out here"
                )
    for arg in args:
        match = re.match(r"--model\.(?:init_args\.)?(\w+)", arg)
        if match and match[1] in LINKED:
            raise ValueError(f"{arg.partition('=')[0]} is taken from {FACTS_OF_DATA[match[1]]}: set that instead")
