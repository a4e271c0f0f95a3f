"""Writes self-contained HTML pages: what `inspect` shows of the data, and the frame that all pages share.

A page needs no network: styles and pictures are in the file. It follows the reader's choice of light or dark.
"""

from __future__ import annotations

from collections.abc import Sequence

from lightning_danube.inspection.lines import headline, visible
from lightning_danube.inspection.shown import (
    ShownExample,
    ShownSource,
    ShownToken,
    histogram,
    nothing_seen,
    sentences_about,
    shortened,
)
from lightning_danube.outside.texts import in_html

HEAD, TAIL = 1500, 300
"""Tokens at the beginning and at the end of a stretch that a page shows."""
_COLUMNS = 60

STYLE = """\
:root { color-scheme: light dark; --ink: #1d1f23; --faint: #667; --line: #d9dce1; --back: #fbfbfc; --card: #fff;
  --good: #0b6b3a; --goodback: #c9efd8; --bad: #a3161f; --badback: #fde4e5; --other: #e6e9ee; --link: #0b57b0; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e6ea; --faint: #9aa1ac; --line: #353a42; --back: #15171a;
  --card: #1c1f24; --good: #8fe3b2; --goodback: #174a2e; --bad: #ff9aa0; --badback: #4a1a1e; --other: #282c33;
  --link: #8fbcff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 70rem; padding: 1.5rem clamp(.8rem, 3vw, 2rem) 4rem; color: var(--ink);
  background: var(--back); font: 16px/1.55 system-ui, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.2rem 0 .4rem; overflow-wrap: anywhere; }
h3 { font-size: 1rem; margin: 1.4rem 0 .3rem; overflow-wrap: anywhere; }
a { color: var(--link); }
.faint { color: var(--faint); font-size: .9rem; overflow-wrap: anywhere; }
p.faint { margin: .2rem 0; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .8rem 1rem;
  margin: .6rem 0; }
.warning { background: var(--badback); color: var(--bad); border-radius: .4rem; padding: .5rem .8rem; margin: .4rem 0;
  overflow-wrap: anywhere; }
.empty { font-size: 1.2rem; font-weight: 700; }
.scroll { overflow-x: auto; }
ul { padding-left: 1.3rem; margin: .3rem 0; } li { overflow-wrap: anywhere; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
th { font-weight: 600; } td.word, th.word { text-align: left; overflow-wrap: anywhere; }
pre, .tokens { font: .88rem/1.75 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; }
.t { background: var(--other); border-right: 2px solid var(--card); border-radius: 3px; }
.t:hover { outline: 1px solid var(--faint); }
.m { background: var(--goodback); color: var(--good); border-bottom: 2px solid var(--good); }
.s { font-weight: 600; font-style: italic; }
.gap { color: var(--faint); font-style: italic; }
.bars { display: flex; align-items: flex-end; height: 4rem; gap: 1px; border-bottom: 1px solid var(--faint); }
.bars i { flex: 1; background: var(--link); min-height: 0; }
.ends { display: flex; justify-content: space-between; }
"""


def html_page(title: str, body: str, style: str = "") -> str:
    """Returns a whole page.

    Args:
        style: further CSS.
    """
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{in_html(title)}</title>\n<style>\n{STYLE}{style}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def page_of_sources(title: str, sources: Sequence[ShownSource]) -> str:
    """Returns a page of what `inspect` shows of the data."""
    parts = [
        f"<h1>{in_html(title)}</h1>",
        '<p class="faint">Each box is a token as the model gets it; point at it to see its number. '
        '<span class="t m">Green and underlined</span> is what the loss counts, or what is measured. '
        '<span class="t s">Italics</span> are special tokens.</p>',
        *map(_source, sources),
    ]
    return html_page(title, "\n".join(parts))


def _source(shown: ShownSource) -> str:
    place = f' <span class="faint">{in_html(shown.place)}</span>' if shown.place else ""
    parts = [f"<h2>{in_html(shown.name)}{place}</h2>"]
    if shown.is_empty:
        parts.append(f'<p class="warning empty">{in_html(nothing_seen(shown))}</p>')
    parts += [f'<p class="warning">{in_html(warning)}</p>' for warning in shown.warnings]
    parts.append("<ul>" + "".join(f"<li>{in_html(fact)}</li>" for fact in sentences_about(shown)) + "</ul>")
    if len(shown.lengths) > 1 and min(shown.lengths) < max(shown.lengths):
        parts.append(_bars(shown.lengths))
    if shown.left_out:
        rows = "".join(
            f'<tr><td class="word">{in_html(cause)}</td><td>{count:,}</td></tr>'
            for cause, count in shown.left_out.items()
        )
        places = "".join(f"<li>{in_html(place)}</li>" for place in shown.places)
        parts.append(f'<h3>Left out</h3><div class="scroll"><table>{rows}</table></div><ul class="faint">{places}</ul>')
    parts += [_example(example, shown.marks) for example in shown.examples]
    return "<section>\n" + "\n".join(parts) + "\n</section>"


def _bars(lengths: Sequence[int]) -> str:
    counts = histogram(lengths, _COLUMNS)
    drawn = "".join(f'<i style="height:{100 * count / max(counts):.1f}%" title="{count:,}"></i>' for count in counts)
    return (
        f'<div class="bars" role="img" aria-label="distribution of the lengths">{drawn}</div>'
        f'<div class="ends faint"><span>{min(lengths):,} tokens</span><span>{max(lengths):,}</span></div>'
    )


def _example(example: ShownExample, marks: str | None) -> str:
    notes = "".join(f'<p class="faint">{in_html(note)}</p>' for note in example.notes)
    tokens = "".join(
        f'<span class="gap">[… {token:,} more …]</span>' if isinstance(token, int) else _token(token)
        for token in shortened(example.tokens, HEAD, TAIL)
    )
    return f'<h3>{in_html(headline(example, marks))}</h3>{notes}<div class="card tokens">{tokens}</div>'


def _token(token: ShownToken) -> str:
    names = "t" + (" m" if token.marked else "") + (" s" if token.special else "")
    return f'<span class="{names}" title="{token.id}">{in_html(visible(token.text))}</span>'
