"""What is known of a source's token files: made once, kept in the cache, and read at every start.

Making it reads the sizes of the files, their indexes in part, and at most `COUNTED` ids. It chooses the held-out part.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_danube.files import naming_cached, new_folder, read_regular, read_sealed, write_sealed
from lightning_danube.outside.secrets import redacted
from lightning_danube.terminal import amount
from lightning_danube.text.corpora import Source, is_mosaic
from lightning_danube.tokens.foreign.datatrove import Datatrove
from lightning_danube.tokens.foreign.layout import TokenFormat, TokenGroup
from lightning_danube.tokens.foreign.megatron import Megatron
from lightning_danube.tokens.foreign.mosaic import Mosaic
from lightning_danube.tokens.foreign.olmo import Olmo
from lightning_danube.tokens.foreign.ranges import ByteRanges, FoundFile
from lightning_danube.tokens.foreign.sequence import ForeignSequence, Piece
from lightning_danube.tokens.shards import SPLITS, ShardCounts
from lightning_danube.tokens.tokenizer import DocumentTokenizer

_FORMAT = 2
_LISTING, _COUNTS = "listing.json", "token-counts.npy"
AGREES = 0.8
"""Least share of sampled documents to whose text the run's tokenizer gives the same ids; else it is another tokenizer.
With the right tokenizer the share is 1, or a little less for texts that decoding changes; with others it is about 0."""
_ENDS_AT_ONCE = 4096
_SCANNED_AT_ONCE = 1 << 16
_MOST_SCANNED = 1 << 26
_CHECKED_ENDS = 64
_READ_AT_ONCE = 1 << 22
_COMPARED_DOCUMENTS, _COMPARED_IDS, _UNSURE_IDS, _COMPARED_WINDOW = 32, 64, 16, 1 << 14


def format_named(path: str) -> TokenFormat:
    """Returns the reader of the files that a source's path names."""
    suffix = os.path.splitext(path)[1]
    kinds: dict[str, type[TokenFormat]] = {".ds": Datatrove, ".bin": Megatron, ".idx": Megatron, ".npy": Olmo}
    # A directory or a listing whose files have gone meanwhile is MosaicML's, too: its reader names what is missing.
    return Mosaic() if is_mosaic(path) else kinds.get(suffix, Mosaic)()


def listing_directory(
    name: str, source: Source, tokenizer: DocumentTokenizer, held_out: float, cache_dir: Path
) -> Path:
    """Returns the folder of a source's listing, which is there after `list_token_files`.

    Its name changes with the files' sizes and times, with the tokenizer, and with the held-out share.

    Raises:
        ValueError: there is no file, or the store is out of reach.
    """
    found = _found(name, source, cache_dir)
    facts = [_FORMAT, source.path, tokenizer.fingerprint, held_out, [list(vars(file).values()) for file in found]]
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]
    return cache_dir / "token-files" / f"{name}-{digest}"


def _found(name: str, source: Source, cache_dir: Path) -> list[FoundFile]:
    with _naming(name):
        found = format_named(source.path).find(ByteRanges(source.path, cache_dir), source.path)
        if not found:
            raise ValueError(f"there is no file {redacted(source.path)}")
    return found


def list_token_files(
    name: str, source: Source, tokenizer: DocumentTokenizer, held_out: float, cache_dir: Path
) -> tuple[Path, float]:
    """Returns the folder of a source's listing, and the seconds that making it took: 0 if it was there.

    Making it checks the files.

    Raises:
        ValueError: a file is missing, damaged, or was made with another tokenizer; or an option of the source has no
            effect on token files.
    """
    directory = listing_directory(name, source, tokenizer, held_out, cache_dir)
    if all((directory / file).exists() for file in (_LISTING, _COUNTS)):
        return directory, 0.0
    began = time.monotonic()
    with _naming(name):
        _check_options(source)
        ranges, kind = ByteRanges(source.path, cache_dir), format_named(source.path)
        groups = kind.groups(ranges, kind.find(ranges, source.path), tokenizer)
        groups = list(_divided(kind, ranges, groups, tokenizer, held_out))
        facts = _checked_facts(kind, ranges, groups, tokenizer)
        counts = facts.pop("counts")
    with new_folder(directory, replace=directory.exists()) as partial:
        np.save(partial / _COUNTS, counts)
        facts |= {"counts_sha256": _hash_of(partial / _COUNTS), "groups": [group.as_json() for group in groups]}
        write_sealed(partial / _LISTING, {"format": kind.title, **facts})
    return directory, time.monotonic() - began


def _hash_of(file: Path) -> str:
    return hashlib.sha256(read_regular(file)).hexdigest()


class _naming:
    """Puts the name of the source before a message."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, ValueError):
            raise ValueError(f"source {self._name!r}: {error}") from error


def _check_options(source: Source) -> None:
    for field in fields(Source):
        value = getattr(source, field.name)
        if field.name not in ("path", "filters") and value != field.default:
            raise ValueError(f"{field.name} is {value!r}, which has no effect on token files: leave it out")


# --- the held-out part ------------------------------------------------------------------------------------------------


def _divided(
    kind: TokenFormat, ranges: ByteRanges, groups: Sequence[TokenGroup], tokenizer: DocumentTokenizer, held_out: float
) -> Iterator[TokenGroup]:
    """Yields the groups with their cuts.

    In the order of the files, each group gives its last documents: as many as are needed for the share of all tokens so
    far, none if the groups before have given enough.
    """
    seen = given = 0
    for group in groups:
        seen += group.tokens
        wanted = math.ceil(held_out * seen) - given
        cut = group.tokens
        documents = 0
        if wanted > 0:
            latest = max(0, group.tokens - wanted)
            if group.documents is None:
                cut = _end_token_before(kind, ranges, group, latest, tokenizer)
            else:
                first, cut = _document_at(kind, ranges, group, latest)
                if first:
                    _check_end(kind, ranges, group, tokenizer, first - 1, cut)
                documents = group.documents - first
        given += group.tokens - cut
        yield replace(group, cut=cut, held_out_documents=documents)


def _document_at(kind: TokenFormat, ranges: ByteRanges, group: TokenGroup, latest: int) -> tuple[int, int]:
    """Returns the number of the last document that begins at or before token `latest`, and its first token."""
    assert group.documents is not None
    low, high = 0, (group.documents - 1) // _ENDS_AT_ONCE  # blocks of ends
    while low < high:  # the first block whose last document ends behind `latest`
        middle = (low + high) // 2
        last = min((middle + 1) * _ENDS_AT_ONCE, group.documents)
        if int(kind.document_ends(ranges, group, last - 1, last)[0]) > latest:
            high = middle
        else:
            low = middle + 1
    begin = max(0, low * _ENDS_AT_ONCE - 1)
    ends = kind.document_ends(ranges, group, begin, min((low + 1) * _ENDS_AT_ONCE, group.documents))
    starts = ends if low else np.concatenate([[0], ends])  # starts[n] belongs to document n + first
    first = begin + 1 if low else 0
    place = int(np.searchsorted(starts, latest, side="right")) - 1
    return first + place, int(starts[place])


def _end_token_before(
    kind: TokenFormat, ranges: ByteRanges, group: TokenGroup, latest: int, tokenizer: DocumentTokenizer
) -> int:
    """Returns the last place at or before token `latest` where a document begins, by the end token before it."""
    tokens = ForeignSequence(kind, ranges, _pieces(group, 0, group.tokens), tokenizer)
    stop = latest
    while stop > max(0, latest - _MOST_SCANNED):
        start = max(0, stop - _SCANNED_AT_ONCE)
        places = np.flatnonzero(tokens.read(start, stop) == tokenizer.eos_id)
        if len(places):
            return start + int(places[-1]) + 1
        stop = start
    if stop:
        raise ValueError(
            f"{redacted(group.files[0].path)} has no end token {tokenizer.eos_id} among {_MOST_SCANNED:,} tokens: "
            "documents have to end with it, or the held-out part would share a document with training"
        )
    return 0


def _pieces(group: TokenGroup, start: int, stop: int) -> list[Piece]:
    """Returns the ids [start, stop) of a group as pieces of its files."""
    ends = list(accumulate((file.tokens for file in group.files), initial=0))
    pieces = [
        Piece(file, max(start - first, 0), min(stop - first, file.tokens))
        for file, first in zip(group.files, ends, strict=False)
    ]
    return [piece for piece in pieces if piece.start < piece.stop]


# --- checks -----------------------------------------------------------------------------------------------------------


def _checked_facts(
    kind: TokenFormat, ranges: ByteRanges, groups: Sequence[TokenGroup], tokenizer: DocumentTokenizer
) -> dict[str, Any]:
    """Checks a sample of the ids and of the ends of documents. Returns what is kept in the listing.

    Raises:
        ValueError: an id is not in the vocabulary, a document does not end with the end token, or the ids are those of
            another tokenizer.
    """
    pieces = [piece for group in groups for piece in _pieces(group, 0, group.cut)]
    train = ForeignSequence(kind, ranges, pieces, tokenizer)
    counts = train.token_counts()
    checked = 0
    for group in groups:
        if group.documents is not None:
            share = max(1, _CHECKED_ENDS // len(groups))
            checked += _check_ends(kind, ranges, group, tokenizer, share)
    if groups[0].documents is None and not (counts[tokenizer.eos_id] or _end_whole(kind, ranges, groups, tokenizer)):
        raise ValueError(
            f"none of {sum(group.tokens for group in groups):,} tokens that were looked at is the end token "
            f"{tokenizer.eos_id} of the tokenizer {tokenizer.name!r}: the documents have no ends, or another tokenizer "
            "made them"
        )
    named = sorted({group.tokenizer for group in groups if group.tokenizer is not None})
    agreement, begun = _agreement(train, tokenizer)
    for other in named:
        if other != tokenizer.name and agreement is not None and agreement < AGREES:
            raise ValueError(
                f"the files name the tokenizer {other!r}, and {tokenizer.name!r} gives the ids of the files to only "
                f"{agreement:.0%} of the sampled documents: set data.tokenizer to the one that made the files"
            )
    return {
        "files": sum(len(group.files) for group in groups),
        "tokenizers": named,
        "agreement": agreement,
        "begin_token": begun,
        "ends_checked": checked,
        "counted": int(counts.sum()),
        "counts": counts,
    }


def _end_whole(
    kind: TokenFormat, ranges: ByteRanges, groups: Sequence[TokenGroup], tokenizer: DocumentTokenizer
) -> bool:
    """Returns whether the last token of each group is the end token."""
    last = (group.files[-1] for group in groups)
    return all(kind.read(ranges, file, file.tokens - 1, file.tokens)[0] == tokenizer.eos_id for file in last)


def _check_ends(
    kind: TokenFormat, ranges: ByteRanges, group: TokenGroup, tokenizer: DocumentTokenizer, most: int
) -> int:
    """Checks that evenly spread documents of a group end with the end token. Returns their number."""
    assert group.documents is not None
    numbers = sorted({(group.documents - 1) * number // max(1, most - 1) for number in range(most)})
    for number in numbers:
        end = int(kind.document_ends(ranges, group, number, number + 1)[0])
        _check_end(kind, ranges, group, tokenizer, number, end)
    return len(numbers)


def _check_end(
    kind: TokenFormat, ranges: ByteRanges, group: TokenGroup, tokenizer: DocumentTokenizer, number: int, end: int
) -> None:
    (file,) = group.files
    if not 0 <= end <= file.tokens:
        raise ValueError(f"{redacted(file.path)}: the index is damaged, document {number + 1:,} ends at token {end:,}")
    last = int(kind.read(ranges, file, end - 1, end)[0]) if end else None
    if last != tokenizer.eos_id:
        raise ValueError(
            f"{redacted(file.path)}: document {number + 1:,} ends with token {last}, not with the end token "
            f"{tokenizer.eos_id} of the tokenizer {tokenizer.name!r}: make the files with an end token (datatrove "
            "eos_token, Megatron --append-eod), or name their tokenizer"
        )


def _agreement(train: ForeignSequence, tokenizer: DocumentTokenizer) -> tuple[float | None, bool]:
    """Returns the share of sampled documents to whose text the tokenizer gives the ids of the file again, None if no
    document was found; and whether a document begins with the begin token.

    Only the beginning of a document is compared. The end of a cut text may be encoded otherwise.
    """
    same = compared = 0
    begun = False
    last = max(0, len(train) - _COMPARED_WINDOW)
    for number in range(_COMPARED_DOCUMENTS):
        start = last * number // (_COMPARED_DOCUMENTS - 1)
        window = train.read(start, min(start + _COMPARED_WINDOW, len(train)))
        ends = np.flatnonzero(window == tokenizer.eos_id).tolist()
        begin = 0 if not start else ends[0] + 1 if ends else len(window)
        end = next((end for end in ends if end >= begin), len(window))
        ids = window[begin : min(end, begin + _COMPARED_IDS)]
        if len(ids) and ids[0] == tokenizer.bos_id:
            ids, begun = ids[1:], True
        if not len(ids):
            continue
        (again,) = tokenizer.encode_documents([tokenizer.text(ids)])
        again = again[int(tokenizer.bos_id is not None) : -1]
        if end - begin > _COMPARED_IDS:  # the text was cut
            ids, again = ids[:-_UNSURE_IDS], again[: len(ids) - _UNSURE_IDS]
        same += np.array_equal(ids, again)
        compared += 1
    return (same / compared if compared else None), begun


# --- the source -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenFacts:
    """What a listing says of a source.

    Args:
        title: name of the tool that writes the format.
        files: number of files.
        tokenizers: names of tokenizers that the files give.
        agreement: share of sampled documents to whose text the run's tokenizer gives the same ids; None without any.
        begin_token: whether a sampled document begins with the tokenizer's begin token.
        ends_checked: documents whose end token was looked at.
        counted: ids that were read, compared with the vocabulary, and counted.
    """

    title: str
    files: int
    tokenizers: tuple[str, ...]
    agreement: float | None
    begin_token: bool
    ends_checked: int
    counted: int


class ForeignTokens:
    """The token files of one source, opened by their listing. No file is opened before its tokens are read.

    Args:
        directory: the folder of the listing.
    """

    def __init__(self, directory: Path, source: Source, tokenizer: DocumentTokenizer, cache_dir: Path) -> None:
        self.directory, self._tokenizer = directory, tokenizer
        with naming_cached(directory / _LISTING):
            listing = read_sealed(directory / _LISTING)
            self._counts_sha256 = listing["counts_sha256"]
            self._groups = [TokenGroup.of_json(group) for group in listing["groups"]]
            self.facts = TokenFacts(
                listing["format"],
                listing["files"],
                tuple(listing["tokenizers"]),
                listing["agreement"],
                listing["begin_token"],
                listing["ends_checked"],
                listing["counted"],
            )
        self._kind, self._ranges = format_named(source.path), ByteRanges(source.path, cache_dir)

    def counts(self, split: str) -> ShardCounts:
        held_out = split == SPLITS[1]
        tokens = sum(group.tokens - group.cut if held_out else group.cut for group in self._groups)
        documents = 0
        for group in self._groups:
            if group.documents is None:
                return ShardCounts(None, tokens)
            documents += group.held_out_documents if held_out else group.documents - group.held_out_documents
        return ShardCounts(documents, tokens)

    def tokens(self, split: str) -> ForeignSequence:
        """Returns the ids of a split as one sequence."""
        pieces: list[Piece] = []
        for group in self._groups:
            start, stop = (group.cut, group.tokens) if split == SPLITS[1] else (0, group.cut)
            pieces += _pieces(group, start, stop)
        return ForeignSequence(self._kind, self._ranges, pieces, self._tokenizer)

    def token_counts(self, split: str) -> NDArray[np.int64]:
        """Returns how often each id occurs in the training tokens that were counted, (vocab_size,)."""
        assert split == SPLITS[0], "held-out tokens are not counted"
        path = self.directory / _COUNTS
        with naming_cached(path):
            if _hash_of(path) != self._counts_sha256:
                raise ValueError("its content changed since it was written")
            counts: NDArray[np.int64] = np.load(path)
        return counts

    def described(self) -> str:
        """Returns a line with the number of files, documents and tokens, and of what was checked."""
        facts, train, held_out = self.facts, self.counts(SPLITS[0]), self.counts(SPLITS[1])
        tokens = train.tokens + held_out.tokens
        documents = ""
        if train.documents is not None and held_out.documents is not None:
            documents = f" in {amount(train.documents + held_out.documents, 'document')}"
        checked = [f"{facts.counted:,} ids"]
        if facts.ends_checked:
            checked.append(f"the ends of {amount(facts.ends_checked, 'document')}")
        if facts.agreement is not None:
            checked.append("the tokenizer")
        return (
            f"{self._files}, {tokens:,} tokens{documents}, of which "
            f"{held_out.tokens:,} are held out; checked: {_listed(checked)}"
        )

    @property
    def _files(self) -> str:
        return f"{self.facts.files:,} {self.facts.title} file{'s' * (self.facts.files > 1)}"

    def doubt(self) -> str | None:
        """Returns a doubt about the tokenizer, which the format does not name, or None."""
        agreement = self.facts.agreement
        if agreement is None or agreement >= AGREES:
            return None
        return (
            f"the tokenizer {self._tokenizer.name!r} gives the ids of the files to only {agreement:.0%} of the sampled "
            "documents: see by inspect whether the text is right, or set data.tokenizer to the one that made the files"
        )

    def verify(self) -> str:
        """Reads all files. Compares every id with the vocabulary, and the last token of every document that an index
        lists with the end token. Returns a line that says what was right.

        Raises:
            ValueError: an id, an end or an index is wrong; names file and place.
        """
        for group in self._groups:
            sequence = ForeignSequence(self._kind, self._ranges, _pieces(group, 0, group.tokens), self._tokenizer)
            for start in range(0, len(sequence), _READ_AT_ONCE):
                sequence.read(start, min(start + _READ_AT_ONCE, len(sequence)))
            before = 0
            for first in range(0, group.documents or 0, _ENDS_AT_ONCE):
                stop = min(first + _ENDS_AT_ONCE, group.documents or 0)
                ends = self._kind.document_ends(self._ranges, group, first, stop)
                if (np.diff(ends, prepend=before) <= 0).any():
                    number = first + int(np.argmax(np.diff(ends, prepend=before) <= 0))
                    raise ValueError(
                        f"{redacted(group.files[0].path)}: the index is damaged, document {number + 1:,} ends before "
                        "it begins: copy it again"
                    )
                for number, end in enumerate(ends.tolist(), start=first):
                    _check_end(self._kind, self._ranges, group, self._tokenizer, number, end)
                before = int(ends[-1])
        tokens = sum(group.tokens for group in self._groups)
        documents = sum(group.documents or 0 for group in self._groups)
        of_documents = f" and the ends of all {documents:,} documents" if documents else ""
        return f"all {tokens:,} ids{of_documents} are right, in {self._files}"


def _listed(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
