"""Texts of others are shown: a terminal, Markdown, HTML and a figure obey none of them."""

import re
from html import unescape

import pytest
from markdown_it import MarkdownIt

from lightning_danube.outside.texts import in_code, in_figure, in_html, in_markdown, printable
from lightning_danube.reports.run_page import markdown_html
from lightning_danube.terminal import markdown_code, markdown_table, text_table

HOSTILE = [
    "\x1b]0;title\x07\x1b[2J",
    "a\rb",
    "\x9b31m",
    "a\u202egpj.exe",
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "![x](http://evil/track.png)",
    "[click](javascript:alert(1))",
    "[a]: http://evil",
    "*bold* _em_ __x__ ~~gone~~ `code`",
    "a | b | c",
    "# title",
    "- item",
    "1. item",
    "> quote",
    "---",
    "a\\|b\\",
    "line\nline\n\n# title",
    "&lt;b&gt; &#60;",
    "<http://evil>",
    "``` js",
    "\ud800",
    "$\\frac{1}$",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_a_terminal_gets_no_code_and_every_encoding_takes_the_text(text: str) -> None:
    shown = printable(text)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", shown)
    shown.encode()
    assert printable("a\tb\nc é 你好 👩‍👧") == "a\tb\nc é 你好 👩‍👧"


@pytest.mark.parametrize("text", HOSTILE)
def test_markdown_shows_the_text(text: str) -> None:
    """By another implementation of Markdown: the text of the page is the text that was given, without markup."""
    parser = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    wanted = printable(" ".join(text.split())).split()
    for page, inner in (
        (in_markdown(text), "<p>(.*)</p>"),
        (f"- {in_markdown(text)}", "<li>(.*)</li>"),
        (markdown_table(["name"], [[text]]), "<td>(.*)</td>"),
    ):
        html = parser.render(page)
        found = re.search(inner, html, re.DOTALL)
        assert found is not None, html
        assert "<" not in found[1] and unescape(found[1]).split() == wanted, html


@pytest.mark.parametrize("text", HOSTILE)
def test_the_page_of_a_run_shows_the_text_of_a_report(text: str) -> None:
    for page in (in_markdown(text), markdown_table(["name"], [[text]]), markdown_code(text), f"- {in_markdown(text)}"):
        html = markdown_html(page)
        assert not re.search(r"<(?!/?(p|h3|ul|li|pre|code|div|table|tr|td|th)\b)", html), html
        assert "\x1b" not in html
    cell = re.findall(r"<td>(.*?)</td>", markdown_html(markdown_table(["name"], [[text]])))
    assert cell == [in_html(" ".join(text.split()))]


@pytest.mark.parametrize("text", HOSTILE)
def test_code_in_markdown_shows_the_text(text: str) -> None:
    html = MarkdownIt("commonmark").render(in_code(text))
    assert html.count("<code>") == 1 and html.startswith("<p><code>") and html.endswith("</code></p>\n")


def test_html_is_shown() -> None:
    assert in_html('<a href="x">\x1b') == "&lt;a href=&quot;x&quot;&gt;\\x1b"


@pytest.mark.parametrize("text", [*HOSTILE, "$", "$$", "$x$ $", r"\$1"])
def test_a_figure_can_be_drawn(text: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1, 1))
    shown = figure.text(0, 0, in_figure(text))
    figure.canvas.draw()
    assert "\n" not in shown.get_text()


def test_a_table_for_a_terminal_keeps_its_columns() -> None:
    lines = text_table(["a", "b"], [["x\x1b[2J\ny", "1"]]).splitlines()
    assert len(lines) == 3 and lines[2] == "x\\x1b[2J y  1"


def test_plain_cells_stay_as_they_are() -> None:
    assert markdown_table(["mt_bench_turn_1"], [["12.3 [11.0, 13.5]"]]).splitlines()[::2] == [
        "| mt_bench_turn_1 |",
        "| 12.3 [11.0, 13.5] |",
    ]
