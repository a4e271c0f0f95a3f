"""The page about the data: complete, self-contained, and no text of the data becomes HTML."""

import re
from html.parser import HTMLParser

from lightning_danube.inspection.page import page_of_sources
from lightning_danube.inspection.shown import ShownExample, ShownSource, ShownToken


class Texts(HTMLParser):
    """Collects (class, text) of the tokens, and every tag."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tokens: list[tuple[str, str]] = []
        self.tags: list[str] = []
        self.classes = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.classes = str(dict(attrs).get("class", ""))

    def handle_data(self, data: str) -> None:
        if self.classes.split()[:1] == ["t"]:
            self.tokens.append((self.classes, data))
            self.classes = ""


def test_tokens_keep_their_text_and_their_marks() -> None:
    tokens = [
        ShownToken(7, "<script>", False, False),
        ShownToken(8, " a & b", True, False),
        ShownToken(2, "</s>", True, True),
    ]
    shown = ShownSource("talk", "conversations", read=1, kept=1, tokens=3, marked_tokens=2)
    shown.examples = [ShownExample("<b>row 1</b>", tokens)]
    page = page_of_sources("Data of <x>", [shown])
    found = Texts(page)
    assert found.tokens[-3:] == [("t", "<script>"), ("t m", " a & b"), ("t m s", "</s>")]
    assert 'title="8"' in page and "script" not in found.tags and "b" not in found.tags


def test_the_page_needs_no_other_file() -> None:
    page = page_of_sources("Data", [ShownSource("talk", "texts", lengths=[1, 2, 3], left_out={"empty": 1})])
    assert not re.search(r"""(src|href)=|url\(|@import""", page)
    assert "NOTHING IS LEARNED FROM THIS SOURCE" in page and page.count("<i ") == 3
