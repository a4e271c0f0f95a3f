"""Hooks of MkDocs: links that leave docs/ end in copies inside the site, so that no link of the site is broken."""

from __future__ import annotations

import os
import re
from pathlib import Path
from posixpath import dirname, relpath
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[2]
COPIES = "repository"
"""Folder of the site with the files outside docs/ that pages link to."""
origins: dict[str, str] = {}
"""Place in the site → path in the repository, for each file that is copied."""
LINK = re.compile(r"(?<=\]\()(?!#|[a-z][a-z0-9+.-]*:)([^)#\s]+)(?=[)#])")
LOADED = re.compile(r"""<(?:script|img|source|iframe)\b[^>]*?\bsrc(?:set)?="?((?:https?:)?//[^"\s>]+)""")
IMAGE = re.compile(r"""(?<=src=")(?!data:|[a-z]+://)([^"]+)|(?<=srcset=")(?!data:|[a-z]+://)([^"]+)""")


def place_in_site(path: str) -> str:
    """Returns where a path of the repository lies in the site. A folder has a page that lists it."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    # MkDocs leaves out names that begin with a dot, such as .ci.
    place = f"{COPIES}/" + "/".join(part.lstrip(".") for part in path.split("/"))
    return f"{place}/README.md" if (ROOT / path).is_dir() else place


def target(page: str, link: str) -> str:
    """Returns the path in the repository of a relative link on a page, which is itself a path in the repository."""
    return os.path.normpath(os.path.join(dirname(page), link))


def links_of(page: str) -> set[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    found = [match[0] for match in [*LINK.finditer(text), *IMAGE.finditer(text)]]
    return {target(page, link) for link in found}


def outside(pages: list[str]) -> list[str]:
    """Returns the paths outside docs/ that the pages link to, and those that these link to in turn."""
    found: list[str] = []
    waiting = list(pages)
    while waiting:
        page = waiting.pop()
        for path in sorted(links_of(page)):
            # Git ignores what has no copy: a link to it is reported as broken by MkDocs.
            if path.startswith("docs/") or path in found or not (ROOT / path).exists():
                continue
            found.append(path)
            if path.endswith(".md"):
                waiting.append(path)
    return found


def listing(folder: str) -> str:
    names = sorted(path.name for path in (ROOT / folder).iterdir() if not path.name.startswith((".", "_")))
    return "\n".join([f"# {folder}", "", *(f"- `{name}`" for name in names), ""])


def on_files(files: Any, config: Any) -> Any:
    pages = [f"docs/{file.src_uri}" for file in files.documentation_pages()]
    for path in outside(pages):
        place = place_in_site(path)
        readme = ROOT / path / "README.md"
        if files.get_file_from_path(place) is not None:
            continue  # a folder, and the README in it
        origins[place] = f"{path}/README.md" if (ROOT / path).is_dir() else path
        if not (ROOT / path).is_dir():
            files.append(File.generated(config, place, abs_src_path=str(ROOT / path)))
        elif readme.is_file():
            files.append(File.generated(config, place, abs_src_path=str(readme)))
        else:
            files.append(File.generated(config, place, content=listing(path)))
    return files


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Refuses a page that would load a script or a picture from a network.

    Raises:
        PluginError: the page loads something.
    """
    if found := LOADED.search(output):
        raise PluginError(f"{page.file.src_uri} loads {found[1]} from a network")
    return output


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    here = origins.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def moved(match: re.Match[str]) -> str:
        path = target(here, match[0])
        if not (ROOT / path).exists():
            return match[0]
        return relpath(place_in_site(path), dirname(page.file.src_uri) or ".")

    return IMAGE.sub(moved, LINK.sub(moved, markdown))
