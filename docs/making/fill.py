"""Fills the blocks of the pages whose content has another source: tables of results, printed outputs, options of verbs.

    python docs/making/fill.py            writes the blocks anew
    python docs/making/fill.py --check    only names the pages that differ from their sources; exit code 1 if any does

A block stands between two comments. The first names a maker and the files that it reads:

    <!-- fill table: benchmarks/results/replay-2026-11-27.md -->
    …
    <!-- /fill -->

The makers are the functions of results.py and reference.py. A maker gets the paths of the files, in order, and returns
Markdown. `file.md#2` is the second table of a file. `typed` also takes the beginnings of the first and the last line
that are shown.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from docs.making.pages import pages, read  # noqa: E402

BLOCK = re.compile(
    r"^<!-- fill (?P<maker>\w+)(?:: *(?P<files>[^>]*?))? *-->\n(?P<content>.*?)^<!-- /fill -->$", re.M | re.S
)
COMMAND = "make fill"


def makers() -> dict[str, Callable[..., str]]:
    """Returns name → maker. Imports torch and pandas, because reports read some of the results."""
    from docs.making import reference, results

    found: dict[str, Callable[..., str]] = {}
    for module in (results, reference):
        found |= {name: getattr(module, name) for name in module.MAKERS}
    return found


def filled(page: str, text: str) -> str:
    """Returns the text of a page with all its blocks made anew.

    Raises:
        ValueError: a block names a maker or a file that does not exist, or has no end.
    """
    known = makers()

    def made(match: re.Match[str]) -> str:
        name, files = match["maker"], (match["files"] or "").split()
        if name not in known:
            raise ValueError(f"{page}: there is no maker {name!r}; there are {', '.join(sorted(known))}")
        for file in files[:1] if name == "typed" else files:
            if not (ROOT / file.partition("#")[0]).exists():
                raise ValueError(f"{page}: the block {name!r} reads {file}, which does not exist")
        begin = match[0].partition("\n")[0]
        return f"{begin}\n\n{known[name](*files).strip()}\n\n<!-- /fill -->"

    marks = len(re.findall(r"^<!-- (?:fill |/fill)", text, re.MULTILINE))
    if marks != 2 * len(BLOCK.findall(text)):
        raise ValueError(f"{page}: a block has no end, or an end has no block; docs/making/fill.py shows the form")
    return BLOCK.sub(made, text)


def stale_pages() -> dict[str, str]:
    """Returns page → the text that it should have, for each page that differs from its sources."""
    found = {}
    for page in pages():
        text = read(page)
        if re.search(r"^<!-- fill ", text, re.MULTILINE) and (anew := filled(page, text)) != text:
            found[page] = anew
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    try:
        stale = stale_pages()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for page, text in stale.items():
        if check:
            print(f"{page} differs from its sources; type: {COMMAND}")
        else:
            (ROOT / page).write_text(text, encoding="utf-8")
            print(f"{page} is filled anew")
    return 1 if stale and check else 0


if __name__ == "__main__":
    sys.exit(main())
