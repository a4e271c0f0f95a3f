"""Turns docstrings and READMEs into English prose.

Markup becomes plain text. Code, tables, formulas, links and lists of references are left out. A sentence stays if it
consists mostly of ordinary words. A paragraph becomes one line.
"""

from __future__ import annotations

import inspect
import re
import string
from collections.abc import Iterator

_NO_LETTERS = dict.fromkeys(map(ord, string.ascii_letters))
_LONG_RUN = re.compile(r"\S{241}")
SPECIAL = re.compile(r"</s>|<\|(?:prompt|answer)\|>")
"""Markers of a chat template, which belong only in fine-tuning data."""


def clean(text: str) -> str:
    """Removes indentation, trailing blanks, repeated blank lines, control characters and lone surrogates."""
    text = inspect.cleandoc(text).encode("utf-8", "ignore").decode("utf-8")
    text = re.sub(r"[^\S\n]+$", "", text.replace("\r\n", "\n").replace("\xa0", " "), flags=re.MULTILINE)
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f\ufffd]", "", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def is_mostly_words(text: str) -> bool:
    """Returns whether a text is mostly English words: no base64, table of numbers, other script or template markup.

    Of the characters that are not blank, more than half are ASCII letters and 95 % are ASCII. No unbroken run is longer
    than 240 characters, and there is no marker of a chat template.
    """
    size = len("".join(text.split()))
    return (
        len(text.translate(_NO_LETTERS)) < len(text) - 0.5 * size
        and len(text.encode("ascii", "ignore")) >= len(text) - 0.05 * size
        and not _LONG_RUN.search(text)
        and not SPECIAL.search(text)
    )


# --- Sentences ----------------------------------------------------------------------------------------------------

SENTENCE_END = re.compile(
    r"(?<!\be\.g)(?<!\bi\.e)(?<!\bvs)(?<!\bcf)(?<!\betc)(?<!\bFig)(?<!\bEq)(?<![ .]\w)[.!?](?=\s+[A-Z`*:\"'(\[]|\s*$)"
)
_WORD = re.compile(r"[\"'(]*(?:[A-Za-z][a-z]*(?:['-][A-Za-z]?[a-z]+)*|[A-Z]{2,6}|\d{1,4})[\"')]*[.,;:!?]*[\"')]*")
_NOT_A_SENTENCE = re.compile(
    r"[\\$^{}|<>=~@#]|https?:|www\.|::|\.\.\s|\[\d+\]|__|\bsphx_|[:,]\.$|\b(?:TODO|FIXME|XXX)\b"
)
_NAME = re.compile(r"[*\w][\w.*, ]{0,40}: ")
_LONGEST_SENTENCE = 400


def _sentences(text: str) -> Iterator[str]:
    start = 0
    for end in SENTENCE_END.finditer(text):
        yield text[start : end.end()].strip()
        start = end.end()
    if rest := text[start:].strip():
        # Parameter descriptions often lack the full stop. A text that ends with a colon announced a removed block.
        yield f"{rest}." if rest[-1].isalnum() or rest[-1] in ")\"'" else rest


def _is_sentence(text: str) -> bool:
    words = text.split()
    if len(words) < 3:
        return False
    plain = sum((word.islower() and word.isalpha()) or _WORD.fullmatch(word) is not None for word in words)
    return (
        text[-1] in ".!?"
        and (text[0].isalpha() or text[0] in "\"'(")
        and len(text) <= _LONGEST_SENTENCE
        and 5 * plain >= 4 * len(words)
        and text.count("(") == text.count(")")
        and not _NOT_A_SENTENCE.search(text)
    )


def _paragraph(text: str) -> str:
    """Returns the sentences of a paragraph. The description of a parameter keeps the parameter's name in front."""
    name = match[0] if (match := _NAME.match(text)) and " " not in match[0].rstrip() else ""
    kept = [found for found in _sentences(text[len(name) :]) if _is_sentence(found)]
    if kept and re.match(r"[a-z]+[ ,]", kept[0]):
        kept[0] = f"{kept[0][0].upper()}{kept[0][1:]}"
    return name + " ".join(kept) if kept else ""


_INLINE = [
    (character, re.compile(pattern, re.IGNORECASE), replacement)
    for character, pattern, replacement in (
        (  # HTML
            "<",
            r"</?(?:a|b|blockquote|br|center|code|details|div|em|font|h\d|hr|i|img|kbd|li|ol|p|picture|pre|source|span"
            r"|strong|sub|summary|sup|table|tbody|td|th|thead|tip|tr|u|ul|video)(?:\s[^<>]*)?/?>",
            "",
        ),
        ("!", r"\[?!\[[^\]]*\]\([^)]*\)(\]\([^)]*\))?", ""),  # pictures, badges
        ("(", r"\[([^\[\]]+)\]\([^()\s]*(?:\([^()]*\))?[^()\s]*\)", r"\1"),  # Markdown links
        ("`", r":(?:\w+:)*\w+:`[~!]?([^`<]+?)(?:\s*<[^`]*>)?`", r"\1"),  # roles
        ("`", r"`([^`<]+?)\s*<[^`>]*>`__?", r"\1"),  # reST links
        ("`", r"`([^`]+)`__?(?!\w)", r"\1"),
        ("[", r"\s*\[[\w.]+\]_(?!\w)", ""),  # footnotes
        ("[", r"\[`*~?([^`\]]+)`+\]", r"\1"),  # references of transformers
        ("`", r"``([^`]+)``|`([^`]+)`", r"\1\2"),
        ("*", r"(?<![\w*])(\*{1,3})(?=[^\s*])([^*\n]*[^\s*])\1(?![\w*])", r"\2"),  # emphasis
        ("[", r"(?<![\w\]])\[([^\[\]]+)\]\[[\w.-]*\]", r"\1"),  # Markdown references
        (" -", r"^([\w.*]+)\s+--?\s+", r"\1: "),  # "name -- description"
        (" :", r"\s+:\s", ": "),
        (" ", r"\s+([.,;:!?])(?=\s|$)", r"\1"),
    )
]
"""Markup: a character that the markup always contains, the pattern and its replacement."""


def plain(text: str) -> str:
    """Returns a paragraph on one line, without inline markup."""
    for character, pattern, replacement in _INLINE:
        if character in text:
            text = pattern.sub(replacement, text)
    return " ".join(text.split())


# --- Paragraphs ---------------------------------------------------------------------------------------------------

_UNDERLINE = re.compile(r"([=\-~^*#\"'`+.])\1{2,}")
_FENCE = re.compile(r"```|~~~")
_DIRECTIVE = re.compile(r"\.\.(?:\s+(?:([\w-]+)::\s*(.*)|.*)|)")
_ADMONITIONS = frozenset(
    {"note", "warning", "tip", "important", "caution", "hint", "attention", "admonition", "seealso"}
)
_TABLE = re.compile(r"[+|].*[+|]|[=\-]{2,}(?:\s+[=\-]{2,})+")
_CODE = re.compile(r">>>|\.\.\. |In \[\d+\]:|\$ |%\w|@\w")
_MAY_BEGIN_BLOCK = frozenset(">.I$%@+|=-")
"""First characters of the matches of `_DIRECTIVE`, `_TABLE` and `_CODE`."""
_ITEM = re.compile(r"(?:[-*+•]|\(?(?:\d{1,2}|[a-z])[.)])\s+")
_FIELD = re.compile(
    r":(param|parameter|arg|argument|key|keyword|return|returns|raises?|type|rtype|\w+)\b([^:`]*):(?:\s+|$)"
)
_COLON_HEADING = re.compile(r"([A-Z][\w ]{2,30}):")
_MARKDOWN_HEADING = re.compile(r"#{1,6}\s")
_TERM = re.compile(r"([*\w][\w.*, /]*?)\s*(?:\([^()]*(?:\([^()]*\)[^()]*)*\)|\[[^\[\]]*\])?\s*:(?:\s+(.*)|)$")

_TERMS = frozenset(
    {
        *("parameters", "params", "args", "arguments", "attributes", "keyword args", "keyword arguments", "inputs"),
        *("kwargs", "other parameters", "keyword parameters", "optional parameters", "attrs", "fields", "options"),
    }
)
_RESULTS = frozenset({"returns", "return", "yields", "output", "outputs"})
_LEFT_OUT = frozenset(
    {
        *("example", "examples", "references", "reference", "see also", "methods", "raises", "raise", "warns", "shape"),
        *("usage", "example usage", "doctest", "shapes", "todo", "bibliography", "authors", "author", "copyright"),
        *("license", "licence", "citation", "changelog", "install", "installation", "exceptions", "example::"),
    }
)


class _Reader:
    """Reads the lines of a docstring or README, and collects its paragraphs."""

    def __init__(self) -> None:
        self.paragraphs: list[str] = []
        self._lines: list[str] = []
        self._skipped_below: int | None = None  # indentation of the line whose indented block is left out
        self._in_code = self._in_fence = False  # code and tables end at a blank line, fences at a fence
        # A section of numpydoc ends at the next heading, a section of Google's style at the end of its indentation.
        self._section, self._section_indent = "", -1
        self._term_indent: int | None = None

    def read(self, text: str) -> list[str]:
        lines = text.expandtabs(4).split("\n")
        for number, line in enumerate(lines):
            self._line(line.strip(), _indent(line), lines[number + 1] if number + 1 < len(lines) else "")
        self._end()
        return self.paragraphs

    def _line(self, text: str, indent: int, following: str) -> None:
        if self._is_left_out(text, indent):
            return
        if text and indent <= self._section_indent:
            self._section, self._section_indent = "", -1
        if not text or _UNDERLINE.fullmatch(text):
            self._end()
        elif _UNDERLINE.fullmatch(following.strip()) and len(following.strip()) >= len(text) - 2:
            self._start_section(text, -1)
        elif _MARKDOWN_HEADING.match(text):
            self._start_section(text.lstrip("# "), -1)
        elif (heading := _COLON_HEADING.fullmatch(text)) and _known(heading[1]):
            self._start_section(heading[1], indent)
        elif self._section == "left out":
            return
        else:
            self._text(text, indent, following)

    def _is_left_out(self, text: str, indent: int) -> bool:
        """Returns whether the line is part of a block that is not prose."""
        if _FENCE.match(text):
            self._end()
            self._in_fence = not self._in_fence
            return True
        if self._in_fence:
            return True
        if self._in_code:
            self._in_code = bool(text)
            return True
        if self._skipped_below is not None:
            if not text or indent > self._skipped_below:
                self._end()
                return True
            self._skipped_below = None
        if text and text[0] not in _MAY_BEGIN_BLOCK:
            return False
        if _CODE.match(text) or _TABLE.fullmatch(text):
            self._end()
            self._in_code = True
            return True
        if directive := _DIRECTIVE.fullmatch(text):
            self._end()
            if directive[1] in _ADMONITIONS:
                self._lines = [directive[2]] if directive[2] else []
            else:
                self._skipped_below = indent
            return True
        return False

    def _start_section(self, title: str, indent: int) -> None:
        self._end()
        self._section, self._section_indent, self._term_indent = _kind_of_section(title), indent, None

    def _text(self, text: str, indent: int, following: str) -> None:
        if field := _FIELD.match(text):
            self._end()
            rest = text[field.end() :]
            if field[1].startswith(("raise", "type", "rtype")):
                self._skipped_below = indent
            elif name := field[2].split()[-1:]:
                self._lines = [f"{name[0]}: {rest}"]
            else:
                self._lines = [rest]
            return
        if self._term_indent is None:
            self._term_indent = indent
        if item := _ITEM.match(text):
            self._end()
            text = text[item.end() :]
        elif self._section in ("terms", "results") and indent == self._term_indent:
            text = self._term(text, indent, following)
        if text.endswith("::"):
            self._skipped_below = indent
            text = text[:-1]
        self._lines.append(text)

    def _term(self, text: str, indent: int, following: str) -> str:
        """Returns the first line of the description of a parameter or a result, without its type."""
        if self._section_indent < 0:
            # numpydoc: "name : type", where the description is indented.
            if " : " not in text and _indent(following) <= indent:
                return text
            self._end()
            name = re.split(r"\s*:(?: |$)", text)[0]
            return f"{name}:" if self._section == "terms" else ""
        if self._section == "results":
            return text if self._lines else re.sub(r"^[\w\[\], .|`~]+: ", "", text)
        if found := _TERM.fullmatch(text):
            self._end()
            return f"{found[1]}: {found[2] or ''}"
        return text

    def _end(self) -> None:
        if self._lines and (text := _paragraph(plain(" ".join(self._lines)))):
            self.paragraphs.append(text)
        self._lines = []


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _kind_of_section(title: str) -> str:
    title = title.strip(" #:*`").lower()
    if title in _TERMS:
        return "terms"
    if title in _RESULTS:
        return "results"
    return "left out" if title in _LEFT_OUT else ""


def _known(title: str) -> bool:
    return bool(_kind_of_section(title)) or title.lower() in ("note", "notes", "warning", "tip", "important")


def prose(text: str) -> str:
    """Returns the paragraphs of English sentences in a docstring or README, without markup."""
    return "\n\n".join(_Reader().read(text))


# --- READMEs ------------------------------------------------------------------------------------------------------

_LAST_HEADING = re.compile(
    r"\n(?:#{1,4} *|(?=[^\n]+\n[=*~^-]{4}))[^\w\n]*"
    r"(?:change ?log|changes|history|release|what's new|news|contribut|licen[sc]e|copyright|sponsor|credits|citation)",
    re.IGNORECASE,
)


def readme_prose(text: str) -> str:
    """Returns the prose of a README up to its change log or similar closing sections."""
    text = text.replace("\r\n", "\n")
    if found := _LAST_HEADING.search(text):
        text = text[: found.start()]
    return prose(clean(re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)))
