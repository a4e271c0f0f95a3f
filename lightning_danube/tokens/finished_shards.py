"""Finished shards: made elsewhere, and read from another directory or fetched once from object storage.

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
from lightning_danube.files import finish_folder, new_file, parse_json, write_text
from lightning_danube.outside.names import inside, plain_name
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
    """Returns where finished shards are read: their own directory, or for an address its folder in the cache."""
    if not is_address(path):
        return Path(path).expanduser()
    digest = hashlib.sha256(path.rstrip("/").encode()).hexdigest()[:8]
    return cache_dir / "shards" / f"{PurePosixPath(path.partition('?')[0]).name[:100]}-{digest}"


def fetch(name: str, path: str, cache_dir: Path) -> Path:
    """Returns the directory of finished shards, and fetches them first if they are missing.

    The fetched directory is complete, with the sizes and checksums of its listing, or absent. Files that an earlier
    attempt fetched are kept.

    Raises:
        ValueError: the shards are missing, out of reach, or differ from their listing.
    """
    directory = finished_directory(path, cache_dir)
    if not is_address(path) or (directory / LISTING).is_file():
        return directory
    where = f"source {name!r}: {redacted(path)}"
    store, root = open_store(where, path)
    try:
        listing = parse_json(store.cat_file(f"{root}/{LISTING}"), LISTING)
        version = listing["format"]
        files = listed_files(listing) if version == FORMAT else []
        for file in files:
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
    # The folder keeps the files of an earlier attempt, so it has a fixed name.
    hidden = directory.with_name(f".{directory.name}.fetching")
    for file in files:
        _fetch_file(where, store, f"{root}/{file['name']}", inside(hidden, file["name"], "the name of a file"), file)
    write_text(hidden / LISTING, json.dumps(listing, indent=1) + "\n")
    try:
        finish_folder(hidden, directory)
    except FileNotFoundError:
        # Another process fetched the same files and finished first.
        if not (directory / LISTING).is_file():
            raise
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
        raise ValueError(f"{where} is no address that fsspec knows ({error})") from None
    return store, root


def _fetch_file(where: str, store: Any, remote: str, target: Path, expected: dict[str, Any]) -> None:
    if target.is_file() and _digest(target) == expected["sha256"]:
        return
    with new_file(target) as partial:
        try:
            store.get_file(remote, str(partial))
        except FileNotFoundError:
            raise ValueError(
                f"{where} lacks {target.name}, which its {LISTING} names: copy the shards there again"
            ) from None
        except Exception as error:
            raise unreachable(where, error) from error
        found = _digest(partial)
        if found != expected["sha256"]:
            raise ValueError(
                f"{where}/{target.name} does not hold what was written ({partial.stat().st_size} bytes of "
                f"{expected['bytes']}, sha256 {found[:12]}… instead of {expected['sha256'][:12]}…): copy the shards "
                "there again"
            )


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def unreachable(where: str, error: Exception) -> Exception:
    """Returns the error to raise. An error of a local file, such as a full disk, is returned unchanged."""
    if isinstance(error, OSError) and error.filename is not None:
        return error
    said = redacted(" ".join(str(error).split()))[:200] or type(error).__name__
    return ValueError(f"{where} cannot be read ({said})")
