"""Every page is in the navigation of the site and in docs/README.md, which list the same pages in the same order."""

from pathlib import Path

from docs.making.pages import index, navigation, read, site

ROOT = Path(__file__).resolve().parents[2]


def test_the_index_lists_what_the_site_lists_in_the_same_order() -> None:
    start, *pages = navigation()
    assert start.page == "docs/README.md"
    assert index() == pages


def test_every_page_is_listed_once() -> None:
    listed = [entry.page for entry in navigation()]
    assert len(listed) > 30 and len(set(listed)) == len(listed)
    there = {str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md")}
    assert sorted(there - set(listed)) == [], "name these pages in mkdocs.yml and in docs/README.md"
    assert sorted(page for page in listed if not (ROOT / page).is_file()) == []


def test_the_parts_of_the_site_are_those_that_readers_know() -> None:
    parts = list(dict.fromkeys(entry.above[0] for entry in index()))
    assert parts == ["First hour", "How to", "Reference", "How it works", "What we found", "Project"]


def test_a_page_begins_with_one_title() -> None:
    for entry in navigation():
        lines = read(entry.page).splitlines()
        assert lines[0].startswith("# "), f"{entry.page} does not begin with its title"


def test_the_site_brings_its_scripts_and_styles() -> None:
    """docs/making/hooks.py refuses a page that loads a script from a network, when the site is built."""
    settings = site()
    files = [*settings["extra_css"], *settings["extra"]["polyfills"]]
    assert len(files) == 2
    for file in files:
        assert (ROOT / "docs" / file).is_file(), f"docs/{file} is named in mkdocs.yml"
    script = read(f"docs/{settings['extra']['polyfills'][0]}")
    assert "Permission is hereby granted, free of charge" in script and "window.IFrameWorker=" in script
