"""CPU seconds of each stage of `prepare`, by the own engine and by datatrove, and what they mean for 4T and 6T tokens.

    python benchmarks/prepare_stages.py --texts FOLDER [--documents 300000]

`FOLDER` holds files that `prepare` reads. The stages that read and write texts are measured on them, with rules,
without benchmarks, and with `deduplicate: near`. The stages that compare documents are measured on random sketches of
`--documents` documents, of which three in ten are copies of an earlier one. Everything runs in one process.
The own engine is measured without its search for duplicates.

The extrapolation is linear in tokens and in documents, with `TOKENS_A_DOCUMENT` tokens a document.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from machine import described, write_result

from lightning_danube.text.corpora import Source
from lightning_danube.text.quality import BANDS, PERMUTATIONS, Filters, Quality
from lightning_danube.tokens.engines.datatrove_engine import _executor, _quietly, _run_rank, _stages
from lightning_danube.tokens.engines.source_work import Cluster, SourceWork
from lightning_danube.tokens.preparation import Preparation
from lightning_danube.tokens.tokenizer import DocumentTokenizer
from lightning_danube.tokens.units import make_unit

TOKENS_A_DOCUMENT = 700
DOLLARS_A_CORE_HOUR = 0.04
COPIES = 0.3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", required=True)
    parser.add_argument("--documents", type=int, default=300_000)
    arguments = parser.parse_args()
    source, tokenizer = Source(arguments.texts), DocumentTokenizer()
    with tempfile.TemporaryDirectory() as folder:
        own = own_stages(Path(folder) / "own", source, tokenizer)
        trove, tokens, documents, left = trove_stages(Path(folder) / "trove", source, tokenizer)
        compared = compared_stages(Path(folder) / "compared", arguments.documents)
    lines = [
        described("datatrove", "tokenizers", "pyarrow"),
        f"{documents:,} documents, {tokens:,} tokens; {arguments.documents:,} random sketches; one process",
        "",
        "| stage | CPU s | for each |",
        "|---|---|---|",
    ]
    a_token = {f"own, {name}": seconds for name, seconds in own.items()}
    a_token |= {f"datatrove, {name}": trove[name] for name in ("read", "write")}
    for name, seconds in a_token.items():
        lines.append(f"| {name} | {seconds:.2f} | {tokens / seconds:,.0f} tokens a CPU s |")
    for name, (seconds, size) in compared.items():
        memory = f", {size / arguments.documents:,.0f} bytes of memory a document" if size else ""
        lines.append(f"| {name} | {seconds:.2f} | {1e6 * seconds / arguments.documents:,.2f} µs a document{memory} |")
    lines += [f"| disk between stages, datatrove | | {left / documents:,.0f} bytes a document |", ""]
    write_result(
        "prepare-stages",
        "\n".join(lines + extrapolated(a_token, compared, arguments.documents, tokens, left / documents)),
    )


def cpu_seconds(do: Callable[[], Any]) -> float:
    began = time.process_time()
    do()
    return time.process_time() - began


def own_stages(folder: Path, source: Source, tokenizer: DocumentTokenizer) -> dict[str, float]:
    quality = Quality(deduplicate="none", filters=Filters(min_words=5))
    folder.mkdir()
    options: dict[str, Any] = {"held_out": 0.001, "quality": quality, "cache_dir": folder}
    preparation = Preparation(folder / "texts", "texts", source, tokenizer, **options)
    preparation.job = replace(preparation.job, near=True)  # with sketches, as in datatrove's
    preparation.open(None)
    work = list(preparation.work(lambda: None))  # type: ignore[arg-type, return-value]
    read = cpu_seconds(lambda: [make_unit(preparation.job, number, rows) for number, rows, _ in work])
    preparation.units = preparation.used = len(work)
    return {"read": read, "join without duplicates": cpu_seconds(preparation.join)}


def trove_stages(folder: Path, source: Source, tokenizer: DocumentTokenizer) -> tuple[dict[str, float], int, int, int]:
    """Returns stage → CPU seconds, tokens, documents, and the most bytes on disk beside the shards."""
    quality = Quality(deduplicate="near", filters=Filters(min_words=5))
    options: dict[str, Any] = {"held_out": 0.001, "quality": quality, "cache_dir": folder}
    building = folder / ".texts.datatrove"
    work = SourceWork.begin(
        folder / "texts", building, "texts", source, tokenizer, benchmarks=None, tasks=None, **options
    )
    (building / "tasks").mkdir()
    seconds, most = {}, 0
    with _quietly():
        stages = _stages(work, quality)
    for stage in stages:
        with _quietly():
            executor = _executor(work, stage, Cluster(workers=1))
        began = time.process_time()
        for rank in range(stage.tasks):
            _run_rank(executor, rank)
        seconds[stage.name] = time.process_time() - began
        folders = ("units", "between")
        most = max(most, sum(file.stat().st_size for one in folders for file in (building / one).rglob("*.*")))
    counts = json.loads((folder / "texts" / "shards.json").read_text())["counts"]
    made = counts["documents"] + counts["duplicates"]["near"]
    return seconds, counts["tokens"], made, most


def random_sketches(documents: int) -> np.ndarray[Any, Any]:
    random = np.random.default_rng(0)
    drawn = random.integers(0, 1 << 32, (documents, PERMUTATIONS), dtype=np.uint32)
    copies = random.random(documents) < COPIES
    copies[0] = False
    firsts = np.flatnonzero(~copies)
    drawn[copies] = drawn[random.choice(firsts, copies.sum())]
    return drawn


def compared_stages(folder: Path, documents: int) -> dict[str, tuple[float, int]]:
    """Returns stage → CPU seconds and bytes of memory. Each stage has a process of its own."""
    context = multiprocessing.get_context("spawn")
    found = {}
    for name in ("datatrove, buckets", "datatrove, clusters"):
        with context.Pool(1) as pool:
            found[name] = pool.apply(compared, (name, str(folder), documents))
    shutil.rmtree(folder)
    return found


def compared(name: str, folder: str, documents: int) -> tuple[float, int]:
    from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupBuckets, MinhashDedupCluster
    from datatrove.utils.hashing import HashConfig

    config = MinhashConfig(num_buckets=BANDS, hashes_per_bucket=PERMUTATIONS // BANDS, hash_config=HashConfig(32))
    drawn = random_sketches(documents)
    files = 4
    if name == "datatrove, buckets":
        for band, values in enumerate(np.split(drawn, BANDS, axis=1)):
            for number, own in enumerate(np.array_split(values, files)):
                order = np.lexsort(own.T[::-1])
                path = Path(folder, "sketches", f"bucket_{band:03d}", f"{number:05d}.minhash.sig")
                path.parent.mkdir(parents=True, exist_ok=True)
                np.column_stack([own[order], order.astype(np.uint32)]).astype("<u4").tofile(path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.process_time()
    with _quietly():
        if name == "datatrove, buckets":
            for band in range(BANDS):
                step = MinhashDedupBuckets(f"{folder}/sketches", f"{folder}/pairs", config=config, lines_to_buffer=1000)
                step.run(None, band, BANDS)
        else:
            MinhashDedupCluster(f"{folder}/pairs", f"{folder}/removed", config=config, lines_to_buffer=1000).run()
    seconds = time.process_time() - began
    more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return seconds, 0 if name == "datatrove, buckets" else more << 10


def extrapolated(
    a_token: dict[str, float], compared: dict[str, tuple[float, int]], sketched: int, tokens: int, left: float
) -> list[str]:
    lines = [
        "Core hours = (tokens × CPU s a token + documents × CPU s a document) / 3600, with "
        f"{TOKENS_A_DOCUMENT} tokens a document. A core hour costs {DOLLARS_A_CORE_HOUR} dollars.",
        "",
        "| tokens | engine | core hours | dollars | of them in one process | its memory | disk beside the texts |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, total in (("4T", 4e12), ("6T", 6e12)):
        documents = total / TOKENS_A_DOCUMENT
        shards = 2 * total + 4 * documents
        for engine in ("own", "datatrove"):
            hours = {key: seconds / tokens * total / 3600 for key, seconds in a_token.items() if key.startswith(engine)}
            memory, disk, alone = "", 2 * total + shards, hours.get("own, join without duplicates", 0.0)
            if engine == "datatrove":
                hours |= {key: one / sketched * documents / 3600 for key, (one, _) in compared.items()}
                alone = hours["datatrove, clusters"]
                memory = f"{compared['datatrove, clusters'][1] / sketched * documents / 1e12:.1f} TB"
                disk = documents * left + shards
            every = sum(hours.values())
            lines.append(
                f"| {name} | {engine} | {every:,.0f} | {every * DOLLARS_A_CORE_HOUR:,.0f} | {alone:,.1f} | {memory} "
                f"| {disk / 1e12:.1f} TB |"
            )
    return lines


if __name__ == "__main__":
    multiprocessing.freeze_support()
    main()
