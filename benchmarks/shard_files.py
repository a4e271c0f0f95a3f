"""What larger shard files would gain and cost: a source of 10^12 tokens in many files or in few.

    python benchmarks/shard_files.py DIRECTORY [--keep]

Writes sparse files of 2 TB in all, which take no disk, and reads rows at random places of them. Then it writes half a
gigabyte of ids, and measures what a join takes that links files, and one that copies and hashes their bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from lightning_danube.terminal import show
from lightning_danube.tokens.finished_shards import FORMAT
from lightning_danube.tokens.shards import BATCH_TOKENS, TokenShards, write_token_counts
from lightning_danube.tokens.tokenizer import DocumentTokenizer
from lightning_danube.training.history import processor

TOKENS = 10**12
ROWS, CONTEXT = 2000, 8192
KEPT = Path(__file__).resolve().parent / "results" / "shard-files.md"


def write_sparse_shards(directory: Path, files: dict[str, int], tokens: int, batch: int = BATCH_TOKENS) -> Path:
    """Writes shards of so many files for each split, of so many tokens each, which lie in batches. All ids are 0."""
    directory.mkdir(parents=True)
    splits: dict[str, Any] = {}
    segments = [[1024 + 2 * at, min(batch, tokens - at)] for at in range(0, tokens, batch)]
    for split, count in files.items():
        listed = []
        for number in range(count):
            name, size = f"{split}-{number:05d}.arrow", 1024 + 2 * tokens
            (directory / name).touch()
            os.truncate(directory / name, size)
            listed.append({"name": name, "bytes": size, "sha256": "0", "tokens": tokens, "segments": segments})
        counts = write_token_counts(directory, split, np.array([tokens * count]))
        splits[split] = {"documents": count, "tokens": tokens * count, "token_counts": counts, "files": listed}
    tokenizer = DocumentTokenizer("danube-small").identity()
    meta = {"format": FORMAT, "dtype": "uint16", "tokenizer": tokenizer, "splits": splits}
    (directory / "shards.json").write_text(json.dumps(meta))
    return directory


def read(directory: Path) -> dict[str, float]:
    """Opens the shards in this process, and reads rows at random places."""
    tokenizer = DocumentTokenizer("danube-small")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.process_time()
    shards = TokenShards(directory, tokenizer)
    shards.check_sizes()
    stream = shards.tokens("train")
    opened = time.process_time() - began
    places = np.random.default_rng(0).integers(len(stream) - CONTEXT, size=ROWS).tolist()
    began = time.process_time()
    for place in places:
        assert len(stream.read(place, place + CONTEXT)) == CONTEXT
    return {
        "open": opened,
        "row": (time.process_time() - began) / ROWS,
        "mib": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024,
    }


def join(directory: Path, links: int) -> tuple[float, float]:
    """Returns the CPU seconds of so many links, and those in which a gigabyte is copied and hashed."""
    directory.mkdir()
    ids = np.random.default_rng(0).integers(32000, size=250_000_000, dtype=np.uint16)
    unit = directory / "unit"
    ids.tofile(unit)
    began = time.process_time()
    for number in range(links):
        os.link(unit, directory / f"{number:05d}")
    linked = time.process_time() - began
    began = time.process_time()
    digest = hashlib.sha256()
    with unit.open("rb") as source, (directory / "joined").open("wb") as target:
        while block := source.read(1 << 24):
            digest.update(block)
            target.write(block)
        os.fsync(target.fileno())
    return linked, (time.process_time() - began) / (unit.stat().st_size / 1e9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="takes half a gigabyte twice, and is removed at the end")
    parser.add_argument("--keep", action="store_true", help=f"write {KEPT.name}")
    parser.add_argument("--read", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.read:
        print(json.dumps(read(arguments.directory)))
        return
    lines = [
        "| files | GB a file | MB of shards.json | CPU s to open | MiB | CPU µs a row |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    try:
        for files in (4096, 256, 128):
            directory = arguments.directory / str(files)
            write_sparse_shards(directory, {"train": files, "validation": 1}, TOKENS // files)
            command = [sys.executable, __file__, str(directory), "--read"]
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            listing = (directory / "shards.json").stat().st_size / 1e6
            lines.append(
                f"| {files:,} | {2 * TOKENS / files / 1e9:.1f} | {listing:.1f} | {found['open']:.2f} | "
                f"{found['mib']:.0f} | {1e6 * found['row']:.0f} |"
            )
        linked, copied = join(arguments.directory / "join", 2 * 4096)
    finally:
        shutil.rmtree(arguments.directory, ignore_errors=True)
    lines += [
        "",
        f"8,192 links: {linked:.2f} CPU s. Copying and hashing: {copied:.2f} CPU s a GB, which are "
        f"{copied * 2 * TOKENS / 1e9 / 3600:.1f} h of a core for 2 TB (estimated from 0.5 GB, without waits for the "
        "disk).",
    ]
    text = "\n".join(lines)
    show(text)
    if arguments.keep:
        about = f"`python benchmarks/shard_files.py DIRECTORY --keep`, {ROWS:,} rows of {CONTEXT:,} ids, {processor()}."
        KEPT.write_text(f"{about}\n\n{text}\n")


if __name__ == "__main__":
    main()
