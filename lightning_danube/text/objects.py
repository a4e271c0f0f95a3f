"""Reads JSON objects from files or a hub data set, one object per row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning_danube.text.corpora import Source, is_streamed, local_files, open_stream, place_of_rows
from lightning_danube.text.reading import class_names_of, read_rows


def read_objects(
    name: str, texts: Source, cache_dir: Path, *, called: str | None = None, class_names: bool = False
) -> Iterator[tuple[str, int, Any]]:
    """Yields (file, row from 1, content of the row) of a source, in a fixed order.

    Args:
        called: the source's name in the error for an empty source.
        class_names: give the name of a class for its number, where the data set declares the names (`ClassLabel` of
            `datasets`).

    Raises:
        ValueError: the source cannot be opened, or has no row.
    """
    empty = True
    if is_streamed(texts):
        stream = open_stream(name, texts)
        features = getattr(stream, "features", None) or {}
        names = {column: feature.names for column, feature in features.items() if hasattr(feature, "names")}
        where = place_of_rows(texts)
        for row, values in enumerate(stream, start=1):
            empty = False
            yield where, row, _named(values, names) if class_names else values
    else:
        for file in local_files(name, texts, cache_dir):
            names = class_names_of(file) if class_names else {}
            for row, values in read_rows(file):
                empty = False
                yield file, row, _named(values, names)
    if empty:
        raise ValueError(f"{called or f'source {name!r}'}: {texts.path} holds no rows")


def _named(values: Any, names: Mapping[str, list[str]]) -> Any:
    """Returns a row with the names of its classes. -1 means an unknown class, as in a hub's test split."""
    if not names or not isinstance(values, Mapping):
        return values
    numbers = {column: values[column] for column in names if isinstance(values.get(column), int)}
    known = {column: names[column][number] for column, number in numbers.items() if 0 <= number < len(names[column])}
    return {**values, **{column: None for column, number in numbers.items() if number == -1}, **known}
