"""Links between pages lead to files and headings that exist; the changelog names only what is there."""

import pytest

from docs.making.pages import anchors, broken_links, links, pages, read
from tests.test_project import missing_paths, missing_targets


@pytest.mark.parametrize("page", pages())
def test_every_link_and_anchor_of_a_page_exists(page: str) -> None:
    assert broken_links(page, read(page)) == []


def test_pages_have_links() -> None:
    assert sum(len(links(read(page))) for page in pages()) > 200


@pytest.mark.parametrize(
    ("text", "broken"),
    [
        ("see [this](nowhere.md)", ["nowhere.md"]),
        ("see [this](speed.md#nowhere)", ["speed.md#nowhere"]),
        ("# Here\nsee [this](#there)", ["#there"]),
        ('<img src="pictures/nowhere.svg">', ["pictures/nowhere.svg"]),
        ("# Here it is: `this`!\n[a](#here-it-is-this) [b](speed.md) [c](https://example.org/x) `[d](nowhere.md)`", []),
        ("```\n[this](nowhere.md)\n```\n", []),
    ],
)
def test_broken_links_are_found(text: str, broken: list[str]) -> None:
    found = broken_links("docs/x.md", text)
    assert found == broken


def test_a_heading_that_stands_twice_has_two_anchors() -> None:
    assert anchors("# A b\n## A b\n```\n# no heading\n```\n### C, d (e)\n") == {"a-b", "a-b-1", "c-d-e"}


def test_what_the_changelog_names_exists() -> None:
    text = read("CHANGELOG.md")
    assert missing_paths(text) == []
    assert missing_targets(text) == []
