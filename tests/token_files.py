"""Sequences of made-up tokens in files."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lightning_danube.tokens.token_sequence import TokenSegment, TokenSequence


def sequence_of(
    directory: Path, segments: Sequence[Any], vocab_size: int, names: Sequence[str] | None = None, **options: Any
) -> TokenSequence:
    """Writes each array into a separate file, or after those of the same name, and returns them as one sequence."""
    directory.mkdir(parents=True, exist_ok=True)
    places = []
    for number, tokens in enumerate(segments):
        path = directory / (names[number] if names else f"{number}.arrow")
        with open(path, "ab") as file:
            places.append(TokenSegment(path, file.tell(), len(tokens)))
            file.write(tokens.tobytes())
    dtype = segments[0].dtype if len(segments) else np.dtype(np.uint16)
    return TokenSequence(places, dtype, vocab_size, remedy=f"delete {directory} and it will be made again", **options)


class HeldFiles:
    """Files whose bytes are those of arrays in memory."""

    def __init__(self, files: dict[Path, Any]) -> None:
        self._files = files

    def read(self, path: Path | str, begin: int, end: int) -> Any:
        return self._files[Path(path)].view(np.uint8)[begin:end]


def sequence_in_memory(segments: Sequence[Any], vocab_size: int, names: Sequence[str] | None = None) -> TokenSequence:
    """Returns arrays, of which each is a file, as one sequence."""
    paths = [Path("shards") / name for name in names or [f"{number}.arrow" for number in range(len(segments))]]
    places = [TokenSegment(path, 0, len(tokens)) for path, tokens in zip(paths, segments, strict=True)]
    files = HeldFiles(dict(zip(paths, segments, strict=True)))
    return TokenSequence(places, segments[0].dtype, vocab_size, remedy="delete shards", files=files)


def noting(function: Callable[..., Any], note: Callable[..., object]) -> Callable[..., Any]:
    """Returns the function, which first calls another one with its arguments."""

    def call(*arguments: Any) -> Any:
        note(*arguments)
        return function(*arguments)

    return call
