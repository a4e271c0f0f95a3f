"""Token shards: the tokens of one source, made once and read row by row from then on.

A shard directory holds Arrow files in the stream format of `datasets`, one for each unit of the source and each split:
one row per document, column `input_ids`, uint16 while the vocabulary allows. Its `shards.json` holds the tokenizer's
identity, counts, and for every file its size, its checksum, and the places of its tokens. A file beside them holds how
often each id occurs in the split. The directory gets its name by a rename when it is complete, so a visible directory
is complete.

`shards.json` alone is read when the directory is opened. One process of each node compares the sizes of the files with
it. A file is opened when one of its tokens is read. Ids are checked when a row is read, checksums on `prepare
--verify`.

A training row is a window of `context_length` tokens over the concatenated documents, so the context length can change
without new shards.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_danube.files import naming_cached, read_json
from lightning_danube.outside.names import plain_name
from lightning_danube.outside.secrets import redacted
from lightning_danube.text.corpora import Source, is_saved_dataset, local_files, saved_directory
from lightning_danube.text.quality import Quality, text_hash
from lightning_danube.text.reading import READ_AS, format_of
from lightning_danube.tokens.engines import ENGINES, Engine
from lightning_danube.tokens.finished_shards import (
    FORMAT,
    check_format,
    finished_directory,
    is_address,
    is_finished,
    listed_files,
)
from lightning_danube.tokens.foreign.ranges import ByteRanges, StampedFiles
from lightning_danube.tokens.token_sequence import TokenSegment, TokenSequence
from lightning_danube.tokens.tokenizer import DocumentTokenizer

SPLITS = ("train", "validation")
BATCH_TOKENS = 1 << 24
"""Tokens that are held in memory before they are written (32 MiB of uint16)."""


@dataclass(frozen=True)
class ShardFacts:
    """What decides the shards of a source, and where they are.

    Args:
        name: name of the source.
        held_out: share of the documents that are held out.
        cache_dir: the directory that holds the shards of all sources.
    """

    name: str
    source: Source
    tokenizer: DocumentTokenizer
    held_out: float
    quality: Quality
    cache_dir: Path

    def fingerprint(self, engine: Engine = "own") -> str:
        """Returns a hash of everything that determines the tokens.

        A changed file, tokenizer, split or quality rule leads to new shards. So does the engine where it matters: both
        find the same equal texts, and other near-duplicates.
        """
        rules = self.quality.identity(self.source.filters)
        facts = [FORMAT, asdict(self.source), self.tokenizer.fingerprint, self.held_out, rules]
        if engine != "own" and self.quality.deduplicate == "near":
            facts.append(engine)
        digest = hashlib.sha256(json.dumps(facts).encode())
        digest.update(files_identity(self.name, self.source, self.cache_dir))
        return digest.hexdigest()[:12]

    def directory(self, engine: Engine | None = None) -> Path:
        """Returns the directory where the shards are, or will be.

        Args:
            engine: which engine makes them. None: the directory that is complete, or else that of the own engine.
        """
        if is_finished(self.source.path):
            return finished_directory(self.source.path, self.cache_dir)
        shards = self.cache_dir / "shards"
        directories = {one: shards / f"{self.name}-{self.fingerprint(one)}" for one in ENGINES}
        if engine is not None:
            return directories[engine]
        complete = (directory for directory in directories.values() if (directory / "shards.json").exists())
        return next(complete, directories["own"])

    def open(self) -> TokenShards:
        """Opens the shards, which exist.

        Raises:
            ValueError: see `TokenShards`.
        """
        path = self.source.path
        ranges = ByteRanges(path, self.cache_dir) if is_address(path) else None
        return TokenShards(self.directory(), self.tokenizer, ranges)

    def meta(self) -> dict[str, Any]:
        """Returns the entries of shards.json that are known before the work."""
        return {
            "format": FORMAT,
            "source": asdict(self.source),
            "held_out": self.held_out,
            "dtype": self.tokenizer.dtype.name,
            "tokenizer": self.tokenizer.identity(),
            "quality": asdict(self.quality),
        }


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


def split_of(hashed: int, border: int) -> str:
    """Returns the split of a document.

    Args:
        hashed: `text_hash` of its text.
        border: see `held_out_below`.
    """
    return "validation" if hashed < border else "train"


def is_held_out(text: str, share: float) -> bool:
    return text_hash(text) < held_out_below(share)


class SplitWriter:
    """Writes documents of one split into a new Arrow file. Without a document there is no file.

    Args:
        name: of the file, without `.arrow`.
    """

    def __init__(self, directory: Path, name: str, dtype: np.dtype[Any]) -> None:
        self._directory, self._name, self._dtype = directory, name, dtype
        self._pending: list[NDArray[Any]] = []
        self._pending_tokens = 0
        self._sink: _HashedFile | None = None
        self._writer: Any = None
        self._schema: Any = None
        self._documents = self._tokens = 0
        self._counts = np.zeros(0, dtype=np.int64)

    def add(self, ids: NDArray[Any]) -> None:
        self._pending.append(ids)
        self._pending_tokens += len(ids)
        if self._pending_tokens >= BATCH_TOKENS:
            self._flush()

    def close(self) -> dict[str, Any]:
        """Ends the file. Returns what `shards.json` says of it as of a whole split: see `joined_splits`."""
        self._flush()
        files = []
        if self._sink is not None:
            self._writer.close()
            self._sink.close()
            name = f"{self._name}.arrow"
            files.append(
                {
                    "name": name,
                    "bytes": self._sink.size,
                    "sha256": self._sink.digest.hexdigest(),
                    "documents": self._documents,
                    "tokens": self._tokens,
                    "segments": _segments(self._directory / name),
                }
            )
        return {
            "documents": self._documents,
            "tokens": self._tokens,
            "token_counts": write_token_counts(self._directory, self._name, self._counts),
            "files": files,
        }

    def _flush(self) -> None:
        if not self._pending:
            return
        import pyarrow as pa

        column_type = pa.list_(pa.from_numpy_dtype(self._dtype))
        if self._sink is None:
            self._sink = _HashedFile(self._directory / f"{self._name}.arrow")
            # What `datasets` reads in a file of its own. The library itself takes a process seconds to import.
            value = {"dtype": self._dtype.name, "_type": "Value"}
            info = {"info": {"features": {"input_ids": {"feature": value, "_type": "List"}}}}
            self._schema = pa.schema({"input_ids": column_type}, {"huggingface": json.dumps(info)})
            self._writer = pa.ipc.new_stream(pa.PythonFile(self._sink, mode="w"), self._schema)
        ids = np.concatenate(self._pending)
        self._counts = _sum(self._counts, np.bincount(ids))
        ends = np.cumsum([0, *map(len, self._pending)])
        column = pa.LargeListArray.from_arrays(pa.array(ends, pa.int64()), pa.array(ids)).cast(column_type)
        self._writer.write_batch(pa.record_batch([column], schema=self._schema))
        self._documents += len(self._pending)
        self._tokens += self._pending_tokens
        self._pending, self._pending_tokens = [], 0


class _HashedFile:
    """A new file that hashes what is written into it, so that it need not be read again."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "wb")  # noqa: SIM115
        self.size, self.digest = 0, hashlib.sha256()
        self.closed = False

    def write(self, content: Any) -> int:
        self.digest.update(content)
        written = self._file.write(content)
        self.size += written
        return written

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()
        self.closed = True


def _sum(a: NDArray[np.int64], b: NDArray[np.int64]) -> NDArray[np.int64]:
    """Adds two arrays of counts, of which one may be shorter."""
    short, long = sorted((a, b), key=len)
    total = long.copy()
    total[: len(short)] += short
    return total


def _segments(path: Path) -> list[list[int]]:
    """Returns [bytes before the first token, tokens] of each batch of a file, whose layout alone is read."""
    import pyarrow as pa

    content = pa.memory_map(str(path)).read_buffer()
    found = []
    for batch in pa.ipc.open_stream(content):
        values = batch.column("input_ids").values
        found.append([values.buffers()[1].address - content.address, len(values)])
    return found


def joined_splits(directory: Path, split: str, parts: Iterable[tuple[Path, dict[str, Any]]]) -> dict[str, Any]:
    """Returns what `shards.json` says of a split whose files several writers have written.

    Args:
        directory: of the shards, which gets the counts of the whole split.
        parts: in order: where each writer wrote, and what its `close` returned.
    """
    counts = np.zeros(0, dtype=np.int64)
    joined: dict[str, Any] = {"documents": 0, "tokens": 0, "token_counts": {}, "files": []}
    for folder, part in parts:
        counts = _sum(counts, np.load(folder / part["token_counts"]["name"]))
        for what in ("documents", "tokens", "files"):
            joined[what] += part[what]
    joined["token_counts"] = write_token_counts(directory, split, counts)
    return joined


def write_token_counts(directory: Path, split: str, counts: NDArray[np.int64]) -> dict[str, Any]:
    """Writes how often each id occurs in a split. Returns what `shards.json` says of the file."""
    path = directory / f"{split}-token-counts.npy"
    np.save(path, counts)
    content = path.read_bytes()
    return {"name": path.name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


@dataclass(frozen=True)
class ShardCounts:
    """Number of documents and tokens in one split of a source. Some token files of other tools list no documents."""

    documents: int | None
    tokens: int


class TokenShards:
    """One source's shard directory. Only its `shards.json` is read when it is opened.

    Args:
        directory: holds the listing and the counts of ids, and the files of tokens if they are on this machine.
        ranges: reads the files of tokens in object storage. Its path is the address of their folder.

    Raises:
        ValueError: the directory is missing, has another format or another tokenizer, or its `shards.json` is damaged.
    """

    def __init__(self, directory: Path, tokenizer: DocumentTokenizer, ranges: ByteRanges | None = None) -> None:
        self.directory, self._vocab_size, self._ranges = directory, tokenizer.vocab_size, ranges
        path = directory / "shards.json"
        try:
            self.meta = read_json(path)
            version = self.meta["format"]
        except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{directory} is not a shard directory: {path} is missing or damaged") from error
        check_format(str(directory), version)
        try:
            made_with = self.meta["tokenizer"]
            another = made_with["fingerprint"] != tokenizer.fingerprint
            for file in self._listed():
                plain_name(file["name"], "the name of a file")
                if missing := {"bytes", "sha256"} - file.keys():
                    raise KeyError(min(missing))
            self._dtype = np.dtype(self.meta["dtype"])
            self._segments = {split: self._listed_segments(split) for split in SPLITS}
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged ({error}): {self._remedy}") from error
        if another:
            raise ValueError(
                f"{directory} was made with the tokenizer {made_with['name']!r} ({made_with['fingerprint']}), "
                f"the run uses {tokenizer.name!r} ({tokenizer.fingerprint}): make the shards again"
            )

    @property
    def _remedy(self) -> str:
        if self._ranges is not None:
            return f"copy the shards there again; if other shards are there now, delete {self.directory}"
        return f"delete {self.directory} and it will be made again"

    @property
    def place(self) -> str:
        """Where the files of tokens lie, for messages."""
        return str(self.directory) if self._ranges is None else redacted(self._ranges.path)

    def _place(self, name: str) -> Path | str:
        """Returns the path or address of a file of tokens."""
        return self.directory / name if self._ranges is None else f"{self._ranges.path.rstrip('/')}/{name}"

    def _listed(self) -> list[dict[str, Any]]:
        return listed_files(self.meta)

    def _listed_segments(self, split: str) -> list[TokenSegment]:
        # Hundreds of thousands at 6T tokens, at each start of each rank.
        found: list[TokenSegment] = []
        width = self._dtype.itemsize
        for file in self.meta["splits"][split]["files"]:
            path, size = self._place(file["name"]), file["bytes"]
            for offset, tokens in file["segments"]:
                if not 0 <= offset <= offset + tokens * width <= size:
                    raise ValueError(f"{file['name']} has no place for {tokens} tokens at {offset}")
                found.append(TokenSegment(path, offset, tokens))
        total = sum(segment.tokens for segment in found)
        if total != self.meta["splits"][split]["tokens"]:
            raise ValueError(f"the files of {split} have {total:,} tokens")
        return found

    def counts(self, split: str) -> ShardCounts:
        meta = self.meta["splits"][split]
        return ShardCounts(meta["documents"], meta["tokens"])

    def check_sizes(self) -> None:
        """Compares the size of each file with the listing.

        Raises:
            ValueError: a file is missing, or has another size than when it was written.
        """
        ranges = self._ranges
        there = {} if ranges is None else ranges.sizes(ranges.path)
        for file in self._listed():
            name, size = file["name"], file["bytes"]
            place = self._place(name)
            try:
                found = os.stat(place).st_size if ranges is None else there.get(name) or ranges.size(str(place))
            except FileNotFoundError:
                raise ValueError(f"{place} is missing: {self._remedy}") from None
            if found != size:
                raise ValueError(f"{redacted(str(place))} has {found} bytes instead of {size}: {self._remedy}")

    def verify(self) -> None:
        """Reads every file and compares its checksum.

        Raises:
            ValueError: the content of a file has changed.
        """
        self.check_sizes()
        for file in self._listed():
            place = self._place(file["name"])
            if self._ranges is None:
                with open(place, "rb") as content:
                    digest = hashlib.file_digest(content, "sha256").hexdigest()
            else:
                digest = self._ranges.digest(str(place))
            if digest != file["sha256"]:
                raise ValueError(
                    f"{redacted(str(place))} does not hold what was written (sha256 {digest[:12]}… instead of "
                    f"{file['sha256'][:12]}…): {self._remedy}"
                )

    def tokens(self, split: str) -> TokenSequence:
        """Returns the concatenated documents of a split. No file is opened before it is read."""
        files = None
        if self._ranges is not None:
            # A file never changes: the name of its folder, or its checksum, would be another.
            stamps = {str(self._place(file["name"])): file["sha256"] for file in self._listed()}
            files = StampedFiles(self._ranges, stamps)
        return TokenSequence(self._segments[split], self._dtype, self._vocab_size, remedy=self._remedy, files=files)

    def token_counts(self, split: str) -> NDArray[np.int64]:
        """Returns how often each id occurs in a split, (vocab_size,), as it was counted when the split was written.

        Raises:
            ValueError: the file of the counts is missing or damaged.
        """
        path = self.directory / self.meta["splits"][split]["token_counts"]["name"]
        if not path.exists():
            raise ValueError(f"{path} is missing: {self._remedy}")
        with naming_cached(path, self._remedy):
            found = np.load(path)
            if len(found) > self._vocab_size or found.sum() != self.counts(split).tokens:
                raise ValueError(f"its counts are not those of {split}")
            return np.pad(found, (0, self._vocab_size - len(found)))
