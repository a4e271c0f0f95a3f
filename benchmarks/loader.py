"""Tokens/s of the training loader beside litdata, MosaicML streaming and `datasets`, on the same tokens.

    python benchmarks/loader.py [--tokens 200M] [--contexts 2048 8192] [--workers 0 1 2] [--rounds 5] [--seconds 2]

The tokens are random ids of a fixed seed in 16 bits, written once in each contestant's own format:

* danube: shards of `prepare` (Arrow, uint16); every row of a pass in the curriculum's order;
* litdata: `optimize` with `TokensLoader`, uint16, 64 MB chunks; `StreamingDataset(shuffle=True)` and its own loader;
* streaming: MDS, one `ndarray:uint16` of context + 1 ids a sample, 64 MB shards; `StreamingDataset(shuffle=True)` and
  its own loader;
* datasets: `save_to_disk`, one list of context + 1 uint16 ids a row; `DataLoader(shuffle=True)` over
  `with_format("numpy", dtype=np.uint16)`, the fastest of its formats here ("torch" reaches two thirds of it).

All deliver what a training step takes: input_ids and labels of 8 rows, (8, context), contiguous int64. For the others
the loader delivers (8, context + 1) ids of 16 bits, and the training process makes the two of them with the function
that danube uses; 16 bits between the processes and the conversion at the end is the fastest way for each. danube also
delivers the keys of the samples. No batch is read further, so tensors in shared memory need not even be mapped.

A measurement is a new process (forked from one that has imported everything) which opens the data and iterates for so
many seconds, or to the end of the pass. The clock runs from the first batch to the last; CPU seconds are those of the
process and its workers from the beginning of the iteration to their end. In each round every contestant runs in every
setting, one after the other, each round begins with another contestant; files lie in the page cache. Before that, each
delivers one whole pass: no sample twice, and the sum of the ids that all should have.

The packages of the others are not in the extra `benchmark` but in benchmarks/peers.txt, to be installed without what
they ask for: litdata and streaming require torchvision, whose wheels do not load beside a CPU build of torch, and
boto3, which wants an older python-dateutil; streaming also numpy < 2.2 and transformers < 5. None of it is used for
tokens in local files; what is imported is in peers.txt. The part of streaming that imports torchvision, its data sets
of images, is left out. A contestant that is not installed is named and left out.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import logging
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from machine import described, write_result
from numpy.typing import NDArray

ROWS = 8
"""Rows of a batch."""
VOCABULARY = 32_000
CHUNK_BYTES = 64_000_000
POSITIONS = (0, 10**9, 10**10, 10**11, 10**12, 3 * 10**12)
"""Tokens before the samples whose cost is measured; the end of the run comes last."""

Batches = Iterator[dict[str, Any]]


@dataclass(frozen=True)
class Contestant:
    """How tokens are written, once for each context length, and read in training."""

    package: str | None
    write: Callable[[NDArray[np.uint16], Path, int], None]
    read: Callable[[Path, int, int], Batches]


# --- contestants ------------------------------------------------------------------------------------------------------


class RandomTokens:
    """What the shards are said to be made with."""

    name, fingerprint, vocab_size = "random", "random", VOCABULARY


def write_danube(tokens: NDArray[np.uint16], directory: Path, context: int) -> None:
    from lightning_danube.tokens.shards import FORMAT, SplitWriter

    directory.mkdir(parents=True)
    splits = {}
    for split, documents in (("train", np.array_split(tokens, len(tokens) // 1000)), ("validation", [tokens[:1000]])):
        writer = SplitWriter(directory, split, tokens.dtype)
        for document in documents:
            writer.add(document)
        splits[split] = writer.close()
    identity = {"name": RandomTokens.name, "fingerprint": RandomTokens.fingerprint}
    meta = {"format": FORMAT, "dtype": "uint16", "tokenizer": identity, "splits": splits}
    (directory / "shards.json").write_text(json.dumps(meta))


def danube_loader(directory: Path, context: int, workers: int, start: int = 0, stages: Any = None) -> Any:
    from lightning_danube.pretraining.curriculum import Curriculum, Stage
    from lightning_danube.pretraining.data import CurriculumLoader, CurriculumSampler, TrainingRows
    from lightning_danube.tokens.shards import TokenShards

    stream = TokenShards(directory, RandomTokens()).tokens("train")  # type: ignore[arg-type]
    rows = stream.rows(context)
    one_pass = [Stage("pass", rows // ROWS * ROWS * context, {"random": 1})]
    curriculum = Curriculum(stages or one_pass, {"random": rows}, context_length=context, batch_samples=ROWS, seed=0)
    sampler = CurriculumSampler(curriculum, micro_batch_size=ROWS, replicas=1, replica=0, start=start)
    return CurriculumLoader(TrainingRows([stream], context, None), sampler, workers)


def read_danube(directory: Path, context: int, workers: int) -> Batches:
    return iter(danube_loader(directory, context, workers))


def pieces(number: int, tokens: NDArray[np.uint16]) -> Any:
    import torch

    yield torch.from_numpy(tokens[number * (1 << 20) : (number + 1) * (1 << 20)])


def write_litdata(tokens: NDArray[np.uint16], directory: Path, context: int) -> None:
    from litdata import TokensLoader, optimize

    optimize(
        fn=partial(pieces, tokens=tokens), inputs=list(range(-(-len(tokens) >> 20))), output_dir=str(directory),
        chunk_bytes=CHUNK_BYTES, item_loader=TokensLoader(), num_workers=1, start_method="fork", verbose=False,
    )  # fmt: skip


def read_litdata(directory: Path, context: int, workers: int) -> Batches:
    from litdata import StreamingDataLoader, StreamingDataset, TokensLoader

    rows = StreamingDataset(
        str(directory), item_loader=TokensLoader(block_size=context + 1), shuffle=True, drop_last=True
    )
    return map(training_batch, StreamingDataLoader(rows, batch_size=ROWS, num_workers=workers, drop_last=True))


def streaming() -> Any:
    sys.modules.setdefault("streaming.vision", types.ModuleType("streaming.vision"))
    import streaming

    return streaming


def write_streaming(tokens: NDArray[np.uint16], directory: Path, context: int) -> None:
    columns = {"tokens": f"ndarray:uint16:{context + 1}"}
    with streaming().MDSWriter(out=str(directory), columns=columns, size_limit=CHUNK_BYTES) as writer:
        for row in whole_rows(tokens, context):
            writer.write({"tokens": row})


def read_streaming(directory: Path, context: int, workers: int) -> Batches:
    streaming().base.util.clean_stale_shared_memory()
    rows = streaming().StreamingDataset(local=str(directory), shuffle=True, batch_size=ROWS)
    loader = streaming().StreamingDataLoader(rows, batch_size=ROWS, num_workers=workers, drop_last=True)
    return map(training_batch, (batch["tokens"] for batch in loader))


def write_datasets(tokens: NDArray[np.uint16], directory: Path, context: int) -> None:
    import datasets
    import pyarrow as pa

    rows = whole_rows(tokens, context)
    ends = pa.array(np.arange(len(rows) + 1, dtype=np.int32) * (context + 1))
    features = datasets.Features({"input_ids": datasets.List(datasets.Value("uint16"))})
    table = pa.table({"input_ids": pa.ListArray.from_arrays(ends, pa.array(rows.reshape(-1)))})
    datasets.disable_progress_bars()
    datasets.Dataset(table, info=datasets.DatasetInfo(features=features)).save_to_disk(
        str(directory), max_shard_size=CHUNK_BYTES
    )


def stacked(rows: list[dict[str, NDArray[np.uint16]]]) -> Any:
    import torch

    return torch.from_numpy(np.stack([row["input_ids"] for row in rows]))


def read_datasets(directory: Path, context: int, workers: int) -> Batches:
    import datasets
    from torch.utils.data import DataLoader

    rows: Any = datasets.load_from_disk(str(directory)).with_format("numpy", dtype=np.uint16)
    loader = DataLoader(rows, batch_size=ROWS, shuffle=True, collate_fn=stacked, num_workers=workers, drop_last=True)
    return map(training_batch, loader)


def whole_rows(tokens: NDArray[np.uint16], context: int) -> NDArray[np.uint16]:
    return tokens[: len(tokens) // (context + 1) * (context + 1)].reshape(-1, context + 1)


def training_batch(ids: Any) -> dict[str, Any]:
    """input_ids and labels of (rows, context + 1) ids, as danube makes them."""
    from lightning_danube.pretraining.data import inputs_and_labels

    return inputs_and_labels(ids.numpy(), None)


CONTESTANTS = {
    "danube": Contestant(None, write_danube, read_danube),
    "litdata": Contestant("litdata", write_litdata, read_litdata),
    "streaming": Contestant("mosaicml-streaming", write_streaming, read_streaming),
    "datasets": Contestant("datasets", write_datasets, read_datasets),
}
ONE_FOR_ALL_CONTEXTS = {"danube", "litdata"}
"""Their files do not depend on the context length and are written once."""


# --- measuring --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measurement:
    tokens: int
    seconds: float
    cpu_seconds: float
    first_batch: float


def measure(name: str, directory: Path, context: int, workers: int, seconds: float) -> Measurement:
    """Runs in a separate process."""
    quiet()
    before, began = cpu_seconds(), time.perf_counter()
    batches = CONTESTANTS[name].read(directory, context, workers)
    first = next(batches)
    assert first["input_ids"].shape == first["labels"].shape == (ROWS, context)
    assert str(first["input_ids"].dtype) == "torch.int64" and first["labels"].is_contiguous()
    clock = start = time.perf_counter()
    count = 0
    for _ in batches:
        count += 1
        clock = time.perf_counter()
        if clock - start > seconds:
            break
    del batches  # ends the workers, whose time counts as soon as they are gone
    return Measurement(count * ROWS * context, clock - start, cpu_seconds() - before, start - began)


def check(name: str, directory: Path, context: int) -> tuple[int, int, int]:
    """(samples, different ones, sum of the ids in input_ids) of a whole pass without workers."""
    quiet()
    samples, total, seen = 0, 0, set()
    for batch in CONTESTANTS[name].read(directory, context, 0):
        samples += len(batch["input_ids"])
        seen |= {row.numpy().tobytes() for row in batch["input_ids"][:, :16]}
        total += int(batch["input_ids"].sum())
    return samples, len(seen), total


def cpu_seconds() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def quiet() -> None:
    import torch

    # A process of a fork server would start the loaders' workers as such, too; elsewhere they are forked.
    multiprocessing.set_start_method("fork", force=True)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)


def elsewhere(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a function in a new process, forked from one that has imported the libraries."""
    context = multiprocessing.get_context("forkserver")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=answer, args=(send, function, arguments))
    process.start()
    send.close()
    try:
        value = receive.recv()
    except EOFError as error:
        raise RuntimeError(f"{function.__name__}{arguments} ended without a result") from error
    finally:
        process.join()
    return value


def answer(send: Any, function: Callable[..., Any], arguments: Sequence[Any]) -> None:
    send.send(function(*arguments))


def random_ids(count: int) -> NDArray[np.uint16]:
    return np.random.default_rng(0).integers(0, VOCABULARY, count, dtype=np.uint16)


def write_tokens(name: str, tokens: int, directory: Path, context: int) -> None:
    quiet()
    CONTESTANTS[name].write(random_ids(tokens), directory, context)


# --- positions --------------------------------------------------------------------------------------------------------


class Cost(NamedTuple):
    """Of samples at one place of a run: µs of CPU for a sample and for its key alone, ms of CPU from opening the
    files to the first batch."""

    tokens_before: int
    sample: float
    key: float
    first_batch: float


def positions(directory: Path, context: int, seconds: float) -> list[Cost]:
    """Costs in a run of the paper's longest, 6T tokens in three stages, over the tokens that are there, again and
    again."""
    quiet()
    end = long_run(directory, context, 0).batch_sampler.curriculum.total_samples
    return [
        cost_at(directory, context, tokens // context // ROWS * ROWS, seconds)
        for tokens in (*POSITIONS, (end - (1 << 17)) * context)
    ]


def cost_at(directory: Path, context: int, start: int, seconds: float) -> Cost:
    opened = time.process_time()
    loader = long_run(directory, context, start)
    batches = iter(loader)
    next(batches)
    first_batch = time.process_time() - opened
    began = clock = time.process_time()
    samples = 0
    while clock - began < seconds and (batch := next(batches, None)) is not None:
        samples += len(batch["keys"])
        clock = time.process_time()
    sample = (clock - began) / samples
    began = time.process_time()
    for chunk in range(start, start + (1 << 16), 4096):
        loader.batch_sampler.curriculum.keys(chunk, chunk + 4096)
    key = (time.process_time() - began) / (1 << 16)
    return Cost(start * context, sample * 1e6, key * 1e6, first_batch * 1e3)


def long_run(directory: Path, context: int, start: int) -> Any:
    from lightning_danube.pretraining.curriculum import Stage

    lengths = {"foundation": "4.6T", "refinement": "1.35T", "finish": "0.05T"}
    stages = [Stage(name, length, {"random": 1.0}) for name, length in lengths.items()]
    return danube_loader(directory, context, 0, start, stages)


# --- the tables -------------------------------------------------------------------------------------------------------


def installed(name: str, contestant: Contestant) -> bool:
    try:
        importlib.metadata.version(contestant.package or "torch")
    except importlib.metadata.PackageNotFoundError:
        print(f"{name} is left out: pip install --no-deps -r benchmarks/peers.txt")
        return False
    return True


def table(measured: dict[tuple[int, int, str], list[Measurement]], names: list[str]) -> list[str]:
    """A line for each setting and contestant; ratios are those of one round, of which the median is shown."""
    lines = [
        "| context | workers | | M tokens/s | least to most | M tokens/CPU s | danube ×, by the clock "
        "| danube ×, by CPU | first batch after, s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (context, workers, name), results in measured.items():
        ours = measured[context, workers, "danube"]
        by_clock = [r.tokens / r.seconds / 1e6 for r in results]
        by_cpu = [r.tokens / r.cpu_seconds / 1e6 for r in results]
        ahead = statistics.median((o.tokens / o.seconds / 1e6) / rate for o, rate in zip(ours, by_clock, strict=True))
        thriftier = statistics.median(
            (o.tokens / o.cpu_seconds / 1e6) / rate for o, rate in zip(ours, by_cpu, strict=True)
        )
        lines.append(
            f"| {context} | {workers} | {name} | {statistics.median(by_clock):,.0f} "
            f"| {min(by_clock):,.0f} to {max(by_clock):,.0f} | {statistics.median(by_cpu):,.0f} | {ahead:.1f} "
            f"| {thriftier:.1f} | {statistics.median(r.first_batch for r in results):.2f} |"
        )
    return lines


def position_table(costs: dict[int, list[Cost]]) -> list[str]:
    lines = [
        "| context | tokens before | CPU µs a sample | of them for its key | CPU ms to the first batch |",
        "|---|---|---|---|---|",
    ]
    for context, found in costs.items():
        lines += [
            f"| {context} | {at.tokens_before:,} | {at.sample:.2f} | {at.key:.2f} | {at.first_batch:.1f} |"
            for at in found
        ]
    return lines


def main() -> None:
    from lightning_danube.options import parse_tokens

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", default="200M")
    parser.add_argument("--contexts", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="of one measurement")
    arguments = parser.parse_args()
    tokens = parse_tokens(arguments.tokens, "--tokens")
    names = [name for name, contestant in CONTESTANTS.items() if installed(name, contestant)]
    context_of = multiprocessing.get_context("forkserver")
    context_of.set_forkserver_preload(
        ["torch", "datasets", "lightning_danube.pretraining.data", *(["litdata"] if "litdata" in names else [])]
    )
    with tempfile.TemporaryDirectory() as scratch:
        places: dict[tuple[str, int], Path] = {}
        for name in names:
            for context in arguments.contexts:
                shared = name in ONE_FOR_ALL_CONTEXTS
                places[name, context] = Path(scratch, name if shared else f"{name}-{context}")
                if not places[name, context].exists():
                    elsewhere(write_tokens, name, tokens, places[name, context], context)
        everything = int(random_ids(tokens).sum(dtype=np.int64))
        for context in arguments.contexts:
            for name in names:
                samples, different, total = elsewhere(check, name, places[name, context], context)
                share = total / everything
                print(f"one pass of {name} at context {context}: {samples:,} samples, {share:.2%} of the ids' sum")
                if different != samples or not 0.995 < share <= 1:
                    raise RuntimeError(f"{name} has not delivered the tokens: {different:,} samples are different")
        measured: dict[tuple[int, int, str], list[Measurement]] = {}
        for number in range(arguments.rounds):
            for context in arguments.contexts:
                for workers in arguments.workers:
                    first = number % len(names)
                    for name in names[first:] + names[:first]:
                        result = elsewhere(measure, name, places[name, context], context, workers, arguments.seconds)
                        measured.setdefault((context, workers, name), []).append(result)
            print(f"round {number + 1} of {arguments.rounds}, load {os.getloadavg()[0]:.1f}", flush=True)
        costs = {
            context: elsewhere(positions, places["danube", context], context, arguments.seconds / 4)
            for context in arguments.contexts
        }
    versions = {name: CONTESTANTS[name].package for name in names}
    header = [
        described("torch", *(package for package in versions.values() if package)),
        f"{tokens:,} random tokens, {ROWS} rows a batch, medians of {arguments.rounds} × {arguments.seconds:g} s",
    ]
    write_result("loader", "\n".join([*header, "", *table(measured, names), "", *position_table(costs)]))


if __name__ == "__main__":
    main()
