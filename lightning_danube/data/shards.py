"""Token shards: the tokens of one source, made once, memory-mapped ever after.

A shard directory holds, for each split, Arrow files in the stream format of `datasets` (one row a document, column
`input_ids`, uint16 while the vocabulary allows) and `shards.json`: the tokenizer's identity, counts, and every file's
size. The directory appears by a rename when it is complete, so what can be seen is whole.

A training row is a window of `context_length` tokens over the concatenated documents, so that the context length can
change without new shards.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_danube.data.corpora import Document, Source, is_saved_dataset, local_files, read_documents
from lightning_danube.data.tokenizer import DocumentTokenizer

FORMAT = 1
SPLITS = ("train", "validation")
SHARD_TOKENS = 1 << 26
"""Tokens after which a new file is begun (128 MiB of uint16)."""
_BATCH_DOCUMENTS = 256


def source_fingerprint(name: str, source: Source, tokenizer: DocumentTokenizer, held_out: float, cache: Path) -> str:
    """Hash of all that decides the tokens: a changed file, tokenizer or split makes new shards."""
    digest = hashlib.sha256(json.dumps([FORMAT, asdict(source), tokenizer.fingerprint, held_out]).encode())
    if not source.is_hub and not is_saved_dataset(source):
        for file in local_files(name, source, cache):
            status = os.stat(file)
            digest.update(f"{os.path.abspath(file)}/{status.st_size}/{status.st_mtime_ns}".encode())
    return digest.hexdigest()[:12]


def is_held_out(text: str, share: float) -> bool:
    """Whether a document belongs to the held-out split: by its content, so copies of it never stand on both sides."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) < share * 2**64


def write_shards(
    directory: Path,
    name: str,
    source: Source,
    tokenizer: DocumentTokenizer,
    *,
    held_out: float,
    cache_dir: Path,
    processes: int,
    shard_tokens: int = SHARD_TOKENS,
) -> None:
    """Tokenizes a source into `directory`. The bytes do not depend on the number of processes.

    Raises:
        ValueError: the source cannot be read (see `read_documents`), or holds no text.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        writers = {split: _SplitWriter(building, split, tokenizer.dtype, shard_tokens) for split in SPLITS}
        limit = source.max_tokens
        tokens = 0
        documents = read_documents(name, source, cache_dir)
        for texts, encoded in _encode_in_order(documents, tokenizer.name, processes, name):
            for text, ids in zip(texts, encoded, strict=True):
                writers["validation" if is_held_out(text, held_out) else "train"].add(ids)
                tokens += len(ids)
            if limit is not None and tokens >= int(limit):
                break
        if not tokens:
            raise ValueError(f"source {name!r} ({source.path}) holds no text")
        meta = {
            "format": FORMAT,
            "source": asdict(source),
            "held_out": held_out,
            "dtype": tokenizer.dtype.name,
            "tokenizer": tokenizer.identity(),
            "splits": {split: writer.close() for split, writer in writers.items()},
        }
        (building / "shards.json").write_text(json.dumps(meta, indent=1) + "\n")
        try:
            os.rename(building, directory)
        except OSError:  # another process has finished the same shards meanwhile
            if not (directory / "shards.json").exists():
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)


class _SplitWriter:
    """Writes the documents of one split, a new Arrow file every `shard_tokens` tokens."""

    def __init__(self, directory: Path, split: str, dtype: np.dtype[Any], shard_tokens: int) -> None:
        self._directory, self._split, self._dtype, self._shard_tokens = directory, split, dtype, shard_tokens
        self._pending: list[NDArray[Any]] = []
        self._pending_tokens = 0
        self._files: list[dict[str, Any]] = []

    def add(self, ids: NDArray[Any]) -> None:
        self._pending.append(ids)
        self._pending_tokens += len(ids)
        if self._pending_tokens >= self._shard_tokens:
            self._flush()

    def close(self) -> dict[str, Any]:
        self._flush()
        return {
            "documents": sum(file["documents"] for file in self._files),
            "tokens": sum(file["tokens"] for file in self._files),
            "files": self._files,
        }

    def _flush(self) -> None:
        if not self._pending:
            return
        import pyarrow as pa
        from datasets import Features, List, Value
        from datasets.arrow_writer import ArrowWriter

        path = self._directory / f"{self._split}-{len(self._files):05d}.arrow"
        values = pa.array(np.concatenate(self._pending))
        ends = np.cumsum([0, *map(len, self._pending)])
        column = pa.LargeListArray.from_arrays(pa.array(ends, pa.int64()), values)
        if ends[-1] < 2**31:
            column = column.cast(pa.list_(values.type))
        features = Features({"input_ids": List(Value(self._dtype.name))})
        with ArrowWriter(path=str(path), features=features) as writer:
            writer.write_table(pa.table({"input_ids": column}))
            writer.finalize()
        self._files.append(
            {
                "name": path.name,
                "bytes": path.stat().st_size,
                "documents": len(self._pending),
                "tokens": self._pending_tokens,
            }
        )
        self._pending, self._pending_tokens = [], 0


_worker_tokenizer: DocumentTokenizer | None = None


def _start_worker(name: str) -> None:
    global _worker_tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker_tokenizer = DocumentTokenizer(name)


def _encode(texts: list[str]) -> list[NDArray[Any]]:
    assert _worker_tokenizer is not None
    return _worker_tokenizer.encode_documents(texts)


def _encode_in_order(
    documents: Iterable[Document], tokenizer_name: str, processes: int, name: str
) -> Iterator[tuple[list[str], list[NDArray[Any]]]]:
    """Batches of texts with their ids, in the order of the documents."""
    from tqdm import tqdm

    rows = iter(documents)
    batches = iter(lambda: [document.text for document in islice(rows, _BATCH_DOCUMENTS)], [])
    if processes > 1:  # a small source is done before a pool of processes has started
        first = list(islice(batches, 16))
        if len(first) < 16:
            batches, processes = iter(first), 1
        else:
            batches = _chain(first, batches)
    with tqdm(
        desc=f"tokenizing {name}", unit=" tokens", unit_scale=True, disable=not sys.stderr.isatty(), leave=False
    ) as bar:
        if processes <= 1:
            _start_worker(tokenizer_name)
            for texts in batches:
                encoded = _encode(texts)
                bar.update(sum(map(len, encoded)))
                yield texts, encoded
            return
        context = multiprocessing.get_context("spawn")
        with context.Pool(processes, initializer=_start_worker, initargs=(tokenizer_name,)) as pool:
            waiting: list[tuple[list[str], Any]] = []
            for texts in batches:
                waiting.append((texts, pool.apply_async(_encode, (texts,))))
                if len(waiting) >= 4 * processes:
                    texts, result = waiting.pop(0)
                    encoded = result.get()
                    bar.update(sum(map(len, encoded)))
                    yield texts, encoded
            for texts, result in waiting:
                yield texts, result.get()


def _chain(first: list[list[str]], rest: Iterator[list[str]]) -> Iterator[list[str]]:
    yield from first
    yield from rest


@dataclass(frozen=True)
class ShardCounts:
    """What one split of a source holds."""

    documents: int
    tokens: int


class TokenShards:
    """One source's shard directory, opened and checked.

    Raises:
        ValueError: the directory is missing, of another format, made with another tokenizer, or a file of it is missing
            or has another size than when it was written.
    """

    def __init__(self, directory: Path, tokenizer: DocumentTokenizer) -> None:
        self.directory = directory
        path = directory / "shards.json"
        try:
            self._meta = json.loads(path.read_text())
            version = self._meta["format"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{directory} is no shard directory: {path} is missing or damaged") from error
        if version != FORMAT:
            raise ValueError(f"{directory} has the shard format {version}, this version reads {FORMAT}: make it again")
        made_with = self._meta["tokenizer"]
        if made_with["fingerprint"] != tokenizer.fingerprint:
            raise ValueError(
                f"{directory} was made with the tokenizer {made_with['name']!r} ({made_with['fingerprint']}), "
                f"the run uses {tokenizer.name!r} ({tokenizer.fingerprint}): make the shards again"
            )
        for split in SPLITS:
            for file in self._meta["splits"][split]["files"]:
                shard = directory / file["name"]
                size = shard.stat().st_size if shard.exists() else None
                if size != file["bytes"]:
                    found = "is missing" if size is None else f"has {size} bytes instead of {file['bytes']}"
                    raise ValueError(f"{shard} {found}: delete {directory} and it will be made again")

    def counts(self, split: str) -> ShardCounts:
        meta = self._meta["splits"][split]
        return ShardCounts(meta["documents"], meta["tokens"])

    def tokens(self, split: str) -> TokenStream:
        """The concatenated documents of a split."""
        from datasets import Dataset

        segments = []
        for file in self._meta["splits"][split]["files"]:
            column = Dataset.from_file(str(self.directory / file["name"])).data.column("input_ids")
            segments += [chunk.flatten().to_numpy(zero_copy_only=True) for chunk in column.chunks]
        return TokenStream(segments, np.dtype(self._meta["dtype"]))


class TokenStream:
    """Tokens of many memory-mapped segments as one sequence; reading a window touches only its own pages."""

    def __init__(self, segments: list[NDArray[Any]], dtype: np.dtype[Any]) -> None:
        self._segments = segments
        self._ends = np.cumsum([0, *map(len, segments)], dtype=np.int64)
        self._dtype = dtype

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Tokens [start, stop)."""
        assert 0 <= start <= stop <= len(self)
        first = int(np.searchsorted(self._ends, start, side="right")) - 1
        if first < len(self._segments) and stop <= self._ends[first + 1]:
            offset = int(self._ends[first])
            return self._segments[first][start - offset : stop - offset]
        pieces = []
        while start < stop:
            offset, end = int(self._ends[first]), min(stop, int(self._ends[first + 1]))
            pieces.append(self._segments[first][start - offset : end - offset])
            start, first = end, first + 1
        return np.concatenate(pieces) if pieces else np.empty(0, dtype=self._dtype)

    def rows(self, context_length: int) -> int:
        """Whole training rows: each predicts `context_length` tokens and shares one token with the next row."""
        return max(0, len(self) - 1) // context_length

    def row(self, number: int, context_length: int) -> NDArray[Any]:
        """Row `number`, (context_length + 1,): inputs and, shifted by one, labels. The last row may be shorter."""
        start = number * context_length
        return self.read(start, min(start + context_length + 1, len(self)))

    def token_counts(self, vocab_size: int) -> NDArray[np.int64]:
        """How often each id occurs, (vocab_size,)."""
        counts = np.zeros(vocab_size, dtype=np.int64)
        for segment in self._segments:
            for begin in range(0, len(segment), 1 << 24):
                counts += np.bincount(segment[begin : begin + (1 << 24)], minlength=vocab_size)
        return counts


def shards_directory(cache_dir: Path, name: str, fingerprint: str) -> Path:
    return cache_dir / "shards" / f"{name}-{fingerprint}"


def open_or_write_shards(
    name: str,
    source: Source,
    tokenizer: DocumentTokenizer,
    *,
    held_out: float,
    cache_dir: Path,
    processes: int,
) -> tuple[TokenShards, float]:
    """The shards of a source and the seconds it took to make them (0 when they were there).

    Raises:
        ValueError: see `write_shards` and `TokenShards`.
    """
    began = time.monotonic()
    fingerprint = source_fingerprint(name, source, tokenizer, held_out, cache_dir)
    directory = shards_directory(cache_dir, name, fingerprint)
    seconds = 0.0
    if not directory.exists():
        write_shards(directory, name, source, tokenizer, held_out=held_out, cache_dir=cache_dir, processes=processes)
        seconds = time.monotonic() - began
    return TokenShards(directory, tokenizer), seconds
