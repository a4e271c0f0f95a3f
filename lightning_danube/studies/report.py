"""What came of a study: a table, a verdict for each variant in words, and the same as parquet and Markdown."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from lightning_danube.result_files import write_json, write_parquet, write_text
from lightning_danube.studies.comparison import Comparison, compare, verdict
from lightning_danube.studies.design import Design
from lightning_danube.studies.search import Search, shown_value
from lightning_danube.studies.trials import Result
from lightning_danube.tables import markdown_table, text_table

SHOWN_TRIALS = 10


def write_report(design: Design, results: Sequence[Result], directory: Path) -> str:
    """Writes `study.parquet` (a row a run), `study.md` and `summary.json` into the study's directory; the text."""
    complete = [result for result in results if result.state == "complete"]
    values: dict[str, dict[int, float]] = {variant: {} for variant in design.variants}
    for result in complete:
        values[result.variant][result.seed] = result.metrics[design.metric]
    comparisons = compare(values, design.baseline)
    verdicts = [verdict(one, design.baseline, design.metric, design.better) for one in comparisons]
    notes = [
        f"{result.variant}-seed{result.seed}: {result.state}{f': {result.error}' if result.error else ''}"
        for result in results
        if result.state != "complete"
    ]
    header, rows = _table(design, complete, comparisons)
    text = "\n".join(["", text_table(header, rows), "", *notes, *verdicts, f"written to {directory}"])
    _write_parquet(directory / "study.parquet", design, results)
    lines = [
        f"# {design.name}: {design.metric}",
        "",
        markdown_table(header, rows),
        "",
        *(f"- {line}" for line in [*notes, *verdicts]),
    ]
    write_text(directory / "study.md", "\n".join(lines) + "\n")
    summary = {
        "name": design.name,
        "base": design.base,
        "metric": design.metric,
        "better": design.better,
        "baseline": design.baseline,
        "commit": _commit(),
        "runs": len(results),
        "runs_complete": len(complete),
        "comparisons": [asdict(one) for one in comparisons],
        "verdicts": verdicts,
    }
    write_json(directory / "summary.json", summary)
    return text


def write_search_report(search: Search, directory: Path) -> str:
    """The same of a search: its trials from the best on, and how much each setting matters."""
    design = search.design
    lower = design.better == "lower"
    tried = search.tried()
    complete = sorted(
        (trial for trial in tried if trial.value is not None),
        key=lambda trial: (trial.value or 0.0) * (1 if lower else -1),
    )
    keys = list(design.search)
    header = ["trial", design.metric, *(key.rpartition(".")[2] for key in keys), *design.also]
    rows = []
    for trial in complete[:SHOWN_TRIALS]:
        metrics = trial.user_attrs["metrics"]
        settings = [shown_value(trial.params[key]) for key in keys]
        rows.append(
            [
                str(trial.user_attrs["number"]),
                f"{trial.value:.4f}",
                *settings,
                *(f"{metrics[key]:.4f}" for key in design.also),
            ]
        )
    importances = search.importances()
    notes = [
        f"trial {trial.user_attrs['number']}: failed: {trial.user_attrs['error']}"
        for trial in tried
        if trial.value is None
    ]
    if importances:
        parts = ", ".join(f"{key.rpartition('.')[2]} {share:.0%}" for key, share in importances.items())
        notes.append(f"of what differs between the trials is explained by {parts} (fANOVA, {len(complete)} trials)")
    else:
        notes.append("how much each setting matters needs at least 4 trials that differ")
    shown = f"{min(len(complete), SHOWN_TRIALS)} best of {len(complete)}, each a mean over {len(design.seeds)} seeds"
    text = "\n".join(["", text_table(header, rows), shown, "", *notes, f"written to {directory}"])
    parquet = [
        {
            "study": design.name,
            "trial": trial.user_attrs["number"],
            design.metric: trial.value,
            **{key: trial.user_attrs.get("metrics", {}).get(key) for key in design.also},
            **{key: str(value) if isinstance(value, bool) else value for key, value in trial.params.items()},
            "error": trial.user_attrs.get("error"),
            "seconds": trial.user_attrs.get("seconds"),
        }
        for trial in tried
    ]
    write_parquet(directory / "study.parquet", parquet)
    lines = [
        f"# {design.name}: {design.metric}",
        "",
        markdown_table(header, rows),
        "",
        shown,
        "",
        *(f"- {line}" for line in notes),
    ]
    write_text(directory / "study.md", "\n".join(lines) + "\n")
    summary = {
        "name": design.name,
        "base": design.base,
        "metric": design.metric,
        "better": design.better,
        "commit": _commit(),
        "trials": len(tried),
        "trials_complete": len(complete),
        "best": None if not complete else {"value": complete[0].value, "settings": complete[0].params},
        "importances": importances,
    }
    write_json(directory / "summary.json", summary)
    return text


def _table(
    design: Design, complete: Sequence[Result], comparisons: Sequence[Comparison]
) -> tuple[list[str], list[list[str]]]:
    header = ["variant", "seeds", design.metric, f"against {design.baseline}", "95 % interval", "bootstrap", "p, Holm"]
    header += design.also
    by_variant = {one.variant: one for one in comparisons}
    rows = []
    for variant in design.variants:
        ours = [result.metrics for result in complete if result.variant == variant]
        cells = [variant, str(len(ours)), _mean(ours, design.metric)]
        one = by_variant.get(variant)
        if one is None or one.low is None or one.high is None or one.bootstrap is None or one.p is None:
            cells += ["" if one is None else f"{one.mean:+.4g}", "", "", ""]
        else:
            low, high = one.bootstrap
            cells += [f"{one.mean:+.4g}", f"{one.low:+.4g} to {one.high:+.4g}", f"{low:+.4g} to {high:+.4g}"]
            cells.append(f"{one.p:.2g}")
        rows.append([*cells, *(_mean(ours, key) for key in design.also)])
    return header, rows


def _mean(metrics: Sequence[dict[str, float]], key: str) -> str:
    found = [one[key] for one in metrics if key in one]
    if not found:
        return "–"
    mean = sum(found) / len(found)
    return f"{mean:,.0f}" if abs(mean) >= 1000 else f"{mean:.4f}"


def _write_parquet(path: Path, design: Design, results: Sequence[Result]) -> None:
    keys = (design.metric, *design.also)
    rows = [
        {
            "study": design.name,
            "variant": result.variant,
            "seed": result.seed,
            "state": result.state,
            **{key: result.metrics.get(key) for key in keys},
            "error": result.error,
            "run": result.run,
            "seconds": result.seconds,
        }
        for result in results
    ]
    write_parquet(path, rows)


def _commit() -> str | None:
    """Of the checkout that the code runs from, if it is one."""
    root = Path(__file__).resolve().parents[2]
    try:
        done = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty"], capture_output=True, text=True
        )
    except OSError:
        return None
    return done.stdout.strip() or None
