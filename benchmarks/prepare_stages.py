"""CPU seconds of each stage of `prepare`, by the own engine and by datatrove, and what they mean for 4T and 6T tokens.

    python benchmarks/prepare_stages.py --texts FOLDER [--documents 40000]

`FOLDER` holds files that `prepare` reads. The stages that read and write texts are measured on them, with rules and
without benchmarks. Three in ten documents are copies of an earlier one, so every unit is written a second time. The
stages that compare documents are measured on random sketches of `--documents` documents, of which as many are copies.
Every stage runs in one process. Memory is what `tracemalloc` counts.

The extrapolation is linear in tokens and in documents, with `TOKENS_A_DOCUMENT` tokens a document.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from machine import described, write_result

from lightning_danube.text.corpora import Source, documents_and_bad_rows
from lightning_danube.text.duplicates import drop_exact, drop_near
from lightning_danube.text.quality import BANDS, PERMUTATIONS, Deduplicate, Filters, Quality
from lightning_danube.text.reading import Document
from lightning_danube.tokens.engines.datatrove_engine import _executor, _quietly, _run_rank, _stages
from lightning_danube.tokens.engines.source_work import Cluster, SourceWork
from lightning_danube.tokens.preparation import Preparation
from lightning_danube.tokens.shards import ShardFacts, TokenShards
from lightning_danube.tokens.tokenizer import DocumentTokenizer
from lightning_danube.tokens.units import make_unit

TOKENS_A_DOCUMENT = 700
DOLLARS_A_CORE_HOUR = 0.04
COPIES = 0.3
FILES = 4
SKETCHED = ("own, exact", "own, near", "datatrove, buckets", "datatrove, clusters")
"""Stages that compare documents."""
GROWING = ("datatrove, buckets", "datatrove, clusters")
"""Stages whose memory grows with the documents. The own engine has buffers of fixed size, and a byte a document."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", required=True)
    parser.add_argument("--documents", type=int, default=40_000)
    arguments = parser.parse_args()
    tokenizer = DocumentTokenizer()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = with_copies(Source(arguments.texts), folder)
        seconds: dict[str, float] = {}
        for deduplicate in ("none", "near"):
            facts = facts_of(source, tokenizer, deduplicate, folder / f"own-{deduplicate}")
            made, read, tokens, _ = own_stages(facts)
            seconds |= {f"own, {stage}, {deduplicate}": one for stage, one in made.items()}
        trove, documents, between = trove_stages(facts_of(source, tokenizer, "near", folder / "trove"))
        seconds |= {f"datatrove, {stage}, near": trove[stage] for stage in ("read", "write")}
        sketched = {stage: in_own_process(stage, folder / "compared", arguments.documents) for stage in SKETCHED}
    lines = [
        described("datatrove", "tokenizers", "pyarrow"),
        f"{documents:,} documents, {read:,} tokens, of which {tokens:,} stay; {arguments.documents:,} random sketches",
        "",
        "| stage | CPU s | for each |",
        "|---|---|---|",
    ]
    for stage, one in seconds.items():
        lines.append(f"| {stage} | {one:.2f} | {1e6 * one / read:.3f} µs a token that is read |")
    for stage, (one, size) in sketched.items():
        memory = f" and {size / arguments.documents:,.0f} bytes of memory" if stage in GROWING else ""
        lines.append(f"| {stage} | {one:.2f} | {1e6 * one / arguments.documents:,.2f} µs{memory} a document |")
    lines.append(
        f"| datatrove, disk between stages | | {(between - 2 * read) / documents:,.0f} bytes a document, and its ids |"
    )
    lines.append("")
    a_token = {stage: one / read for stage, one in seconds.items()}
    a_document = {
        stage: (one / arguments.documents, size / arguments.documents if stage in GROWING else 1)
        for stage, (one, size) in sketched.items()
    }
    # Ids apart: their number differs from that of the extrapolation.
    lines += extrapolated(a_token, a_document, (between - 2 * read) / documents)
    write_result("prepare-stages", "\n".join(lines))


def with_copies(source: Source, folder: Path) -> Source:
    """Returns a source of four files with the texts, and copies of an earlier one, `COPIES` of all."""
    random = np.random.default_rng(0)
    texts: list[str] = []
    for row in documents_and_bad_rows("texts", source, folder):
        if isinstance(row, Document):
            while texts and random.random() < COPIES:
                texts.append(texts[random.integers(len(texts))])
            texts.append(row.text)
    (folder / "texts").mkdir()
    for number, part in enumerate(np.array_split(np.arange(len(texts)), FILES)):
        lines = (json.dumps({"text": texts[place]}) + "\n" for place in part)
        (folder / "texts" / f"{number}.jsonl").write_text("".join(lines))
    return Source(str(folder / "texts"))


def facts_of(source: Source, tokenizer: DocumentTokenizer, deduplicate: Deduplicate, cache: Path) -> ShardFacts:
    return ShardFacts("texts", source, tokenizer, 0.001, Quality(deduplicate, Filters(min_words=5)), cache)


def cpu_seconds(do: Callable[[], Any]) -> float:
    began = time.process_time()
    do()
    return time.process_time() - began


def own_stages(facts: ShardFacts) -> tuple[dict[str, float], int, int, int]:
    """Returns stage → CPU seconds, and the tokens that were read and kept. The join also writes units a second time."""
    directory = facts.directory("own")
    preparation = Preparation(directory, facts)
    preparation.open(None)
    work = list(preparation.work(lambda: None))  # type: ignore[arg-type, return-value]
    made = [0]

    def read() -> None:
        made.extend(make_unit(preparation.job, number, rows)[1] for number, rows, _ in work)

    seconds = {"read": cpu_seconds(read)}
    assert not preparation.missing()
    seconds["join and write"] = cpu_seconds(preparation.join)
    shards = TokenShards(directory, facts.tokenizer)
    seconds["verify"] = cpu_seconds(shards.verify)
    counts = shards.meta["counts"]
    return seconds, sum(made), counts["tokens"], counts["documents"]


def trove_stages(facts: ShardFacts) -> tuple[dict[str, float], int, int]:
    """Returns stage → CPU seconds, the documents before duplicates are dropped, and the most bytes on disk beside the
    shards."""
    directory = facts.directory("datatrove")
    building = directory.with_name(f".{directory.name}.datatrove")
    work = SourceWork.begin(directory, building, facts, benchmarks=None, tasks=None)
    (building / "tasks").mkdir()
    seconds, most = {}, 0
    with _quietly():
        stages = _stages(work, facts.quality)
    for stage in stages:
        with _quietly():
            executor = _executor(work, stage, Cluster(workers=1))

        def run(executor: Any = executor, tasks: int = stage.tasks) -> None:
            for rank in range(tasks):
                _run_rank(executor, rank)

        seconds[stage.name] = cpu_seconds(run)
        folders = ("units", "between")
        files = [file for one in folders for file in (building / one).rglob("*.*") if "counts" not in file.name]
        most = max(most, sum(file.stat().st_size for file in files))
    counts = TokenShards(directory, facts.tokenizer).meta["counts"]
    return seconds, counts["documents"] + sum(counts["duplicates"].values()), most


def random_sketches(documents: int) -> np.ndarray[Any, Any]:
    random = np.random.default_rng(0)
    drawn = random.integers(0, 1 << 32, (documents, PERMUTATIONS), dtype=np.uint32)
    copies = random.random(documents) < COPIES
    copies[0] = False
    firsts = np.flatnonzero(~copies)
    drawn[copies] = drawn[random.choice(firsts, copies.sum())]
    return drawn


def in_own_process(stage: str, folder: Path, documents: int) -> tuple[float, int]:
    """Returns CPU seconds and bytes of memory of a stage that compares documents, each measured in a process."""
    folder.mkdir(exist_ok=True)
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        seconds, _ = pool.apply(compared, (stage, folder, documents, False))
    with context.Pool(1) as pool:
        return seconds, pool.apply(compared, (stage, folder, documents, True))[1]


def compared(stage: str, folder: Path, documents: int, traced: bool) -> tuple[float, int]:
    drawn = random_sketches(documents)
    parts = np.array_split(drawn, FILES)
    keep = np.ones(documents, dtype=bool)
    hashes = drawn[:, :2].copy().view(np.uint64)[:, 0]
    do = {
        "own, exact": lambda: drop_exact(keep, iter(np.array_split(hashes, FILES)), folder),
        "own, near": lambda: drop_near(keep, lambda: iter(parts), folder),
        "datatrove, buckets": lambda: _buckets(folder),
        "datatrove, clusters": lambda: _clusters(folder),
    }[stage]
    if stage == "datatrove, buckets":
        _write_sketches(parts, folder)
    if traced:
        tracemalloc.start()
    with _quietly():
        seconds = cpu_seconds(do)
    return seconds, tracemalloc.get_traced_memory()[1] if traced else 0


def _write_sketches(parts: list[np.ndarray[Any, Any]], folder: Path) -> None:
    for number, part in enumerate(parts):
        for band, own in enumerate(np.split(part, BANDS, axis=1)):
            order = np.lexsort(own.T[::-1])
            path = folder / "sketches" / f"bucket_{band:03d}" / f"{number:05d}.minhash.sig"
            path.parent.mkdir(parents=True, exist_ok=True)
            np.column_stack([own[order], order.astype(np.uint32)]).astype("<u4").tofile(path)


def _buckets(folder: Path) -> None:
    from datatrove.pipeline.dedup.minhash import MinhashDedupBuckets

    for band in range(BANDS):
        step = MinhashDedupBuckets(f"{folder}/sketches", f"{folder}/pairs", config=_minhash(), lines_to_buffer=1000)
        step.run(None, band, BANDS)


def _clusters(folder: Path) -> None:
    from datatrove.pipeline.dedup.minhash import MinhashDedupCluster

    MinhashDedupCluster(f"{folder}/pairs", f"{folder}/removed", config=_minhash(), lines_to_buffer=1000).run()


def _minhash() -> Any:
    from datatrove.pipeline.dedup.minhash import MinhashConfig
    from datatrove.utils.hashing import HashConfig

    return MinhashConfig(num_buckets=BANDS, hashes_per_bucket=PERMUTATIONS // BANDS, hash_config=HashConfig(32))


def extrapolated(a_token: dict[str, float], a_document: dict[str, tuple[float, float]], between: float) -> list[str]:
    """Returns the table. An id has 2 bytes. A document has 28 bytes in a unit, and 512 of a sketch.

    Args:
        a_token: stage → CPU seconds a token.
        a_document: stage → CPU seconds and bytes of memory a document.
        between: bytes a document on disk between datatrove's stages, without its ids.
    """
    lines = [
        "Core hours = (tokens × µs a token + documents × µs a document) / 3600 s. "
        f"A document has {TOKENS_A_DOCUMENT} tokens. A core hour costs {DOLLARS_A_CORE_HOUR} dollars.",
        "",
        "| tokens read | engine | core hours | dollars | hours in one process | memory of that process | most disk |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, total in (("4T", 4e12), ("6T", 6e12)):
        documents = total / TOKENS_A_DOCUMENT
        units, kept = 2 * total + 28 * documents, 2 * total * (1 - COPIES)
        rows = {
            "own, `none`": (["own, read, none", "own, join and write, none", "own, verify, none"], [], units),
            "own, `near`": (
                ["own, read, near", "own, join and write, near", "own, verify, near"],
                ["own, near"],
                units + (512 + 16) * documents + kept,
            ),
            "datatrove, `near`": (
                ["datatrove, read, near", "datatrove, write, near"],
                ["datatrove, buckets", "datatrove, clusters"],
                2 * total + between * documents + kept,
            ),
        }
        for engine, (by_token, by_document, disk) in rows.items():
            hours = sum(a_token[stage] for stage in by_token) * total / 3600
            hours += sum(a_document[stage][0] for stage in by_document) * documents / 3600
            alone = a_document[by_document[-1]] if by_document else (0.0, 0.0)
            lines.append(
                f"| {name} | {engine} | {hours:,.0f} | {hours * DOLLARS_A_CORE_HOUR:,.0f} "
                f"| {alone[0] * documents / 3600:,.0f} | {alone[1] * documents / 1e9:,.0f} GB | {disk / 1e12:.0f} TB |"
            )
    return lines


if __name__ == "__main__":
    multiprocessing.freeze_support()
    main()
