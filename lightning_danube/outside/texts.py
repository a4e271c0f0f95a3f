"""Shows untrusted texts: one function for each kind of output."""

from __future__ import annotations

import html
import re

# Control characters but the line feed and the tab; line ends of Unicode; marks that change the order in which a text
# is shown; halves of surrogate pairs, which no output can encode.
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    r"""Returns a text that a terminal shows and does not obey: control characters become their codes, such as \x1b."""
    return text if text.isascii() and text.isprintable() else _UNSEEN.sub(_code, text)


def in_markdown(text: object, *, line_end: str = " ") -> str:
    """Returns a text as one line of Markdown that shows every character of it: no markup, no HTML, no link.

    Args:
        line_end: what stands for a line end. "<br>" keeps the lines.
    """
    lines = [" ".join(line.split()) for line in str(text).strip().split("\n")]
    if line_end == " ":
        lines = [" ".join(" ".join(lines).split())]
    return line_end.join(_MARKUP.sub(r"\\\g<0>", printable(line)) for line in lines)


# Numbers in brackets and names with underscores are not markup, and stay as they are: tables are full of them.
_MARKUP = re.compile(
    r"[\\`*|]|(?<![^\W_])_|_(?![^\W_])|\](?=[(\[:])|<(?=[A-Za-z/!?])|&(?=#?\w+;)|~(?=~)|(?<=~)~|^#(?=#*\s)|^>|^[+-](?=\s)|(?<=^\d)[.)](?=\s)|^---"
)


def in_code(text: object) -> str:
    """Returns a text as a stretch of Markdown code in one line, whatever backticks it holds."""
    line = printable(" ".join(str(text).split()))
    fence = "`" * (max((len(run) for run in re.findall("`+", line)), default=0) + 1)
    return f"{fence} {line} {fence}" if "`" in line else f"{fence}{line or ' '}{fence}"


def in_html(text: object) -> str:
    """Returns a text as the content or an attribute of HTML."""
    return html.escape(printable(str(text)))


def in_figure(text: object) -> str:
    """Returns a text for a figure of matplotlib, which reads what stands between dollars as a formula."""
    return printable(" ".join(str(text).split())).replace("$", r"\$")


def _code(found: re.Match[str]) -> str:
    number = ord(found[0])
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}"
