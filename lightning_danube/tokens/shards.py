"""Token shards: the tokens of one source, made once and memory-mapped from then on.

A shard directory holds Arrow files for each split, in the stream format of `datasets`: one row per document, column
`input_ids`, uint16 while the vocabulary allows. Its `shards.json` holds the tokenizer's identity, counts, and every
file's size and checksum. The directory gets its name by a rename when it is complete, so a visible directory is
complete. Sizes are checked when the directory is opened, ids when a row is read, checksums on `prepare --verify`.

A training row is a window of `context_length` tokens over the concatenated documents, so the context length can change
without new shards.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from bisect import bisect_right
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from lightning_danube.files import read_json
from lightning_danube.outside.names import plain_name
from lightning_danube.text.corpora import Source, is_saved_dataset, local_files, saved_directory
from lightning_danube.text.quality import Quality, text_hash
from lightning_danube.text.reading import READ_AS, format_of
from lightning_danube.tokens.finished_shards import finished_directory, is_finished
from lightning_danube.tokens.tokenizer import DocumentTokenizer

FORMAT = 2
SPLITS = ("train", "validation")
SHARD_TOKENS = 1 << 26
"""Tokens after which a new file starts (128 MiB of uint16)."""
BATCH_TOKENS = 1 << 24
"""Tokens that are held in memory before they are written (32 MiB of uint16)."""


def source_fingerprint(
    name: str, source: Source, tokenizer: DocumentTokenizer, held_out: float, quality: Quality, cache: Path
) -> str:
    """Returns a hash of everything that determines the tokens.

    A changed file, tokenizer, split or quality rule leads to new shards.
    """
    facts = [FORMAT, asdict(source), tokenizer.fingerprint, held_out, quality.identity(source.filters)]
    digest = hashlib.sha256(json.dumps(facts).encode())
    digest.update(files_identity(name, source, cache))
    return digest.hexdigest()[:12]


def files_identity(name: str, source: Source, cache: Path) -> bytes:
    """Returns bytes that change with a source's files, and with the version of their reader. They are empty for a hub
    data set, which its revision identifies."""
    if is_saved_dataset(source):
        return (saved_directory(name, source) / "state.json").read_bytes()
    if source.is_hub:
        return b""
    identity = ""
    for file in local_files(name, source, cache):
        state, read_as = os.stat(file), READ_AS.get(format_of(file))
        identity += f"{os.path.abspath(file)}/{state.st_size}/{state.st_mtime_ns}" + (f"/{read_as}" if read_as else "")
    return identity.encode()


def held_out_below(share: float) -> int:
    """Returns the border below which a document's `text_hash` puts it into the held-out split.

    The content decides, so copies of a document are never in both splits.
    """
    return math.ceil(share * 2**64)


def is_held_out(text: str, share: float) -> bool:
    return text_hash(text) < held_out_below(share)


class SplitWriter:
    """Writes the documents of one split, a new Arrow file every `shard_tokens` tokens."""

    def __init__(self, directory: Path, split: str, dtype: np.dtype[Any], shard_tokens: int = SHARD_TOKENS) -> None:
        self._directory, self._split, self._dtype, self._shard_tokens = directory, split, dtype, shard_tokens
        self._pending: list[NDArray[Any]] = []
        self._pending_tokens = 0
        self._writer: Any = None
        self._files: list[dict[str, Any]] = []

    def add(self, ids: NDArray[Any]) -> None:
        self._pending.append(ids)
        self._pending_tokens += len(ids)
        full = self._in_file("tokens") + self._pending_tokens >= self._shard_tokens
        if full or self._pending_tokens >= BATCH_TOKENS:
            self._flush()
        if full:
            self._close_file()

    def close(self) -> dict[str, Any]:
        self._flush()
        self._close_file()
        return {
            "documents": sum(file["documents"] for file in self._files),
            "tokens": sum(file["tokens"] for file in self._files),
            "files": self._files,
        }

    def _in_file(self, what: str) -> int:
        return int(self._files[-1][what]) if self._writer is not None else 0

    def _flush(self) -> None:
        if not self._pending:
            return
        import pyarrow as pa
        from datasets import Features, List, Value
        from datasets.arrow_writer import ArrowWriter

        if self._writer is None:
            name = f"{self._split}-{len(self._files):05d}.arrow"
            self._files.append({"name": name, "bytes": 0, "documents": 0, "tokens": 0})
            features = Features({"input_ids": List(Value(self._dtype.name))})
            self._writer = ArrowWriter(path=str(self._directory / name), features=features)
        values = pa.array(np.concatenate(self._pending))
        ends = np.cumsum([0, *map(len, self._pending)])
        column = pa.LargeListArray.from_arrays(pa.array(ends, pa.int64()), values).cast(pa.list_(values.type))
        self._writer.write_table(pa.table({"input_ids": column}), writer_batch_size=len(self._pending))
        self._files[-1]["documents"] += len(self._pending)
        self._files[-1]["tokens"] += self._pending_tokens
        self._pending, self._pending_tokens = [], 0

    def _close_file(self) -> None:
        if self._writer is None:
            return
        self._writer.finalize()
        self._writer = None
        path = self._directory / self._files[-1]["name"]
        with open(path, "rb") as file:
            self._files[-1]["bytes"] = os.fstat(file.fileno()).st_size
            self._files[-1]["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
        self._files[-1]["edges"] = _edges(_map_tokens(path))


def _map_tokens(path: Path) -> list[NDArray[Any]]:
    """Memory-maps the tokens of a file: the raw values, without the documents' offsets."""
    import pyarrow as pa

    column = pa.ipc.open_stream(pa.memory_map(str(path))).read_all().column("input_ids")
    column.validate()
    return [chunk.values.to_numpy(zero_copy_only=True) for chunk in column.chunks]


def _edges(chunks: list[NDArray[Any]]) -> str:
    """Returns a hash of the first and last 64 tokens of every chunk, to detect damage that shifts the tokens."""
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk[:64].tobytes() + chunk[-64:].tobytes())
    return digest.hexdigest()[:16]


_REMEDY = "delete {} and it will be made again"


@dataclass(frozen=True)
class ShardCounts:
    """Number of documents and tokens in one split of a source."""

    documents: int
    tokens: int


class TokenShards:
    """One source's shard directory, opened and checked.

    Raises:
        ValueError: the directory is missing, has another format or another tokenizer, or a file is missing or has
            another size than when it was written.
    """

    def __init__(self, directory: Path, tokenizer: DocumentTokenizer) -> None:
        self.directory, self._vocab_size = directory, tokenizer.vocab_size
        path = directory / "shards.json"
        try:
            self.meta = read_json(path)
            version = self.meta["format"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{directory} is no shard directory: {path} is missing or damaged") from error
        if version != FORMAT:
            raise ValueError(f"{directory} has the shard format {version}, this version reads {FORMAT}: make it again")
        try:
            made_with = self.meta["tokenizer"]
            another = made_with["fingerprint"] != tokenizer.fingerprint
            files = [file for split in SPLITS for file in self._files(split)]
            expected = {plain_name(file["name"], "the name of a file"): file["bytes"] for file in files}
            if not all(file.keys() >= {"tokens", "sha256", "edges"} for file in files):
                raise KeyError("sha256")
            self._dtype = np.dtype(self.meta["dtype"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged ({error}): {_REMEDY.format(directory)}") from error
        if another:
            raise ValueError(
                f"{directory} was made with the tokenizer {made_with['name']!r} ({made_with['fingerprint']}), "
                f"the run uses {tokenizer.name!r} ({tokenizer.fingerprint}): make the shards again"
            )
        for name, size in expected.items():
            shard = directory / name
            found = shard.stat().st_size if shard.exists() else None
            if found != size:
                what = "is missing" if found is None else f"has {found} bytes instead of {size}"
                raise ValueError(f"{shard} {what}: {_REMEDY.format(directory)}")

    def _files(self, split: str) -> list[dict[str, Any]]:
        files: list[dict[str, Any]] = self.meta["splits"][split]["files"]
        return files

    def counts(self, split: str) -> ShardCounts:
        meta = self.meta["splits"][split]
        return ShardCounts(meta["documents"], meta["tokens"])

    def verify(self) -> None:
        """Reads every file and compares its checksum.

        Raises:
            ValueError: the content of a file has changed.
        """
        for split in SPLITS:
            for file in self._files(split):
                path = self.directory / file["name"]
                with open(path, "rb") as content:
                    digest = hashlib.file_digest(content, "sha256").hexdigest()
                if digest != file["sha256"]:
                    raise ValueError(
                        f"{path} does not hold what was written (sha256 {digest[:12]}… instead of "
                        f"{file['sha256'][:12]}…): {_REMEDY.format(self.directory)}"
                    )

    def tokens(self, split: str) -> TokenSequence:
        """Returns the concatenated documents of a split.

        Raises:
            ValueError: a file's layout is damaged, or its number, type or edges of tokens differ from `shards.json`.
        """
        import pyarrow as pa

        segments, files = [], []
        for file in self._files(split):
            path = self.directory / file["name"]
            try:
                chunks = _map_tokens(path)
            except (pa.ArrowException, OSError, KeyError, ValueError, AttributeError, MemoryError) as error:
                raise ValueError(
                    f"{path} is damaged ({str(error).strip()}): {_REMEDY.format(self.directory)}"
                ) from error
            same = sum(map(len, chunks)) == file["tokens"] and all(chunk.dtype == self._dtype for chunk in chunks)
            if not same or _edges(chunks) != file["edges"]:
                raise ValueError(
                    f"{path} is damaged (it does not hold the {file['tokens']:,} tokens that were written): "
                    f"{_REMEDY.format(self.directory)}"
                )
            segments += chunks
            files += [path] * len(chunks)
        return TokenSequence(segments, self._dtype, self._vocab_size, files)


class TokenSequence:
    """Tokens of many memory-mapped segments as one sequence. Reading a window touches only the pages of that window."""

    def __init__(self, segments: list[NDArray[Any]], dtype: np.dtype[Any], vocab_size: int, files: list[Path]) -> None:
        self._segments, self.vocab_size, self._files = segments, vocab_size, files
        self._ends = list(accumulate(map(len, segments), initial=0))
        self.dtype = dtype

    def __len__(self) -> int:
        return self._ends[-1]

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Returns tokens [start, stop)."""
        assert 0 <= start <= stop <= len(self)
        first = bisect_right(self._ends, start) - 1
        if first < len(self._segments) and stop <= self._ends[first + 1]:
            offset = self._ends[first]
            return self._segments[first][start - offset : stop - offset]
        pieces = []
        while start < stop:
            offset, end = self._ends[first], min(stop, self._ends[first + 1])
            pieces.append(self._segments[first][start - offset : end - offset])
            start, first = end, first + 1
        return np.concatenate(pieces) if pieces else np.empty(0, dtype=self.dtype)

    def rows(self, context_length: int) -> int:
        """Returns the number of full training rows.

        Each row predicts `context_length` tokens and shares one token with the next row.
        """
        return max(0, len(self) - 1) // context_length

    def row(self, number: int, context_length: int) -> NDArray[Any]:
        """Returns row `number`, (context_length + 1,): inputs and, shifted by one, labels. The last row may be shorter.

        Raises:
            ValueError: an id is outside the vocabulary, so the file is damaged. An embedding must never see such an id.
        """
        start = number * context_length
        row = self.read(start, min(start + context_length + 1, len(self)))
        if len(row) and row.max() >= self.vocab_size:
            self._refuse(start + int(np.argmax(row >= self.vocab_size)))
        return row

    def _refuse(self, position: int) -> NoReturn:
        segment = bisect_right(self._ends, position) - 1
        value, path = self.read(position, position + 1)[0], self._files[segment]
        place = position - self._ends[self._files.index(path)]
        raise ValueError(
            f"{path} is damaged: token {place:,} of it is {value}, the vocabulary has "
            f"{self.vocab_size}: {_REMEDY.format(path.parent)}"
        )

    def token_counts(self, vocab_size: int) -> NDArray[np.int64]:
        """Returns how often each id occurs, (vocab_size,)."""
        counts = np.zeros(vocab_size, dtype=np.int64)
        for number, segment in enumerate(self._segments):
            for begin in range(0, len(segment), 1 << 24):
                part = segment[begin : begin + (1 << 24)]
                if part.max() >= self.vocab_size:
                    place = int(np.argmax(part >= self.vocab_size))
                    self._refuse(self._ends[number] + begin + place)
                counts += np.bincount(part, minlength=vocab_size)
        return counts


def shards_directory(
    name: str, source: Source, tokenizer: DocumentTokenizer, held_out: float, quality: Quality, cache_dir: Path
) -> Path:
    """Returns the directory where the shards of a source are, or will be."""
    if is_finished(source.path):
        return finished_directory(source.path, cache_dir)
    fingerprint = source_fingerprint(name, source, tokenizer, held_out, quality, cache_dir)
    return cache_dir / "shards" / f"{name}-{fingerprint}"
