"""Hugging Face hub ids: recognizes them, and downloads the files of a repository."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from lightning_danube.files import looks_like_path
from lightning_danube.terminal import nearest_name
from lightning_danube.yaml_files import way_to_make

HUB_ID = re.compile(r"(?P<repository>[\w-][\w.-]*/[\w-][\w.-]*)(?:@(?P<revision>[\w./-]+))?")
_VERSION = re.compile(r"(?:(?P<runs>.*)/)?(?P<name>[^/]+)/version_\d+(?:/.*)?")
_RUN = re.compile(r"(?P<runs>(?:.*/)?runs)/(?P<name>[^/]+)/?")
"""A version of a run or a file in it, and a run in a directory called runs, by their names."""

_SIMILAR = 0.75
"""Similarity from which on a name is suggested. Below it, two names may have no more in common than `.jsonl`."""


def hub_id(name: str) -> str | None:
    """Returns the hub repository of a name, without its revision. None for a file or directory of this machine."""
    match = HUB_ID.fullmatch(name)
    return match["repository"] if match and not Path(name).expanduser().exists() else None


def hint_for(name: str, *known: str) -> str:
    """Returns, in parentheses, what helps where a name stands for nothing. Returns "" if nothing is known to help.

    For a run of a configuration of this package, of which no version exists, this is the command that makes it. For
    other names, it is the most similar of the known names and of the names beside it: " (did you mean …?)".
    """
    run = _VERSION.fullmatch(name) or _RUN.fullmatch(name)
    if run and not Path(run["runs"] or ".", run["name"]).expanduser().exists():
        way = way_to_make(run["runs"] or ".", run["name"])
        if way is not None:
            return f" ({way})"
    path = Path(name).expanduser()
    beside = {sibling.name: str(path.with_name(sibling.name)) for sibling in path.parent.glob("*")}
    meant = beside | {one: one for one in known}
    near = nearest_name(path.name, meant, least=_SIMILAR)
    return f" (did you mean {meant[near]}?)" if near else ""


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, at most 160 characters, or its type's name if it has no message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160].rstrip(" .:")


def download(option: str, name: str, files: Sequence[str], known: Sequence[str] = ()) -> Path:
    """Downloads the named files of a hub repository and returns the directory that holds them.

    Args:
        option: the option whose value is the name, for messages.
        name: "owner/name" or "owner/name@revision".
        files: patterns of file names. Files in subdirectories are never fetched.
        known: names that the option also takes, to suggest one.

    Raises:
        ValueError: the name is a path or no hub id, the hub has no such repository, or the hub cannot be reached.
    """
    nothing = f"{option} {name}: there is no such file or directory{hint_for(name, *known)}"
    match = HUB_ID.fullmatch(name)
    if match is None or looks_like_path(name):
        raise ValueError(nothing)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    repository, revision = match["repository"], match["revision"]
    try:
        return Path(
            snapshot_download(repository, revision=revision, allow_patterns=list(files), ignore_patterns=["*/*"])
        )
    except HFValidationError:
        raise ValueError(nothing) from None
    except GatedRepoError:
        raise ValueError(
            f"{option} {name}: the hub lets only those in who accepted its terms: do so on its page, then log in with "
            "hf auth login"
        ) from None
    except RepositoryNotFoundError:
        raise ValueError(f"{nothing}, and the hub has no {repository} (or none that you may read)") from None
    except RevisionNotFoundError:
        raise ValueError(f"{option} {name}: {repository} has no revision {revision!r} on the hub") from None
    except LocalEntryNotFoundError as error:
        reason = error.__cause__ or error
        raise ValueError(
            f"{nothing}, {repository} was not downloaded before, and the hub is out of reach ({first_line(reason)})"
        ) from None
    except Exception as error:
        # A download can fail in too many ways to list: proxies, certificates, a full disk.
        raise ValueError(f"{option} {name}: the download from the hub failed ({first_line(error)})") from error
