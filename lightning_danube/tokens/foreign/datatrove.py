"""datatrove's token files (`DocumentTokenizer`, `DocumentTokenizerMerger`).

`x.ds` holds the ids, uint16 or uint32. `x.ds.index` holds the end of each document in tokens, uint64. `x.ds.metadata`,
which may be missing, holds "tokenizer|bytes of an id", the number of tokens, and that number for people.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lightning_danube.tokens.foreign.layout import TokenFile, TokenFormat, TokenGroup, with_suffix
from lightning_danube.tokens.foreign.ranges import ByteRanges, FoundFile
from lightning_danube.tokens.tokenizer import DocumentTokenizer

SUFFIX = ".ds"
_INDEX = ".index"
_BESIDE = (_INDEX, ".metadata", ".loss")
_TYPES = {2: "uint16", 4: "uint32"}


class Datatrove(TokenFormat):
    title = "datatrove"

    def find(self, ranges: ByteRanges, path: str) -> list[FoundFile]:
        return [file for beside in ("", *_BESIDE) for file in ranges.find(path + beside)]

    def groups(self, ranges: ByteRanges, found: Sequence[FoundFile], tokenizer: DocumentTokenizer) -> list[TokenGroup]:
        named = {file.path: file for file in found}
        for index in with_suffix(found, f"{SUFFIX}{_INDEX}"):
            if (path := index.path.removesuffix(_INDEX)) not in named:
                raise ValueError(f"{path} is missing, to which {index.path} belongs: copy it beside its index")
        return [self._group(ranges, file, named) for file in with_suffix(found, SUFFIX)]

    def _group(self, ranges: ByteRanges, file: FoundFile, named: dict[str, FoundFile]) -> TokenGroup:
        path = file.path
        if not file.bytes:
            raise ValueError(f"{path} is empty: remove it, or make it again with datatrove")
        if f"{path}.loss" in named:
            raise ValueError(
                f"{path}.loss leaves tokens out of the loss, which is not read here: remove it to train on all tokens"
            )
        index = named.get(path + _INDEX)
        if index is None:
            raise ValueError(f"{path}{_INDEX} is missing, which lists the ends of documents: copy it beside {path}")
        if not index.bytes or index.bytes % 8:
            raise ValueError(
                f"{index.path} has {index.bytes:,} bytes, not 8 for each document: it was cut off; copy it again"
            )
        documents = index.bytes // 8
        tokens = int(_ends(ranges, index, documents - 1, documents)[0])
        size, tokenizer = file.bytes / tokens if tokens else 0, None
        if metadata := named.get(f"{path}.metadata"):
            tokenizer, size, said = _read_metadata(ranges, metadata)
            if said != tokens:
                raise ValueError(
                    f"{index.path} lists {tokens:,} tokens, and {metadata.path} {said:,}: one of them was cut off; "
                    "copy both again"
                )
        if size not in _TYPES or tokens * size != file.bytes:
            raise ValueError(
                f"{path} has {file.bytes:,} bytes, and its index lists {tokens:,} tokens of 2 or 4 bytes each: the "
                "file or its index was cut off; copy both again"
            )
        described = TokenFile(path, f"{file.stamp} {index.stamp}", _TYPES[int(size)], tokens)
        return TokenGroup((described,), documents, tokenizer)

    def document_ends(self, ranges: ByteRanges, group: TokenGroup, first: int, stop: int) -> NDArray[np.int64]:
        (file,) = group.files
        return _ends(ranges, FoundFile(file.path + _INDEX, 0, file.stamp), first, stop)


def _ends(ranges: ByteRanges, index: FoundFile, first: int, stop: int) -> NDArray[np.int64]:
    return np.frombuffer(ranges.read(index.path, 8 * first, 8 * stop, index.stamp), dtype="<u8").astype(np.int64)


def _read_metadata(ranges: ByteRanges, file: FoundFile) -> tuple[str | None, int, int]:
    """Returns the name of the tokenizer, None if it was not known; the bytes of an id; and the number of tokens."""
    try:
        first, said, *_ = bytes(ranges.read(file.path, 0, file.bytes, file.stamp)).decode().split("\n")
        *name, size = first.split("|")
        # Without a name, datatrove writes "Unknown Tokenizer|2|2".
        known = None if name[0] == "Unknown Tokenizer" else "|".join(name)
        return known, int(size), int(said)
    except (ValueError, IndexError) as error:
        raise ValueError(
            f"{file.path} is damaged, it should say tokenizer|bytes of an id, and the number of tokens: remove it, and "
            "the tokenizer is not compared"
        ) from error
