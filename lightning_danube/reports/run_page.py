"""Writes one self-contained HTML page about a run of any task, or about several runs side by side.

The tables and figures are those of the notebooks. A part whose file or curve is missing is one line of the page.
"""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
import yaml
from matplotlib.figure import Figure

from lightning_danube.inspection.page import html_page
from lightning_danube.outside.texts import in_html
from lightning_danube.reports import figures, runs, tensorboard
from lightning_danube.reports.runs import MissingResult, RecordedRun
from lightning_danube.training.history import differences

LARGEST_SVG = 1 << 20
"""Bytes above which a figure becomes a picture of pixels."""
WRITTEN_REPORTS = ("report.md", "quantization.md")
"""Reports that tasks write into the directory of a run."""
_STYLE = """\
nav { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; margin: .8rem 0 0; font-size: .95rem; }
figure { margin: .8rem 0; overflow-x: auto; background: #fff; border: 1px solid var(--line); border-radius: .5rem; }
figure img { display: block; width: 100%; min-width: 40rem; max-width: 60rem; height: auto; margin: 0 auto;
  padding: .5rem; }
@media (prefers-color-scheme: dark) { figure { background: #1c1f24; }
  figure img { filter: invert(.89) hue-rotate(180deg); } }
.missing { color: var(--faint); border-left: .25rem solid var(--line); padding: .2rem .8rem; margin: .6rem 0;
  overflow-wrap: anywhere; }
details { margin: .6rem 0; } summary { cursor: pointer; }
section { border-top: 1px solid var(--line); margin-top: 2.2rem; } section > h2 { margin-top: 1rem; }
code { font: .9em ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
"""

_Part = Callable[[], str]


def page_of_runs(compared: Sequence[RecordedRun]) -> str:
    """Returns the page of one run, or of several side by side."""
    title = compared[0].title if len(compared) == 1 else f"{len(compared)} runs"
    sections: list[tuple[str, list[_Part]]] = [("Overview", [lambda: _overview(compared)])]
    if len(compared) > 1:
        sections.append(("Settings that differ", [lambda: _differing_settings(compared)]))
    sections.append(("Curves", _curves(compared)))
    for number, run in enumerate(compared, start=1):
        named = f"Run {number}: {run.title}" if len(compared) > 1 else ""
        sections += _sections_of(run, named)
    body = [f"<h1>{in_html(title)}</h1>"]
    if len(compared) > 1:
        body.append("<ol>" + "".join(f"<li>{in_html(run.title)}</li>" for run in compared) + "</ol>")
    links = (f'<a href="#part{number}">{in_html(name)}</a>' for number, (name, _) in enumerate(sections))
    body.append(f"<nav>{''.join(links)}</nav>")
    for number, (name, parts) in enumerate(sections):
        content = "\n".join(_or_missing(part) for part in parts)
        body.append(f'<section id="part{number}">\n<h2>{in_html(name)}</h2>\n{content}\n</section>')
    return html_page(title, "\n".join(body), _STYLE)


def _or_missing(part: _Part) -> str:
    try:
        return part()
    except MissingResult as missing:
        return _missing(str(missing))


def _missing(reason: str) -> str:
    return f'<p class="missing">Missing: {_with_code(reason)}</p>'


def _with_code(text: str) -> str:
    """Returns a line of Markdown as HTML: stretches of code, and characters that a backslash marks as text."""
    parts = re.split(r"(?<!\\)`([^`]+)`", text)
    texts = [in_html(re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", part)) for part in parts[::2]]
    codes = [f"<code>{in_html(part)}</code>" for part in parts[1::2]]
    return "".join(one for pair in zip_longest(texts, codes, fillvalue="") for one in pair)


# --- all runs ---------------------------------------------------------------------------------------------------------


def _overview(compared: Sequence[RecordedRun]) -> str:
    facts = [_facts(run) for run in compared]
    keys = dict.fromkeys(key for found in facts for key in found)
    rows = [[found.get(key, float("nan")) for found in facts] for key in keys]
    parts = [_table(pd.DataFrame(rows, index=list(keys), columns=[run.title for run in compared], dtype=object))]
    for run in compared:
        prefix = f"{run.title}: " if len(compared) > 1 else ""
        parts += [_missing(prefix + problem) for problem in run.problems]
    return "\n".join(parts)


def _facts(run: RecordedRun) -> dict[str, Any]:
    """Returns what a run is, and the numbers of its summary that are not in lists."""
    facts: dict[str, Any] = {
        section: str((run.config.get(section) or {}).get("class_path", "–")).rpartition(".")[2]
        for section in ("model", "data")
    }
    trainer = run.config.get("trainer") or {}
    facts["accelerator, precision"] = f"{trainer.get('accelerator', '–')}, {trainer.get('precision', '–')}"
    return facts | _flat_numbers(run.summary)


def _flat_numbers(value: Any, name: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        items = ((f"{name} {key}".strip().replace("_", " "), inner) for key, inner in value.items())
        return {key: number for path, inner in items for key, number in _flat_numbers(inner, path).items()}
    return {name: value} if isinstance(value, int | float | str) else {}


def _differing_settings(compared: Sequence[RecordedRun]) -> str:
    flat = [{key: new for key, (_, new) in differences({}, run.config).items()} for run in compared]
    keys = dict.fromkeys(key for config in flat for key in config)
    rows = {
        key: ["–" if config.get(key) is None else str(config[key]) for config in flat]
        for key in keys
        if key not in ("name", "runs") and any(config.get(key) != flat[0].get(key) for config in flat)
    }
    if not rows:
        return "<p>The runs have the same settings.</p>"
    return _table(pd.DataFrame.from_dict(rows, orient="index", columns=[run.title for run in compared]))


def _curves(compared: Sequence[RecordedRun]) -> list[_Part]:
    if len(compared) == 1 and compared[0].is_pretraining:
        (run,) = compared
        drawn: list[tuple[str, Callable[[RecordedRun], Figure]]] = [
            ("Training loss over tokens", figures.training_loss),
            ("Learning rate and gradient norm over tokens", figures.optimization),
            ("Throughput over tokens", figures.throughput),
            ("The mix over tokens", figures.mix_over_tokens),
        ]
        parts: list[_Part] = [_drawing(figure, run, what) for what, figure in drawn]
        shown = ("optimizer", "throughput", "mix", "tokens_seen")
        groups = [name for name in tensorboard.groups(compared) if name not in shown]
        parts += [_drawing(partial(tensorboard.group, name=name), run, f"curves {name}/…") for name in groups]
        return parts
    return [
        lambda: _without_events(compared),
        *(_group(compared, name) for name in tensorboard.groups(compared)),
        lambda: _once(compared),
    ]


def _without_events(compared: Sequence[RecordedRun]) -> str:
    lacking = [run.title for run in compared if run.curves.empty]
    return _missing(f"no curves, of TensorBoardLogger or CSVLogger, in {', '.join(lacking)}") if lacking else ""


def _once(compared: Sequence[RecordedRun]) -> str:
    values = tensorboard.logged_once(compared)
    return "" if values.empty else "<h3>values that were logged once</h3>" + _table(values)


def _drawing(draw: Callable[[RecordedRun], Figure], run: RecordedRun, what: str) -> _Part:
    return lambda: _figure(draw(run), what)


def _group(compared: Sequence[RecordedRun], name: str) -> _Part:
    return lambda: f"<h3>{in_html(name)}</h3>" + _figure(tensorboard.compared_group(compared, name), f"curves {name}/…")


# --- one run ----------------------------------------------------------------------------------------------------------


def _sections_of(run: RecordedRun, named: str) -> list[tuple[str, list[_Part]]]:
    """Returns the sections about one run.

    Args:
        named: title of the one section that holds all parts; empty for a section for each part.
    """
    sections: list[tuple[str, list[_Part]]] = []
    if run.is_pretraining:
        sections.append(
            (
                "Stages and held-out loss",
                [
                    lambda: _table(runs.held_out_loss_table(run).T),
                    lambda: _figure(figures.held_out_losses(run), "Held-out loss by source after each stage"),
                    lambda: _figure(figures.stage_mixes(run), "The mix of each stage, planned and seen"),
                ],
            )
        )
        sections.append(("Samples", [lambda: _samples(run)]))
    if answers := {tag: texts for tag, texts in run.texts.items() if not _is_shown_elsewhere(run, tag)}:
        sections.append(("Texts", [lambda: _texts(answers)]))
    written = [name for name in WRITTEN_REPORTS if (run.directory / name).is_file()]
    if written or run.pictures:
        parts: list[_Part] = [_report_file(run.directory / name) for name in written]
        sections.append(("Results", [*parts, lambda: _pictures(run)]))
    sections.append(("Sessions", [lambda: _sessions(run)]))
    sections.append(("Plan and configuration", [lambda: _plan_and_configuration(run)]))
    if not named:
        return sections
    return [(named, [part for title, inner in sections for part in (_heading(title), *inner)])]


def _heading(title: str) -> _Part:
    return lambda: f"<h3>{in_html(title)}</h3>"


def _is_shown_elsewhere(run: RecordedRun, tag: str) -> bool:
    return (
        tag == "run/plan"
        or (run.is_pretraining and tag.startswith("samples/"))
        # A written report has these tables, too.
        or tag.split("/")[0] in ("evaluation", "quantization")
    )


def _samples(run: RecordedRun) -> str:
    samples = runs.text_samples(run)
    parts = []
    for prompt, rows in samples.groupby("prompt", sort=False):
        *earlier, last = (
            f'<p class="faint">{in_html(str(row.stage))}, after {row.tokens:,} tokens</p>'
            f'<div class="card"><pre>{in_html(str(row.text))}</pre></div>'
            for row in rows.itertuples()
        )
        before = f"<details><summary>earlier: {len(earlier)}</summary>{''.join(earlier)}</details>" if earlier else ""
        parts.append(f"<h3>{in_html(str(prompt))}</h3>{last}{before}")
    return "\n".join(parts)


def _texts(texts: dict[str, dict[int, str]]) -> str:
    return "\n".join(
        f"<details open><summary>{in_html(tag)}, step {max(found):,}</summary>"
        f'<div class="card">{markdown_html(found[max(found)])}</div></details>'
        for tag, found in texts.items()
    )


def _report_file(path: Path) -> _Part:
    return lambda: markdown_html(path.read_text("utf-8"))


def _pictures(run: RecordedRun) -> str:
    return "\n".join(f"<h3>{in_html(tag)}</h3>{_image(png, 'png', tag)}" for tag, png in run.pictures.items())


def _sessions(run: RecordedRun) -> str:
    """Returns a table of the sessions of a run: when each began, from which step, and what was changed."""
    if not run.history:
        return '<p class="missing">Missing: no session is recorded (history.jsonl, which fit writes)</p>'
    rows = []
    for record in run.history:
        changes = [
            f"{key}: {old} → {new}" for key, (old, new) in (record.get("differences") or {}).items()
        ]  # of a resume
        versions = ", ".join(f"{name} {version}" for name, version in (record.get("versions") or {}).items())
        rows.append(
            {
                "began": str(record.get("time", "–")),
                "from step": record.get("step", 0),
                "devices": record.get("devices", "–"),
                "changed": "; ".join(changes) or "–",
                "commit": str(record.get("commit") or "–")[:12],
                "versions": versions,
            }
        )
    index = pd.Index([str(number) for number in range(1, len(rows) + 1)], name="session")
    return _table(pd.DataFrame(rows, index=index))


def _plan_and_configuration(run: RecordedRun) -> str:
    parts = []
    if "run/plan" in run.texts:
        parts.append(
            f"<details><summary>the plan that was printed at the start</summary>{markdown_html(tensorboard.plan(run))}"
            "</details>"
        )
    config = yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True, width=100)
    parts.append(
        f'<details><summary>config.yaml</summary><div class="card"><pre>{in_html(config)}</pre></div></details>'
    )
    return "\n".join(parts)


# --- parts of a page --------------------------------------------------------------------------------------------------


def _table(frame: pd.DataFrame, digits: int = 4) -> str:
    """Returns a frame as a table. Numbers are right-aligned, and rounded to so many digits."""
    head = "".join(
        f"<th>{in_html(str(column))}</th>" for column in ["" if frame.index.name is None else frame.index.name, *frame]
    )
    rows = []
    for name, values in zip(frame.index, frame.to_numpy().tolist(), strict=True):
        cells = "".join(_cell(value, digits) for value in values)
        rows.append(f"<tr><th>{in_html(str(name))}</th>{cells}</tr>")
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _cell(value: Any, digits: int) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return f'<td class="word">{in_html(str(value))}</td>'
    if isinstance(value, float) and math.isnan(value):
        return "<td>–</td>"
    if isinstance(value, int) or (value.is_integer() and abs(value) < 1e15):
        return f"<td>{int(value):,}</td>"
    return f"<td>{value:,.1f}</td>" if abs(value) >= 1000 else f"<td>{value:.{digits}g}</td>"


def _figure(figure: Figure, what: str) -> str:
    file = io.BytesIO()
    # Without a salt and a date, each page of the same run would differ.
    with matplotlib.rc_context({"svg.hashsalt": "report"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    if len(file.getvalue()) <= LARGEST_SVG:
        return _image(file.getvalue(), "svg+xml", what)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=2 * figures.DPI)
    return _image(file.getvalue(), "png", what)


def _image(content: bytes, kind: str, what: str) -> str:
    data = base64.b64encode(content).decode()
    return f'<figure><img alt="{in_html(what)}" src="data:image/{kind};base64,{data}"></figure>'


def markdown_html(text: str) -> str:
    """Returns the Markdown of this project's reports as HTML: headings, tables, lists, code and paragraphs."""
    parts, lines = [], text.splitlines()
    while lines:
        kind = _kind(lines[0])
        block = [lines.pop(0)]
        while lines and kind in _JOINED and _kind(lines[0]) == kind:
            block.append(lines.pop(0))
        parts.append(_block(kind, block))
    return "\n".join(parts)


_JOINED = ("table", "list", "code", "text")


def _kind(line: str) -> str:
    beginnings = {"#": "heading", "|": "table", "- ": "list", "    ": "code"}
    found = next((kind for beginning, kind in beginnings.items() if line.startswith(beginning)), "text")
    return found if line.strip() else "nothing"


def _block(kind: str, lines: Sequence[str]) -> str:
    match kind:
        case "nothing":
            return ""
        case "heading":
            return f"<h3>{_with_code(lines[0].lstrip('# '))}</h3>"
        case "list":
            return "<ul>" + "".join(f"<li>{_with_code(line[2:])}</li>" for line in lines) + "</ul>"
        case "code":
            return "<pre>" + in_html("\n".join(line.removeprefix("    ") for line in lines)) + "</pre>"
        case "table":
            rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
            kept = [row for row in rows if not all(re.fullmatch(r":?-+:?", cell) for cell in row)]
            cells = ["".join(f"<td>{_with_code(cell)}</td>" for cell in row) for row in kept]
            head = cells[0].replace("td>", "th>")
            body = "".join(f"<tr>{row}</tr>" for row in cells[1:])
            return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'
        case _:
            return f"<p>{_with_code(' '.join(lines))}</p>"
