"""Runs a function on several ranks that are forked from this process, which has imported what they need."""

import os
import socket
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from lightning.fabric.utilities.rank_zero import rank_zero_only


def on_ranks(work: Callable[[int], int | None], ranks: int = 2, *, group: bool = True) -> None:
    """Calls the function with the number of each rank, in a separate process that has one thread.

    Args:
        group: makes the process group. Without it, a trainer does.

    Raises:
        AssertionError: a rank has failed. Its traceback is on stderr.
    """
    assert codes_of(work, ranks, group=group) == [0] * ranks


def codes_of(work: Callable[[int], int | None], ranks: int, *, group: bool = False) -> list[int]:
    """Does the same, and returns the exit code of each rank: what the function returned, or 1 for an exception."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    children = [_start(work, rank, ranks, port, group) for rank in range(ranks)]
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def _start(work: Callable[[int], int | None], rank: int, ranks: int, port: int, group: bool) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        torch.set_num_threads(1)
        if ranks > 1 or group:
            place = {"LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            os.environ.update({name: str(value) for name, value in place.items()})
            # Decided at the import, when this process was not yet a rank.
            rank_zero_only.rank = rank  # type: ignore[attr-defined]
        if group:
            dist.init_process_group("gloo", rank=rank, world_size=ranks, timeout=timedelta(minutes=5))
        code = work(rank) or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
