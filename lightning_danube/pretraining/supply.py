"""The amount of training text of each source, as far as it is known without reading the text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightning_danube.options import parse_tokens
from lightning_danube.terminal import name_meant
from lightning_danube.text.embedded.documentation import is_collected
from lightning_danube.tokens.finished_shards import is_finished
from lightning_danube.tokens.foreign.listing import ForeignTokens, list_token_files
from lightning_danube.tokens.shards import ShardCounts

if TYPE_CHECKING:
    from lightning_danube.pretraining.settings import CurriculumSettings


@dataclass(frozen=True)
class Supply:
    """Tokens of training text in one epoch over a source, None if unknown, and the origin of this number.

    `document_tokens`: mean tokens of a document, None if unknown.
    """

    tokens: int | None
    said_by: str
    document_tokens: float | None = None

    def rows(self, context_length: int) -> int | None:
        """Returns the rows in one epoch, counted as in shards; None if unknown."""
        return None if self.tokens is None else max(0, self.tokens - 1) // context_length


def parse_source_tokens(text: str | None, sources: Mapping[str, object]) -> dict[str, int]:
    """Returns source → tokens from a text such as "web=10T,wiki=6B".

    Raises:
        ValueError: the text has another form, or names a source that the run does not have.
    """
    stated: dict[str, int] = {}
    for item in text.split(",") if text else ():
        name, equals, tokens = item.strip().partition("=")
        if not equals:
            raise ValueError(f"--source-tokens has {item!r}: write source=tokens, such as web=10T,wiki=6B")
        if name not in sources:
            hint = name_meant(name, sources, "data.sources has")
            raise ValueError(f"--source-tokens names the unknown source {name!r}: {hint}")
        stated[name] = parse_tokens(tokens, f"--source-tokens of {name!r}")
    return stated


def supplies(data: CurriculumSettings, stated: Mapping[str, int]) -> dict[str, Supply]:
    """Returns the supply of each source: the stated tokens, else its shards or token files, else its `max_tokens`.

    Stated tokens and `max_tokens` are reduced by the held-out share.
    """
    found = {}
    for name, source in data.sources.items():
        prepared = _prepared(data, name)
        document = None
        if prepared is not None and prepared.documents is not None:
            document = prepared.tokens / max(1, prepared.documents)
        if name in stated:
            found[name] = Supply(round(stated[name] * (1 - data.held_out)), "--source-tokens", document)
        elif prepared is not None:
            found[name] = Supply(prepared.tokens, "its token files" if source.has_tokens else "its shards", document)
        elif source.max_tokens is not None:
            found[name] = Supply(round(int(source.max_tokens) * (1 - data.held_out)), "max_tokens, at most")
        else:
            found[name] = Supply(None, "not counted yet")
    return found


def _prepared(data: CurriculumSettings, name: str) -> ShardCounts | None:
    source = data.sources[name]
    if source.is_documentation and not is_collected(data.cache_dir):
        return None  # reading its list of files would collect the documentation
    if (
        not is_finished(source.path)
        and not source.has_tokens
        and not any((data.cache_dir / "shards").glob(f"{name}-*"))
    ):
        return None  # the name of a directory needs the tokenizer's fingerprint, which takes a second
    try:
        directory = data.shards_directory(name)
    except ValueError:  # the source's files are elsewhere, or do not exist yet
        return None
    if source.has_tokens:
        directory, _ = list_token_files(name, source, data.tokenizer, data.held_out, data.cache_dir)
        return ForeignTokens(directory, source, data.tokenizer, data.cache_dir).counts("train")
    return data.shard_facts(name).open().counts("train") if directory.exists() else None
