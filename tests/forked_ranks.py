"""Runs command lines in turn, each by so many ranks: `python -m tests.forked_ranks '[[2, ["fit", …]], [1, …]]'`.

The ranks are forked from a process that has imported what they need and done nothing else, so that a test of several
sessions pays for the imports once. They are told who they are as torchrun tells its own. Ends with the first exit code
that is not 0.
"""

import json
import os
import socket
import sys
import traceback

from lightning.fabric.utilities.rank_zero import rank_zero_only

import lightning_danube.callbacks  # noqa: F401  (for the forks)
from lightning_danube.__main__ import main
from lightning_danube.cli import trainer_verbs as cli  # noqa: F401


def start(rank: int, ranks: int, port: int, args: list[str]) -> int:
    """Process id of a rank."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        if ranks > 1:
            place = {"LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            os.environ.update({name: str(value) for name, value in place.items()})
            # Decided at the import, when this process was not yet a rank.
            rank_zero_only.rank = rank  # type: ignore[attr-defined]
            args = [*args, "--trainer.devices", str(ranks)]
            if "--trainer.strategy" not in args:
                args += ["--trainer.strategy", "ddp"]
        code = main(args)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run(ranks: int, args: list[str]) -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    children = [start(rank, ranks, port, args) for rank in range(ranks)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    return next((code for code in codes if code), 0)


if __name__ == "__main__":
    for ranks, args in json.loads(sys.argv[1]):
        if code := run(ranks, args):
            sys.exit(code)
