"""Types the commands of a page, as a reader would, and keeps what they print.

    python docs/making/typed.py docs/first-hour.md --clone ~/fresh-clone --blocks 4-9
    python docs/making/fill.py

A block is a code block without a language, outside of filled blocks; the first has number 1. Each block is one call of
bash in the clone, with the programs of its `.venv`. results/typed/<page>.txt keeps, for each block, the commands, what
they printed, the seconds that they took, the commit of the clone and the machine. A block that is typed again takes the
place of its older record. A block that fails is not kept.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from docs.making.pages import FENCE, read  # noqa: E402

RECORDS = "benchmarks/results/typed"
FOLDER = ROOT / RECORDS
HEAD = re.compile(r"^=== block (?P<number>\d+), (?P<seconds>\d+) s, (?P<where>.*)$", re.MULTILINE)
RULE = "--- printed ---"
FILLED = re.compile(r"^<!-- fill .*?^<!-- /fill -->$", re.MULTILINE | re.DOTALL)
NOT_PRINTED = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|^.*\r(?!\n)", re.MULTILINE)
"""Colours, and what a program writes over on its line."""


@dataclass(frozen=True)
class Record:
    """What one block printed, and where."""

    number: int
    commands: str
    printed: str
    seconds: int
    where: str


def blocks(page: str) -> list[str]:
    """Returns the blocks of commands of a page, in order."""
    text = FILLED.sub("", read(page))
    return [block[2] for block in FENCE.finditer(text) if block[1] == ""]


def file_of(page: str) -> Path:
    return FOLDER / f"{Path(page).stem}.txt"


def records(file: Path) -> dict[int, Record]:
    """Returns number → record of a kept file."""
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    found = {}
    heads = list(HEAD.finditer(text))
    ends = [*(head.start() for head in heads), len(text)][1:]
    for head, end in zip(heads, ends, strict=False):
        body = text[head.end() + 1 : end]
        commands, _, printed = body.partition(f"\n{RULE}\n")
        printed = printed.strip("\n")
        number = int(head["number"])
        found[number] = Record(number, commands, printed, int(head["seconds"]), head["where"])
    return found


def written(found: dict[int, Record]) -> str:
    """Returns the text of a file of records."""
    parts = []
    for number, record in sorted(found.items()):
        parts.append(
            f"=== block {number}, {record.seconds} s, {record.where}\n{record.commands}\n{RULE}\n{record.printed}\n"
        )
    return "\n".join(parts)


def type_block(number: int, commands: str, clone: Path) -> Record:
    """Runs a block in a clone.

    Raises:
        ValueError: a command failed, or its output names the clone's place on this machine.
    """
    from machine import described

    path = f"{clone / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}"
    # The package of the clone counts, also if .venv is that of another clone.
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(clone)}
    began = time.monotonic()
    done = subprocess.run(
        ["bash", "-e", "-o", "pipefail", "-c", commands],
        cwd=clone,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    seconds = round(time.monotonic() - began)
    printed = NOT_PRINTED.sub("", done.stdout.decode()).strip("\n")
    if done.returncode:
        raise ValueError(f"block {number} ended with exit code {done.returncode}:\n{commands}\n{printed}")
    if str(clone) in printed:
        raise ValueError(f"block {number} printed {clone}, which no page should hold:\n{printed}")
    commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=clone, text=True).strip()
    # Records that this program has just written into the clone change nothing of what the clone prints.
    if subprocess.check_output(["git", "status", "--porcelain", "-uno", "--", ".", f":!{RECORDS}"], cwd=clone):
        commit += " with changes"
    day, _, machine = described("torch").split(", ", 2)
    return Record(number, commands.strip("\n"), printed, seconds, f"{day}, commit {commit}, {machine}")


def numbers(text: str) -> list[int]:
    """Returns the numbers of "2,4-6"."""
    ends = [part.partition("-") for part in text.split(",")]
    return [n for first, _, last in ends for n in range(int(first), int(last or first) + 1)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", help="such as docs/first-hour.md")
    parser.add_argument("--clone", type=Path, help="where to type; without it the blocks are only listed")
    parser.add_argument("--blocks", type=numbers, help="numbers of blocks, such as 2,4-6 (default: all)")
    arguments = parser.parse_args()
    shown = dict(enumerate(blocks(arguments.page), start=1))
    for number in arguments.blocks or shown:
        if arguments.clone is None:
            print(f"=== block {number}\n{shown[number]}")
            continue
        record = type_block(number, shown[number], arguments.clone.resolve())
        file = file_of(arguments.page)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(written(records(file) | {number: record}), encoding="utf-8")
        print(f"=== block {number}, {record.seconds} s\n{record.printed}", flush=True)


if __name__ == "__main__":
    main()
