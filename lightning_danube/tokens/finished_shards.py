"""Finished shards: made elsewhere, and read from another directory, or by ranges from object storage.

A source's path names finished shards if it is an address that fsspec knows (`s3://bucket/shards/web-1a2b3c4d5e6f`) or
a directory with a `shards.json`. The texts of such a source are not needed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

from lightning_danube.extras import install_command
from lightning_danube.files import new_folder, parse_json, write_text
from lightning_danube.outside.names import plain_name
from lightning_danube.outside.secrets import redacted
from lightning_danube.text.corpora import names_token_files

LISTING = "shards.json"
FORMAT = 3
"""Of the listing and the files beside it. Shards of another format are refused."""


def is_address(path: str) -> bool:
    return re.match(r"[A-Za-z][\w+.-]*://", path) is not None


def is_finished(path: str) -> bool:
    """Returns whether a source's path names shards instead of texts."""
    if names_token_files(path):
        return False
    return is_address(path) or os.path.isfile(os.path.join(os.path.expanduser(path), LISTING))


def finished_directory(path: str, cache_dir: Path) -> Path:
    """Returns the directory of a listing: that of the shards, or for an address its folder in the cache."""
    if not is_address(path):
        return Path(path).expanduser()
    digest = hashlib.sha256(path.rstrip("/").encode()).hexdigest()[:8]
    return cache_dir / "shards" / f"{PurePosixPath(path.partition('?')[0]).name[:100]}-{digest}"


def fetch_listing(name: str, path: str, cache_dir: Path) -> Path:
    """Returns the directory with the listing of finished shards. From an address, the listing and the counts of ids are
    fetched first if they are missing here. The files of tokens stay where they are.

    The fetched directory is complete, or absent.

    Raises:
        ValueError: the listing is missing, out of reach or damaged, or a file of counts differs from it.
    """
    directory = finished_directory(path, cache_dir)
    if not is_address(path) or (directory / LISTING).is_file():
        return directory
    where = f"source {name!r}: {redacted(path)}"
    store, root = open_store(where, path)
    try:
        listing = parse_json(store.cat_file(f"{root}/{LISTING}"), LISTING)
        version = listing["format"]
        for file in listed_files(listing) if version == FORMAT else []:
            plain_name(file["name"], "the name of a file")
            if missing := {"bytes", "sha256"} - file.keys():
                raise KeyError(min(missing))
    except FileNotFoundError:
        raise ValueError(
            f"{where} holds no {LISTING}: give the address of one source's shards, all of whose files were copied there"
        ) from None
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{where}/{LISTING} is damaged ({error}): copy the shards there again") from error
    except Exception as error:
        raise unreachable(where, error) from error
    check_format(where, version)
    with new_folder(directory) as partial:
        for split in listing["splits"].values():
            _fetch_counts(where, store, root, partial, split["token_counts"])
        write_text(partial / LISTING, json.dumps(listing, indent=1) + "\n")
    return directory


def listed_files(listing: Any) -> list[dict[str, Any]]:
    """Returns what a `shards.json` says of each file beside it: name, bytes, sha256.

    Raises:
        KeyError, TypeError: the listing is damaged, or of an older format.
    """
    splits = listing["splits"].values()
    return [file for split in splits for file in (*split["files"], split["token_counts"])]


def check_format(where: str, version: object) -> None:
    """Raises ValueError if shards have another format than this version reads."""
    if version != FORMAT:
        raise ValueError(f"{where} has the shard format {version}, this version reads {FORMAT}: make it again")


def open_store(where: str, path: str) -> tuple[Any, str]:
    """Returns the store of an address, and the address's path in it.

    Raises:
        ValueError: fsspec does not know the store, or needs a package.
    """
    import fsspec

    try:
        store, root = fsspec.core.url_to_fs(path.rstrip("/"))
    except ImportError as error:
        missing = str(error).rstrip(".")
        raise ValueError(f"{where} needs a package ({missing}); for s3://, type: {install_command('s3')}") from None
    except ValueError as error:
        raise ValueError(f"{where} is not an address that fsspec knows ({error})") from None
    return store, root


def _fetch_counts(where: str, store: Any, root: str, folder: Path, expected: dict[str, Any]) -> None:
    name = expected["name"]
    try:
        content = store.cat_file(f"{root}/{name}")
    except FileNotFoundError:
        raise ValueError(f"{where} lacks {name}, which its {LISTING} names: copy the shards there again") from None
    except Exception as error:
        raise unreachable(where, error) from error
    found = hashlib.sha256(content).hexdigest()
    if found != expected["sha256"]:
        raise ValueError(
            f"{where}/{name} does not hold what was written ({len(content)} bytes of {expected['bytes']}, sha256 "
            f"{found[:12]}… instead of {expected['sha256'][:12]}…): copy the shards there again"
        )
    (folder / name).write_bytes(content)


def unreachable(where: str, error: Exception) -> Exception:
    """Returns the error to raise. An error of a local file, such as a full disk, is returned unchanged."""
    if isinstance(error, OSError) and error.filename is not None:
        return error
    said = redacted(" ".join(str(error).split()))[:200] or type(error).__name__
    return ValueError(f"{where} cannot be read ({said})")
