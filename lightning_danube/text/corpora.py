"""Sources of text: how a user names a source in YAML, and where its documents come from.

Local files (jsonl, csv, tsv, parquet, text; plain, .gz or .zst) are read by `reading`, because an error must name the
file and the row. In a directory, links are followed, and hidden files and data set cards are left out, as `datasets`
does. Hub ids and directories of `save_to_disk` are read row by row through `datasets`. So a run that needs a part of a
huge data set never stores all of it on disk.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lightning_danube.files import looks_like_path, read_json
from lightning_danube.options import parse_tokens
from lightning_danube.terminal import tell
from lightning_danube.text.embedded.documentation import ROLES, collect_documentation
from lightning_danube.text.embedded.world import ROLES as WORLD_ROLES
from lightning_danube.text.embedded.world import WORLD, write_world
from lightning_danube.text.reading import (
    FORMATS,
    BadRow,
    DamagedFile,
    Document,
    documents_of,
    format_of,
    has_separator,
    read_file,
)

DOCUMENTATION = "documentation:"
NOT_DATA = ("readme.md", "config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
"""Names of files that describe a data set. They are not documents of a directory; a path or a glob may name them."""
TOKEN_FILES = (".ds", ".bin", ".idx", ".npy")
"""Endings of files that hold token ids: of datatrove, of Megatron (two of them), and of OLMo."""
MOSAIC = "index.json"
"""The file that lists the token files of MosaicML, with the ending .mds, in its directory."""


@dataclass(frozen=True)
class Source:
    """A source of documents.

    Args:
        path: "documentation:web" (or wiki, academic, synthetic, instruct: the embedded texts), "world:clean" or
            "world:noisy" (a made-up world with countable facts), a file, a directory or a glob of files, a directory
            written by `save_to_disk` of `datasets` (of one split or of several), or a hub id such as
            "HuggingFaceFW/fineweb-edu". In pre-training also token files of other tools, such as "tokens/*.ds"
            (docs/token-files.md).
        text: the column that holds the text, or a pattern of several columns, such as "{question} {answer}"; ignored
            for plain text files.
        name: configuration of a hub data set, for example "sample-10BT".
        split: split of a hub data set, or of a directory written by `save_to_disk` that has several splits.
        revision: commit or tag of a hub data set; give it so that the source can be made again later.
        separator: the text that ends a document inside a plain text file, for example "\\n" for one document per line.
            Without a separator, a file is one document. "\\n" also stands for the line ends of Windows.
        max_tokens: approximate number of tokens, such as "10B", after which reading stops; duplicates count. Use it for
            hub data sets that are larger than the run needs.
        on_bad_row: "error" refuses a source with an unreadable row, and names file and row; "skip" continues and
            writes the rejected rows to rejected.jsonl beside the shards.
        filters: whether `data.filters` apply to this source; they are made for prose, so set false for code.
    """

    path: str
    text: str = "text"
    name: str | None = None
    split: str = "train"
    revision: str | None = None
    separator: str | None = None
    max_tokens: int | str | None = None
    on_bad_row: Literal["error", "skip"] = "error"
    filters: bool = True

    def __post_init__(self) -> None:
        if self.max_tokens is not None:
            object.__setattr__(self, "max_tokens", parse_tokens(self.max_tokens, "max_tokens"))
        if self.separator == "":
            raise ValueError('separator is empty: give what ends a document, for example "\\n", or leave it out')

    @property
    def is_documentation(self) -> bool:
        return self.path.startswith(DOCUMENTATION)

    @property
    def has_tokens(self) -> bool:
        """Whether the path names token files that another tool wrote, instead of texts."""
        return names_token_files(self.path)

    @property
    def is_hub(self) -> bool:
        """Whether the path is a hub id like owner/name. A path that exists, or is meant as a path or file, is local."""
        if self.is_documentation or self.has_tokens or os.path.exists(self.path):
            return False
        is_local = looks_like_path(self.path) or format_of(self.path) or glob.has_magic(self.path)
        return not is_local and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", self.path) is not None


def names_token_files(path: str) -> bool:
    """Returns whether a source's path, a glob or an address names token files by its ending, or lists those of MDS."""
    return path.endswith(TOKEN_FILES) or is_mosaic(path)


def is_mosaic(path: str) -> bool:
    """Returns whether a path names `index.json` beside MosaicML's token files, or a directory with both.

    At an address, `index.json` is always MosaicML's. On this machine, a file of texts may have this name.
    """
    if re.match(r"[A-Za-z][\w+.-]*://", path):
        return path.endswith(f"/{MOSAIC}")
    path = os.path.expanduser(path)
    folder = path if os.path.isdir(path) else os.path.dirname(path) or "."
    if folder != path and os.path.basename(path) != MOSAIC:
        return False
    return bool(
        glob.glob(os.path.join(pattern_of(folder), MOSAIC)) and glob.glob(os.path.join(pattern_of(folder), "*.mds*"))
    )


def local_files(name: str, source: Source, cache_dir: Path) -> list[str]:
    """Returns the files of a local source, sorted. Missing embedded texts are collected first.

    Raises:
        ValueError: there is no file, or a file has no known format.
    """
    if source.is_documentation:
        role = source.path.removeprefix(DOCUMENTATION)
        if role not in ROLES:
            raise ValueError(
                f"source {name!r} asks for {source.path!r}: the embedded texts are "
                + ", ".join(DOCUMENTATION + known for known in ROLES)
            )
        return [str(collect_documentation(cache_dir)[role])]
    if source.path.startswith(f"{WORLD}:"):
        role = source.path.removeprefix(f"{WORLD}:")
        if role not in WORLD_ROLES:
            raise ValueError(
                f"source {name!r} asks for {source.path!r}: of the made-up world there are "
                + " and ".join(f"{WORLD}:{known}" for known in WORLD_ROLES)
            )
        return [str(write_world(cache_dir)[role])]
    path = os.path.expanduser(source.path)
    if os.path.isdir(path):
        files = [str(file) for file in sorted(_data_files(name, path))]
        if not files:
            raise ValueError(
                f"source {name!r}: the directory {source.path} holds no file of a known format "
                f"({', '.join(sorted(FORMATS))}, plain or with .gz or .zst)"
            )
        return files
    files = [path] if os.path.exists(path) else sorted(glob.glob(pattern_of(path), recursive=True))
    files = [file for file in files if os.path.isfile(file)]
    if not files:
        raise ValueError(f"source {name!r}: there is no file {source.path}")
    for file in files:
        if not format_of(file):
            raise ValueError(
                f"source {name!r}: {file} has no known format ({', '.join(sorted(FORMATS))}, plain or with .gz or .zst)"
            )
    return files


def _data_files(name: str, directory: str, above: tuple[str, ...] = ()) -> Iterator[Path]:
    """Yields the files of a known format below a directory, without hidden files and `NOT_DATA`. Follows links.

    Args:
        above: the directories in which this one was found; a link back to one of them is not followed.

    Raises:
        ValueError: a link leads nowhere.
    """
    above = (*above, os.path.realpath(directory))
    for one in sorted(os.listdir(directory)):
        path = os.path.join(directory, one)
        if one.startswith("."):
            continue
        if os.path.isdir(path):
            if os.path.realpath(path) not in above:
                yield from _data_files(name, path, above)
        elif format_of(one) and one.lower() not in NOT_DATA:
            if os.path.isfile(path):
                yield Path(path)
            elif os.path.islink(path):
                raise ValueError(
                    f"source {name!r}: {path} is a link to a file that does not exist: remove or correct it"
                )


def pattern_of(path: str) -> str:
    """Returns a glob in which the directories that exist are names, even if they hold "[", "*" or "?"."""
    parts = path.split("/")
    known = 0
    while known < len(parts) - 1 and os.path.isdir("/".join(parts[: known + 1]) or "/"):
        known += 1
    return "/".join([glob.escape(part) for part in parts[:known]] + parts[known:])


def is_saved_dataset(source: Source) -> bool:
    """Returns whether the path is a directory that `save_to_disk` of `datasets` wrote, of one split or of several."""
    path = Path(source.path).expanduser()
    return any((path / marker).is_file() for marker in ("state.json", "dataset_dict.json"))


def saved_directory(name: str, source: Source) -> Path:
    """Returns the directory of the source's split within a directory that `save_to_disk` wrote.

    Raises:
        ValueError: several splits were saved, and none has this name.
    """
    path = Path(source.path).expanduser()
    if not (path / "dataset_dict.json").is_file():
        return path
    splits = read_json(path / "dataset_dict.json").get("splits")
    if not isinstance(splits, list):
        raise ValueError(f"source {name!r}: {path / 'dataset_dict.json'} is damaged: it lists no splits")
    if source.split not in splits:
        raise ValueError(
            f"source {name!r}: {source.path} has no split {source.split!r}, only {', '.join(map(str, splits))}: name "
            "one with split"
        )
    return path / source.split


def separator_warning(name: str, source: Source, cache_dir: Path) -> str | None:
    """Returns a warning if the separator of a source is in none of its plain text files.

    Raises:
        ValueError: the source has no file, or a file cannot be read.
    """
    if source.separator is None or is_streamed(source):
        return None
    files = [file for file in local_files(name, source, cache_dir) if format_of(file) == "text"]
    if not files or any(has_separator(file, source.separator) for file in files):
        return None
    return (
        f"source {name!r}: the separator {source.separator!r} occurs nowhere in {source.path}, so each file is one "
        "document: correct the separator, or leave it out"
    )


def read_documents(name: str, source: Source, cache_dir: Path) -> Iterator[Document]:
    """Yields all documents of a source in a fixed order. Rows whose text is null or blank are left out.

    Raises:
        ValueError: bytes are not UTF-8, a row does not parse, or a text is missing or no string. Names file and row.
        ValueError: the source cannot be opened. Names the source.
    """
    if (warning := separator_warning(name, source, cache_dir)) is not None:
        tell(f"warning: {warning}")
    for row in documents_and_bad_rows(name, source, cache_dir):
        if isinstance(row, BadRow):
            raise DamagedFile(row.message)
        yield row


def documents_and_bad_rows(name: str, source: Source, cache_dir: Path) -> Iterator[Document | BadRow]:
    """Yields all documents of a source in a fixed order, and the rows that have no usable text.

    Raises:
        ValueError: the source cannot be opened, or a file cannot be read as a whole.
    """
    if is_streamed(source):
        yield from read_stream(name, source)
        return
    for file in local_files(name, source, cache_dir):
        yield from read_file(file, source.text, source.separator)


def is_streamed(source: Source) -> bool:
    """Returns whether `datasets` reads the source, row after row."""
    return source.is_hub or is_saved_dataset(source)


def read_stream(name: str, source: Source) -> Iterator[Document | BadRow]:
    """Yields the documents of a source that `datasets` reads.

    Raises:
        ValueError: the source cannot be loaded.
    """
    where = place_of_rows(source)
    for row, values in enumerate(open_stream(name, source), start=1):
        yield from documents_of(values, source.text, where, row, f"source {name!r}: {where}, row {row}")


def stream_name(source: Source) -> str:
    """Returns the name of a streamed source in messages."""
    return source.path if source.name is None else f"{source.path} ({source.name})"


def place_of_rows(source: Source) -> str:
    """Returns where the rows of a streamed source are, for messages. The splits of one data set are several places."""
    has_splits = source.is_hub or (Path(source.path).expanduser() / "dataset_dict.json").is_file()
    return f"{stream_name(source)}, split {source.split}" if has_splits else stream_name(source)


def open_stream(name: str, source: Source) -> Iterable[Any]:
    """Returns the rows of a source that `datasets` reads, as mappings: a data set of `datasets`.

    Raises:
        ValueError: the source cannot be loaded.
    """
    import datasets

    saved = saved_directory(name, source) if is_saved_dataset(source) else None
    try:
        if saved is not None:
            return datasets.load_from_disk(saved)
        ask_hub(source)
        return datasets.load_dataset(
            source.path, source.name, split=source.split, revision=source.revision, streaming=True
        )
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200].rstrip(" .")
        raise ValueError(f"source {name!r}: {stream_name(source)} cannot be loaded ({reason})") from error


def hub_files(name: str, source: Source) -> list[str]:
    """Returns the addresses of the files of a hub data set's split, in the order in which `datasets` streams them.

    Raises:
        ValueError: the data set cannot be loaded, has no such split, or its files have another format.
    """
    import datasets

    try:
        ask_hub(source)
        builder = datasets.load_dataset_builder(source.path, source.name, revision=source.revision)
        splits = {str(split): list(map(str, files)) for split, files in (builder.config.data_files or {}).items()}
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200].rstrip(" .")
        raise ValueError(f"source {name!r}: {stream_name(source)} cannot be loaded ({reason})") from error
    if source.split not in splits:
        raise ValueError(
            f"source {name!r}: {stream_name(source)} has no split {source.split!r}, only "
            f"{', '.join(splits) or 'a program that makes its rows'}"
        )
    for file in splits[source.split]:
        if not format_of(file):
            raise ValueError(f"source {name!r}: {file} has no known format ({', '.join(sorted(FORMATS))})")
    return splits[source.split]


def ask_hub(source: Source) -> None:
    """Asks the hub once for a data set. If the hub is out of reach, `datasets` would try again for half a minute.

    Raises:
        ConnectionError: the hub is out of reach.
        HfHubHTTPError: the hub has no such data set or revision, or does not show it to this user.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        HfApi().dataset_info(source.path, revision=source.revision, timeout=30)
    except HfHubHTTPError:
        raise
    except Exception as error:
        raise ConnectionError(f"the hub is out of reach: {error}") from error
