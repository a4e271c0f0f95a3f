"""Runs command lines in turn, each by so many ranks: `python -m tests.forked_ranks '[[2, ["fit", …]], [1, …]]'`.

The ranks are forked from a process that has imported what they need and done nothing else, so that a test of several
sessions pays for the imports once. They are told who they are as torchrun tells its own. Ends with the first exit code
that is not 0.
"""

import json
import sys

import lightning_danube.callbacks  # noqa: F401  (for the forks)
from lightning_danube.__main__ import main
from lightning_danube.cli import trainer_verbs as cli  # noqa: F401
from tests.ranks import codes_of


def run(ranks: int, args: list[str]) -> int:
    if ranks > 1:
        args = [*args, "--trainer.devices", str(ranks)]
        if "--trainer.strategy" not in args:
            args += ["--trainer.strategy", "ddp"]
    return next((code for code in codes_of(lambda rank: main(args), ranks) if code), 0)


if __name__ == "__main__":
    for ranks, args in json.loads(sys.argv[1]):
        if code := run(ranks, args):
            sys.exit(code)
