"""Compares the documents that two engines of `prepare` keep with `deduplicate: near`, and explains each difference.

    python -m lightning_danube prepare --config near.yaml --data.init_args.cache_dir own
    python -m lightning_danube prepare --config near.yaml --data.init_args.cache_dir trove --engine datatrove
    python benchmarks/kept_documents.py --config near.yaml --own own --datatrove trove

Reads the texts again, applies the rules, and compares the sketches of the documents that only one engine keeps with
those of all others. Each such document gets the first cause that holds.
"""

from __future__ import annotations

import argparse
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np

from lightning_danube.pretraining.data import CurriculumData
from lightning_danube.text.corpora import documents_and_bad_rows
from lightning_danube.text.quality import BANDS, NEAR, Benchmarks, sketches
from lightning_danube.text.reading import Document
from lightning_danube.tokens.encoding import TextEncoder, can_encode_in_parts
from lightning_danube.tokens.shards import SPLITS, TokenShards
from lightning_danube.tokens.tokenizer import DocumentTokenizer
from lightning_danube.yaml_files import load_yaml


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True)
    parser.add_argument("--own", required=True, type=Path, help="cache directory of the own engine's shards")
    parser.add_argument("--datatrove", required=True, type=Path, help="cache directory of datatrove's shards")
    arguments = parser.parse_args()
    options = load_yaml(Path(arguments.config).read_text(encoding="utf-8"))["data"]["init_args"]
    data = CurriculumData(**options)
    benchmarks = Benchmarks.read(data.quality.decontaminate) if data.quality.decontaminate else None
    for name in data.sources:
        kept = [kept_documents(data, name, cache) for cache in (arguments.own, arguments.datatrove)]
        compare(name, texts_of(data, name, arguments.own, benchmarks), *kept, data.tokenizer)


def kept_documents(data: CurriculumData, name: str, cache: Path) -> Counter[bytes]:
    """Returns the ids of each document in the shards of a source → how often it is there."""
    directory = replace(data.shard_facts(name), cache_dir=cache).directory()
    shards = TokenShards(directory, data.tokenizer)
    found: Counter[bytes] = Counter()
    for split in SPLITS:
        stream = shards.tokens(split)
        ids = np.array(stream.read(0, len(stream)))
        ends = np.flatnonzero(ids == data.tokenizer.eos_id) + 1
        found.update(document.tobytes() for document in np.split(ids, ends)[:-1])
    return found


def texts_of(data: CurriculumData, name: str, cache: Path, benchmarks: Benchmarks | None) -> list[str]:
    """Returns the texts of a source that rules and benchmarks let pass, each text once, in order."""
    source = data.sources[name]
    rules = data.quality.filters if source.filters else None
    found: dict[str, None] = {}
    for row in documents_and_bad_rows(name, source, cache):
        if not isinstance(row, Document) or (rules is not None and rules.against(row.text)):
            continue
        if benchmarks is None or not benchmarks.found_in(row.text):
            found[row.text] = None
    return list(found)


def compare(
    name: str, texts: list[str], own: Counter[bytes], trove: Counter[bytes], tokenizer: DocumentTokenizer
) -> None:
    content = tokenizer.hf.backend_tokenizer.to_str()
    encoder = TextEncoder(content, can_encode_in_parts(content))
    head, tail = [] if tokenizer.bos_id is None else [tokenizer.bos_id], [tokenizer.eos_id]
    ids = [np.array([*head, *one, *tail], dtype=tokenizer.dtype).tobytes() for one in encoder.encode(texts)]
    in_own, in_trove = (np.array([one in kept for one in ids]) for kept in (own, trove))
    assert in_own.sum() == own.total() and in_trove.sum() == trove.total(), "a text is in the shards and not here"
    drawn = sketches(texts)
    bands = drawn.reshape(len(texts), BANDS, -1)
    by_band: dict[tuple[int, bytes], list[int]] = defaultdict(list)
    for number in range(len(texts)):
        for band in range(BANDS):
            by_band[band, bands[number, band].tobytes()].append(number)

    def partners(number: int) -> list[int]:
        found = {other for band in range(BANDS) for other in by_band[band, bands[number, band].tobytes()]}
        return sorted(found - {number})

    def similar(one: int, other: int) -> float:
        return float(np.mean(drawn[one] == drawn[other]))

    causes: Counter[str] = Counter()
    for number in np.flatnonzero(in_own != in_trove).tolist():
        mine, others = ("own", in_trove) if in_own[number] else ("datatrove", in_own)
        instead = [other for other in partners(number) if others[other]]
        if any(similar(number, other) >= NEAR for other in instead):
            cause = "a near-duplicate of it stays instead"
        elif instead:
            cause = f"the document that stays shares a band with it, at a similarity below {NEAR}"
        elif partners(number):
            cause = "a chain of shared bands leads to the document that stays"
        else:
            cause = "unexplained"
        causes[f"kept by {mine} only: {cause}"] += 1
    both = int((in_own & in_trove).sum())
    print(
        f"{name}: {len(texts):,} different texts; kept by own {own.total():,}, by datatrove {trove.total():,}, "
        f"by both {both:,}"
    )
    for cause, count in sorted(causes.items()):
        print(f"  {count:,} {cause}")


if __name__ == "__main__":
    main()
