"""JSON objects, a row each, from a file or a hub set."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning_danube.text.corpora import Source, is_streamed, local_files, open_stream, stream_name
from lightning_danube.text.reading import read_rows


def read_objects(
    name: str, texts: Source, cache_dir: Path, *, called: str | None = None
) -> Iterator[tuple[str, int, Any]]:
    """(file, row from 1, what stands there) of a source, in a fixed order; an error calls it `called`.

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
