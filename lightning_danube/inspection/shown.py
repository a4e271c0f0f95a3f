"""What `inspect` shows of a data module's sources before training: examples as tokens, lengths, rows left out.

A data module that `inspect` can show has the method of `ShowsSources`. It makes the examples with the code that makes
its batches, so that what is shown is what the model gets.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lightning_danube.text.reading import BadRow

PLACES_SHOWN = 8
"""Most rows left out that are named with file and row."""
_LONGEST_CHARACTER = 4
"""Bytes of the longest character in UTF-8: more tokens than these cannot form one character."""


class ShownToken(NamedTuple):
    """A token as the model gets it.

    Args:
        text: what the token adds to the decoded text; empty for a part of a character that a later token completes.
        marked: whether the model learns to say this token, or is measured on it.
        special: whether the token is not text, such as the end of a turn.
    """

    id: int
    text: str
    marked: bool
    special: bool


@dataclass(frozen=True)
class ShownExample:
    """One row, document, conversation, answer or question."""

    title: str
    tokens: Sequence[ShownToken]
    notes: Sequence[str] = ()

    @property
    def marked(self) -> int:
        return sum(token.marked for token in self.tokens)


@dataclass
class ShownSource:
    """What `inspect` shows of one source.

    Args:
        unit: what an example is called, in the plural; empty if examples are not counted.
        place: path of the source.
        read: examples that were read, with those left out.
        complete: whether these are all examples of the source; None if other options decide what is read.
        kept: examples that the model will see.
        lengths: tokens of each example that was kept.
        limit: length that an example is shortened or divided to; None if there is no such length.
        over_limit: what happened to longer examples, such as "shortened", and how many there are.
        marks: what the marked tokens are: "learned", "measured" or "scored"; None if no token is marked.
        marked_tokens, tokens: numbers of tokens in all examples that were kept.
        left_out: cause → number of examples left out.
        places: the first rows left out, each with file, row and reason.
        notes: other facts.
        warnings: reasons why a run would not do what the user wants.
    """

    name: str
    unit: str
    place: str = ""
    read: int = 0
    complete: bool | None = None
    kept: int = 0
    lengths: Sequence[int] = ()
    limit: int | None = None
    over_limit: tuple[str, int] = ("", 0)
    marks: str | None = "learned"
    marked_tokens: int = 0
    tokens: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    places: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    examples: list[ShownExample] = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        """Whether the model learns nothing from this source, or is measured on nothing."""
        return not self.kept or (self.marks in ("learned", "measured") and not self.marked_tokens)


@runtime_checkable
class ShowsSources(Protocol):
    """A data module whose sources can be looked at without a model."""

    def shown_sources(self, examples: int, rows: int) -> Iterator[ShownSource]:
        """Yields what `inspect` shows of each source.

        Args:
            examples: most examples of a source that are shown as tokens.
            rows: most rows of a source that are read, if the source can be read in part.

        Raises:
            ValueError: a source cannot be read at all.
        """


def fit_stops_at(row: BadRow, option: str, kept: int) -> str:
    """Returns the warning for a row that ends a run.

    Args:
        option: the key that makes the run skip such rows.
        kept: number of examples that would be left.
    """
    way_out = f": {option}: skip leaves such rows out" if kept else ", and no other row has anything to learn"
    return f"fit stops at {row.file}, row {row.row}{way_out}"


def causes_of(rows: Iterable[BadRow]) -> tuple[dict[str, int], list[str]]:
    """Returns cause → number of rows left out, the most frequent first, and the messages of the first rows."""
    listed = list(rows)
    return dict(Counter(row.cause for row in listed).most_common()), [row.message for row in listed[:PLACES_SHOWN]]


def shown_tokens(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], marked: Sequence[bool] | None = None
) -> list[ShownToken]:
    """Returns token ids as tokens to show.

    Args:
        marked: for each token whether it is learned or measured; None if no token is.
    """
    backend = tokenizer.backend_tokenizer
    special = {int(i): token.content for i, token in backend.get_added_tokens_decoder().items() if token.special}
    flags = [False] * len(ids) if marked is None else list(marked)
    texts = ["" for _ in ids]
    # Decoders drop the space before a text, so each token is decoded after another token.
    before = backend.encode("a", add_special_tokens=False).ids[-1:]
    head = len(backend.decode(before))
    pending: list[int] = []
    for place, token in enumerate(ids):
        if token in special:
            texts[place], pending = special[token], []
            continue
        pending.append(token)
        text = backend.decode([*before, *pending], skip_special_tokens=False)[head:]
        # The replacement character stands for bytes that are not yet a character.
        if not text.endswith("�") or len(pending) >= _LONGEST_CHARACTER:
            texts[place], pending = text, []
    return [
        ShownToken(token, text, bool(flag), token in special)
        for token, text, flag in zip(ids, texts, flags, strict=True)
    ]


def shortened(tokens: Sequence[ShownToken], head: int, tail: int) -> Iterator[ShownToken | int]:
    """Yields tokens, and a number in place of that many tokens in the middle of a long stretch.

    A stretch has only marked or only unmarked tokens, so the beginning and the end of each answer stay.
    """
    for _, stretch in groupby(tokens, key=lambda token: token.marked):
        part = list(stretch)
        gap = len(part) - head - tail
        if gap <= head // 10:  # a gap as long as its own mark saves nothing
            yield from part
            continue
        yield from part[:head]
        yield gap
        yield from part[-tail:]


def histogram(lengths: Sequence[int], columns: int) -> list[int]:
    """Returns the numbers of lengths in at most `columns` ranges of equal width, from the shortest to the longest."""
    low, high = min(lengths), max(lengths)
    columns = min(columns, high - low + 1)
    counts = [0] * columns
    for length in lengths:
        counts[(length - low) * columns // (high - low + 1)] += 1
    return counts


def sentences_about(shown: ShownSource) -> list[str]:
    """Returns the numbers of a source, one sentence a line."""
    whole = {True: "; all rows were read", False: "; more rows follow (--rows)", None: ""}[shown.complete]
    left_out = shown.read - shown.kept
    lines = (
        []
        if not shown.unit
        else [f"{shown.read:,} {shown.unit} read, {shown.kept:,} kept, {left_out:,} left out{whole}"]
    )
    if shown.tokens:
        marked = ""
        if shown.marks is not None:
            marked = f", {shown.marked_tokens:,} {shown.marks} ({_share(shown.marked_tokens, shown.tokens)})"
        lines.append(f"{shown.tokens:,} tokens{marked}")
    if shown.lengths:
        middle = sorted(shown.lengths)[len(shown.lengths) // 2]
        line = f"lengths in tokens: shortest {min(shown.lengths):,}, median {middle:,}, longest {max(shown.lengths):,}"
        what, count = shown.over_limit
        if what:
            how_many = f"{count:,} ({_share(count, len(shown.lengths))})" if count else "none"
            line += f"; {what} ({shown.limit:,}): {how_many}"
        lines.append(line)
    return [*lines, *shown.notes]


def nothing_seen(shown: ShownSource) -> str:
    """Returns the headline of a source from which nothing is learned."""
    what = "LEARNED FROM" if shown.marks in ("learned", None) else "MEASURED ON"
    return f"NOTHING IS {what} THIS SOURCE"


def _share(part: int, whole: int) -> str:
    return f"{100 * part / max(1, whole):.1f} %"
