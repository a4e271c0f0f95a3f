"""Reads JSON objects from files or a hub data set, one object per row."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning_danube.text.corpora import Source, is_streamed, local_files, open_stream, stream_name
from lightning_danube.text.reading import read_rows


def read_objects(
    name: str, texts: Source, cache_dir: Path, *, called: str | None = None
) -> Iterator[tuple[str, int, Any]]:
    """Yields (file, row from 1, content of the row) of a source, in a fixed order.

    Args:
        called: the source's name in the error for an empty source.

    Raises:
        ValueError: the source cannot be opened, or has no row.
    """
    empty = True
    if is_streamed(texts):
        for row, values in enumerate(open_stream(name, texts), start=1):
            empty = False
            yield stream_name(texts), row, values
    else:
        for file in local_files(name, texts, cache_dir):
            for row, values in read_rows(file):
                empty = False
                yield file, row, values
    if empty:
        raise ValueError(f"{called or f'source {name!r}'}: {texts.path} holds no rows")
