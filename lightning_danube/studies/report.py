"""Writes the results of a study: a table and a verdict for each variant, as text, parquet and Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial

from lightning_danube.files import write_json, write_parquet, write_text
from lightning_danube.intervals import student
from lightning_danube.outside.texts import in_markdown
from lightning_danube.studies.comparison import Comparison, compare, verdict
from lightning_danube.studies.design import Design
from lightning_danube.studies.scaling import SIZE, TOKENS, fit_law, law_lines, points_of, predict_largest
from lightning_danube.studies.search import Search, shown_value
from lightning_danube.studies.trials import Result
from lightning_danube.terminal import Table, markdown_table, text_table

SHOWN_TRIALS = 10
ALSO = "Beside it, with the differences from {baseline} and half their 95 % intervals, each for itself:"


def write_report(design: Design, results: Sequence[Result], directory: Path, command: str) -> str:
    """Writes `study.parquet` (a row per run), `study.md` and `summary.json` into the study's directory.

    Returns the report as text.
    """
    complete = [result for result in results if result.state == "complete"]
    if design.law:
        return _write_law_report(design, results, directory, command)
    comparisons = compare(_values(design, complete, design.metric), design.baseline)
    also = {key: compare(_values(design, complete, key), design.baseline) for key in design.also}
    verdicts = [verdict(one, design.baseline, design.metric, design.better) for one in comparisons]
    notes = _not_complete(results)
    tables = [_table(design, complete, comparisons)]
    if design.also:
        tables.append(_table_of_also(design, complete, also))
    texts = [line for table in tables for line in (text_table(*table), "")]
    if design.also:
        texts.insert(2, ALSO.format(baseline=design.baseline))
    text = "\n".join(["", *texts, *notes, *verdicts, f"written to {directory}"])
    write_parquet(directory / "study.parquet", _rows_of_runs(design, results, command))
    lines = [f"# {design.name}: {design.metric}", "", markdown_table(*tables[0]), ""]
    lines += [f"- {in_markdown(line)}" for line in [*notes, *verdicts]]
    if design.also:
        lines += ["", ALSO.format(baseline=design.baseline), "", markdown_table(*tables[1])]
    write_text(directory / "study.md", "\n".join(lines) + "\n")
    summary = {
        **_origin(design, command, [(result.commit, result.machine) for result in complete]),
        "better": design.better,
        "baseline": design.baseline,
        "runs": len(results),
        "runs_complete": len(complete),
        "comparisons": [one.as_row() for one in comparisons],
        "verdicts": verdicts,
        "also": {key: [one.as_row() for one in found] for key, found in also.items()},
    }
    write_json(directory / "summary.json", summary)
    return text


def _write_law_report(design: Design, results: Sequence[Result], directory: Path, command: str) -> str:
    complete = [result for result in results if result.state == "complete"]
    rows = []
    for variant in design.variants:
        ours = [result.metrics for result in complete if result.variant == variant]
        if ours:
            losses = _with_interval([one[design.metric] for one in ours])
            rows.append([variant, str(len(ours)), f"{ours[0][SIZE]:,.0f}", f"{ours[0][TOKENS]:,.0f}", losses])
    table = ["variant", "seeds", "parameters without embedding", "tokens", design.metric], rows
    found = _rows_of_runs(design, results, command)
    points = points_of(found, design.metric)
    law = None
    notes = _not_complete(results)
    try:
        law = fit_law(points)
        notes += law_lines(law, predict_largest(points), points)
    except ValueError as error:
        notes.append(f"no law yet: {error}")
    write_parquet(directory / "study.parquet", found)
    lines = [
        f"# {design.name}: {design.metric}",
        "",
        markdown_table(*table),
        "",
        *(f"- {in_markdown(line)}" for line in notes),
    ]
    write_text(directory / "study.md", "\n".join(lines) + "\n")
    summary = {
        **_origin(design, command, [(result.commit, result.machine) for result in complete]),
        "runs": len(results),
        "runs_complete": len(complete),
        "law": None
        if law is None
        else {name: {"value": one.value, "low": one.low, "high": one.high} for name, one in law.coefficients().items()},
    }
    write_json(directory / "summary.json", summary)
    return "\n".join(["", text_table(*table), "", *notes, f"written to {directory}"])


def _origin(design: Design, command: str, where: Sequence[tuple[str | None, str | None]]) -> dict[str, Any]:
    """Returns the first entries of every summary: the study, and the commits and machines of its runs."""
    return {
        "name": design.name,
        "command": command,
        "base": design.base,
        "metric": design.metric,
        "commits": list(dict.fromkeys(commit for commit, _ in where)),
        "machines": list(dict.fromkeys(machine for _, machine in where)),
    }


def _not_complete(results: Sequence[Result]) -> list[str]:
    return [
        f"{result.variant}-seed{result.seed}: {result.state}{f': {result.error}' if result.error else ''}"
        for result in results
        if result.state != "complete"
    ]


def _values(design: Design, complete: Sequence[Result], key: str) -> dict[str, dict[int, float]]:
    """Returns variant → seed → a metric."""
    values: dict[str, dict[int, float]] = {variant: {} for variant in design.variants}
    for result in complete:
        if key in result.metrics:
            values[result.variant][result.seed] = result.metrics[key]
    return values


def write_search_report(search: Search, directory: Path, command: str) -> str:
    """Writes the report of a search, and returns it: trials from the best on, and the importance of each setting."""
    design = search.design
    lower = design.better == "lower"
    tried = search.tried()
    complete = sorted(
        (trial for trial in tried if trial.value is not None),
        key=lambda trial: (trial.value or 0.0) * (1 if lower else -1),
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
    best = _table_of_best(design, complete[:SHOWN_TRIALS])
    shown = f"{min(len(complete), SHOWN_TRIALS)} best of {len(complete)}, each "
    shown += (
        f"a mean over {len(design.seeds)} seeds with half its 95 % interval" if len(design.seeds) > 1 else "one run"
    )
    texts, blocks = [text_table(*best), shown, ""], [markdown_table(*best), "", shown, ""]
    marginals = search.marginals()
    if marginals:
        table = _table_of_marginals(design, marginals)
        title = "Each setting by itself, a mean over all that it was combined with:"
        texts += [title, text_table(*table), ""]
        blocks += [title, "", markdown_table(*table), ""]
    _write_search_parquet(directory / "study.parquet", search, command)
    lines = [f"# {design.name}: {design.metric}", "", *blocks, *(f"- {in_markdown(line)}" for line in notes)]
    write_text(directory / "study.md", "\n".join(lines) + "\n")
    known = [trial.user_attrs for trial in complete]
    summary = {
        **_origin(design, command, [(one.get("commit"), one.get("machine")) for one in known]),
        "better": design.better,
        "trials": len(tried),
        "trials_complete": len(complete),
        "best": None if not complete else {"value": complete[0].value, "settings": complete[0].params},
        "importances": importances,
        "marginals": {key: {str(value): one for value, one in by.items()} for key, by in marginals.items()},
    }
    write_json(directory / "summary.json", summary)
    return "\n".join(["", *texts, *notes, f"written to {directory}"])


def _table_of_best(design: Design, trials: Sequence[FrozenTrial]) -> Table:
    header = ["trial", design.metric, *(key.rpartition(".")[2] for key in design.search), *design.also]
    rows = []
    for trial in trials:
        metrics = trial.user_attrs["metrics"]
        by_seed = trial.user_attrs["by_seed"].values()
        rows.append(
            [
                str(trial.user_attrs["number"]),
                _with_interval([one[design.metric] for one in by_seed]),
                *(shown_value(trial.params[key]) for key in design.search),
                *(f"{metrics[key]:.4f}" for key in design.also),
            ]
        )
    return header, rows


def _table_of_marginals(design: Design, marginals: Mapping[str, Mapping[Any, list[float]]]) -> Table:
    rows = [
        [key.rpartition(".")[2], shown_value(value), _with_interval(by_seed)]
        for key, by_value in marginals.items()
        for value, by_seed in by_value.items()
        if by_seed
    ]
    return ["setting", "value", design.metric], rows


def _with_interval(values: Sequence[float]) -> str:
    half = student(values).half
    return f"{sum(values) / len(values):.4f}" + ("" if half is None else f" ± {half:.2g}")


def _write_search_parquet(path: Path, search: Search, command: str) -> None:
    """Writes a row for each run, which is a setting with one seed."""
    design = search.design
    rows = []
    for trial in search.tried():
        known = trial.user_attrs
        by_seed = known.get("by_seed", {})
        for seed in design.seeds:
            metrics = by_seed.get(str(seed), {})
            rows.append(
                {
                    "study": design.name,
                    "trial": known["number"],
                    "seed": seed,
                    **{key: metrics.get(key) for key in (design.metric, *design.also)},
                    **{key: str(value) if isinstance(value, bool) else value for key, value in trial.params.items()},
                    "error": known.get("error"),
                    "seconds_of_all_seeds": known.get("seconds"),
                    "command": command,
                    "commit": known.get("commit"),
                    "machine": known.get("machine"),
                }
            )
    write_parquet(path, rows)


def _table(design: Design, complete: Sequence[Result], comparisons: Sequence[Comparison]) -> Table:
    header = ["variant", "seeds", design.metric, f"against {design.baseline}", "95 % interval", "bootstrap", "p, Holm"]
    by_variant = {one.variant: one for one in comparisons}
    rows = []
    for variant in design.variants:
        ours = [result.metrics for result in complete if result.variant == variant]
        cells = [variant, str(len(ours)), _mean(ours, design.metric)]
        one = by_variant.get(variant)
        if one is None or one.resampled is None or one.p is None:
            cells += ["" if one is None else f"{one.difference.value:+.4g}", "", "", ""]
        else:
            ends = ("{:+.4g} to {:+.4g}".format(*estimate.ends) for estimate in (one.difference, one.resampled))
            cells += [f"{one.difference.value:+.4g}", *ends, f"{one.p:.2g}"]
        rows.append(cells)
    return header, rows


def _table_of_also(design: Design, complete: Sequence[Result], also: Mapping[str, Sequence[Comparison]]) -> Table:
    """Returns a table of the other metrics: means, and differences from the baseline with half the interval."""
    found = {(key, one.variant): one for key, comparisons in also.items() for one in comparisons}
    rows = []
    for variant in design.variants:
        ours = [result.metrics for result in complete if result.variant == variant]
        cells = [variant]
        for key in design.also:
            cell, one = _mean(ours, key), found.get((key, variant))
            if one is not None and one.difference.high is not None:
                mean = one.difference.value
                cell += f" ({_short(mean, '+')} ± {_short(one.difference.high - mean)})"
            cells.append(cell)
        rows.append(cells)
    return ["variant", *design.also], rows


def _short(value: float, sign: str = "") -> str:
    return f"{value:{sign},.0f}" if abs(value) >= 100 else f"{value:{sign}.2g}"


def _mean(metrics: Sequence[dict[str, float]], key: str) -> str:
    found = [one[key] for one in metrics if key in one]
    if not found:
        return "–"
    mean = sum(found) / len(found)
    return f"{mean:,.0f}" if abs(mean) >= 1000 else f"{mean:.4f}"


def _rows_of_runs(design: Design, results: Sequence[Result], command: str) -> list[dict[str, Any]]:
    return [
        {
            "study": design.name,
            "variant": result.variant,
            "seed": result.seed,
            "state": result.state,
            **{key: result.metrics.get(key) for key in design.metrics},
            "error": result.error,
            "run": result.run,
            "seconds": result.seconds,
            "command": command,
            "commit": result.commit,
            "machine": result.machine,
        }
        for result in results
    ]
