"""Reads the pages: headings and their anchors, links, commands, and the navigation of the site."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from os.path import normpath
from pathlib import Path
from posixpath import dirname, join
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
PROJECT_PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "benchmarks/README.md")
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```\s*$", re.MULTILINE | re.DOTALL)
COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
PROGRAMS = ("lightning-danube", "python", "python3", ".venv/bin/python", "make", "pip", "tensorboard")


def pages() -> list[str]:
    """Returns all pages of the project, as paths in the repository."""
    return [*PROJECT_PAGES, *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def prose(text: str) -> str:
    """Returns a page without its code blocks, its code in lines, and its comments."""
    return re.sub(r"`[^`\n]*`", "", COMMENT.sub("", FENCE.sub("", text)))


def anchor(heading: str) -> str:
    """Returns the anchor that code hosts and the site give a heading."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
    return re.sub(r"[^\w\- ]", "", text).strip().lower().replace(" ", "-")


def anchors(text: str) -> set[str]:
    """Returns the anchors of a page. A heading that appears twice gets a number."""
    found: list[str] = []
    for heading in re.findall(r"^#{1,6} +(.+?) *#*$", FENCE.sub("", text), re.MULTILINE):
        name = anchor(heading)
        found.append(f"{name}-{found.count(name)}" if name in found else name)
    return {*found, *re.findall(r'<a (?:id|name)="([^"]+)"', text)}


def links(text: str) -> list[tuple[str, str]]:
    """Returns the relative links and pictures of a page as (path, anchor). The path is empty for the page itself."""
    text = re.sub(r"`[^`\n]*`", "`code`", COMMENT.sub("", FENCE.sub("", text)))
    targets = re.findall(r"\]\(\s*<?([^)\s>]+)", text)
    targets += re.findall(r"^\s*\[[^\]]+\]:\s*<?([^\s>]+)", text, re.MULTILINE)
    targets += re.findall(r"""(?:href|src|srcset)\s*=\s*["']([^"'\s]+)""", text)
    relative = [target for target in targets if not re.match(r"[a-z][a-z0-9+.-]*:|//", target, re.IGNORECASE)]
    return [(target.partition("#")[0], target.partition("#")[2]) for target in relative]


def broken_links(page: str, text: str) -> list[str]:
    """Returns the links of a page whose file or anchor does not exist."""
    broken = []
    for path, name in links(text):
        file = normpath(join(dirname(page), path)) if path else page
        if path and not (ROOT / file).exists():
            broken.append(path)
        elif name and file.endswith(".md") and name not in anchors(text if file == page else read(file)):
            broken.append(f"{path}#{name}")
    return broken


# --- the navigation ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """One page in the navigation: the titles above it, its own title, and its path in the repository."""

    above: tuple[str, ...]
    title: str
    page: str


class _Loader(yaml.SafeLoader):
    """Reads mkdocs.yml without running what its tags name."""


_Loader.add_multi_constructor("!", lambda loader, suffix, node: None)
_Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: None)


def site() -> dict[str, Any]:
    """Returns the content of mkdocs.yml. Values with a tag are None."""
    settings: dict[str, Any] = yaml.load(read("mkdocs.yml"), _Loader)
    return settings


def navigation() -> list[Entry]:
    """Returns the pages of mkdocs.yml, in order."""

    def walk(nodes: list[Any], above: tuple[str, ...]) -> Iterator[Entry]:
        for node in nodes:
            ((title, content),) = node.items()
            if isinstance(content, list):
                yield from walk(content, (*above, title))
            else:
                outside = content.startswith("repository/")
                yield Entry(above, title, content.removeprefix("repository/") if outside else f"docs/{content}")

    return list(walk(site()["nav"], ()))


def index() -> list[Entry]:
    """Returns the pages that docs/README.md lists, in order."""
    entries, above = [], ("", "")
    for line in read("docs/README.md").splitlines():
        if heading := re.fullmatch(r"(##|###) (.+)", line):
            above = (heading[2], "") if heading[1] == "##" else (above[0], heading[2])
        elif listed := re.fullmatch(r"- \[(.+?)\]\((.+?)\): .+\.", line):
            entries.append(Entry(tuple(filter(None, above)), listed[1], normpath(join("docs", listed[2]))))
    return entries


# --- commands ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Command:
    """A command line that a page shows, without the variables before it and the comment behind it."""

    page: str
    line: str

    @property
    def words(self) -> list[str]:
        return shlex.split(self.line, comments=True)

    @property
    def program(self) -> str:
        """The program: `lightning-danube` also for `python -m lightning_danube`."""
        return "lightning-danube" if self.words[1:3] == ["-m", "lightning_danube"] else self.words[0]

    @property
    def arguments(self) -> list[str]:
        return self.words[3:] if self.words[1:3] == ["-m", "lightning_danube"] else self.words[1:]


def _is_command(line: str) -> bool:
    first = line.split(maxsplit=1)[0] if line.strip() else ""
    return first in PROGRAMS and len(line.split()) > 1


def _is_placeholder(line: str) -> bool:
    """Whether a line shows only the form of a command, such as `… --config <the same>`."""
    return bool(re.search(r"…|<[^>]+>|\[-|NAME", line))


def commands(page: str, text: str) -> list[Command]:
    """Returns the commands of a page, in order: those in code blocks, and those in lines of text."""
    found: list[tuple[int, str]] = []
    for block in FENCE.finditer(text):
        if block[1] in ("", "bash", "sh", "console"):
            for line in re.sub(r"\\\n\s*", "", block[2]).splitlines():
                found.append((block.start(), line))
    blank = FENCE.sub(lambda block: "\n" * block[0].count("\n"), text)
    # Positions in the text without blocks do not count: only the order inside each kind is kept.
    found += [(len(text), re.sub(r"\s+", " ", code)) for code in re.findall(r"`([^`]+)`", blank)]
    lines = []
    for _, line in found:
        line = re.sub(r"^\$ ", "", line.strip())
        line = re.sub(r"^(?:[A-Z_]+=\S+ +)+", "", line)
        line = re.sub(r"^(?:echo|printf) .*?\| *", "", line)
        if _is_command(line) and not _is_placeholder(line):
            lines.append(line)
    return [Command(page, line) for line in dict.fromkeys(lines)]
