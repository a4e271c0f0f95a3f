"""Puts a SLURM job whose run has failed back into the queue, as long as its run makes progress."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from lightning_danube.checkpoints.runs import newest_checkpoint, versions_of
from lightning_danube.files import append_line, parse_json, read_regular
from lightning_danube.signals import USR1, ask_slurm, requeue_slurm_job, slurm_job

MOST_FAILURES = 10
"""How many times a job goes back into the queue after a failure. Other requeues do not count."""

_USER_MISTAKE = 2
"""Exit code of a rank that prints one line: a mistake, or a vain wait for another rank."""


def requeue_after_failure(directory: Path, code: int, errors: str) -> str:
    """Requeues this process's SLURM job, without the node on which a rank has failed. Returns a message for the user.

    Each failure is a line of `failures_<job>.jsonl` beside the run's versions.

    Args:
        directory: `<runs>/<name>`.
        code: exit code of srun.
        errors: what srun has written to stderr.

    Raises:
        ValueError: the job stays out of the queue, and why.
        OSError: the failure cannot be written down.
    """
    job = slurm_job()
    if job is None:
        raise ValueError("requeue is for the batch script of a SLURM job, and SLURM_JOB_ID names none")
    if USR1 is not None and code == 128 + USR1:
        return requeue_slurm_job()  # the job's time is nearly over, and a rank had not begun to listen
    state = _word("JobState", ask_slurm("scontrol", "show", "--oneliner", "job", job))
    if state != "RUNNING":
        raise ValueError(f"SLURM job {job} is left alone: SLURM has ended it, and says {state}")
    record = directory / f"failures_{job}.jsonl"
    failures = _lines(record)
    newest = _newest(directory)
    # SLURM may fail to start the ranks after a node has died. That says nothing about the run.
    began = re.search(r"^srun: error: Unable to create step", errors, re.MULTILINE) is None
    stays = _why_it_stays(directory, failures, newest, began)
    node = failed_node(errors)
    append_line(
        record,
        json.dumps(
            {
                "time": datetime.now().astimezone().isoformat(timespec="seconds"),
                "code": code,
                "node": node,
                "checkpoint": str(newest) if newest else None,
            }
        ),
    )
    if stays is not None:
        raise ValueError(f"SLURM job {job} is not requeued: {stays}")
    said = requeue_slurm_job()
    if not said.endswith(" requeued"):
        raise ValueError(said)
    without = f"; {_exclude(job, node)}" if node else ""
    return f"{said} after failure {len(failures) + 1} of at most {MOST_FAILURES}{without}"


def failed_node(errors: str) -> str | None:
    """Returns the node of the first rank that has failed, by the lines of srun; None if no single node is to blame.

    A rank that ends with one line has met a mistake, or has waited in vain for a rank of another node.
    """
    first = re.search(r"^srun: error: (\S+): tasks? [\d,-]+: (.*)$", errors, re.MULTILINE)
    if first is None or "[" in first[1] or first[2] == f"Exited with exit code {_USER_MISTAKE}":
        return None
    return first[1]


def _why_it_stays(directory: Path, failures: list[dict[str, Any]], newest: Path | None, began: bool) -> str | None:
    if len(failures) >= MOST_FAILURES:
        return f"it has failed {len(failures) + 1} times"
    if not began:
        return None
    if newest is None:
        return f"its run has no checkpoint under {directory} yet"
    starts = _lines(newest.parent.parent / "history.jsonl")
    if str(newest) in [line.get("checkpoint") for line in (*failures[-1:], *starts[-1:])]:
        return f"its run has made no progress since {newest}"
    return None


def _exclude(job: str, node: str) -> str:
    """Keeps a node out of the job's next start, if the partition has enough others. Returns a message for the user.

    SLURM takes the list of a waiting job only, so the job is in the queue already.
    """
    shown = ask_slurm("scontrol", "show", "--oneliner", "job", job)
    known, number = _word("ExcNodeList", shown), _word("NumNodes", shown)
    excluded = node if known in ("", "(null)") else f"{known},{node}"
    states = "idle,alloc,mixed,completing"
    partition = ["--partition", _word("Partition", shown), "--states", states]
    there = set(ask_slurm("sinfo", "--noheader", "--Node", "--format", "%N", *partition).split())
    left = there - set(ask_slurm("scontrol", "show", "hostnames", excluded).split())
    if len(left) < int(number.partition("-")[0]):
        return f"{node} has failed, and stays: the partition has no other node for it"
    try:
        ask_slurm("scontrol", "update", f"JobId={job}", f"ExcNodeList={excluded}")
    except ValueError as error:
        return f"{node} has failed, and SLURM does not leave it out: {error}"
    return f"{node} has failed, and is left out from now on"


def _newest(directory: Path) -> Path | None:
    """Returns the checkpoint from which `--ckpt_path last` resumes."""
    return next(filter(None, map(newest_checkpoint, versions_of(directory))), None)


def _lines(path: Path) -> list[dict[str, Any]]:
    """Returns the rows of a file. A line that is not a row, such as half a line after a power cut, is left out: it
    must not cost the job its place in the queue."""
    rows = []
    for line in read_regular(path).splitlines() if path.exists() else ():
        with suppress(ValueError):
            row = parse_json(line, str(path))
            if isinstance(row, dict):
                rows.append(row)
    return rows


def _word(key: str, shown: str) -> str:
    found = re.search(rf"\b{key}=(\S*)", shown)
    return found[1] if found else ""
