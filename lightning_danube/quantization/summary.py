"""The result of a quantization evaluation as tables, Markdown, rows of a file, and a figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning_danube.intervals import Estimate
from lightning_danube.outside.texts import in_markdown
from lightning_danube.quantization.levels import FULL, Level
from lightning_danube.quantization.measured import MeasuredLevel
from lightning_danube.quantization.report import MIB, Row, percent, recommendation, rows_of
from lightning_danube.terminal import counted, markdown_table, text_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation

NOISE = "≈"
# Okabe and Ito's palette: people with any kind of colour vision can tell its colours apart.
COLOURS = {"gguf": "#0072B2", "bitsandbytes": "#D55E00", "hqq": "#009E73", "rounding": "#8a8a8a"}
MARKERS = {"gguf": "o", "bitsandbytes": "s", "hqq": "^", "rounding": "v"}
ENDS = ("low", "high")


class LevelTable(NamedTuple):
    """A table: the names of its columns, and its cells."""

    header: Sequence[str]
    body: Sequence[Sequence[str]]


class LevelResults(NamedTuple):
    """The measurements in the form in which they are shown.

    Args:
        failed: name of the level → why it was not measured.
        notes: a legend of the tables, then remarks on single levels.
        advice: which levels to take.
    """

    rows: list[Row]
    failed: dict[str, str]
    tables: list[LevelTable]
    notes: list[str]
    advice: list[str]

    @classmethod
    def of(
        cls,
        done: Mapping[Level, MeasuredLevel],
        failed: Mapping[Level, str],
        levels: Sequence[Level],
        context_lengths: Sequence[int],
    ) -> LevelResults:
        """
        Args:
            levels: the levels, in the order of the tables.
            context_lengths: everything except `perplexity by context` is measured at the first length.
        """
        rows = rows_of(done, levels, context_lengths[0])
        tables = [main_table(rows)]
        if len(context_lengths) > 1:
            tables.append(length_table(rows))
        if any(row.measured.cost for row in rows):
            tables.append(cost_table(rows))
        notes = [table_legend(rows), *failure_notes(failed), *fallback_notes(rows)]
        notes += [f"{row.level.name}: {row.measured.cost_reason}" for row in rows if row.measured.cost_reason]
        missing = {level.name: failed[level] for level in levels if level in failed}
        return cls(rows, missing, tables, notes, recommendation(rows))

    def text(self) -> str:
        """Returns the tables, the notes and the advice for a terminal."""
        tables = [text_table(*table) + "\n" for table in self.tables]
        return "\n".join(["", *tables, *self.notes, "", *self.advice])

    def markdown(self, weights: str, text: str) -> str:
        """Returns a page with the tables, the notes and the advice.

        Args:
            weights, text: names of the model and of the text.
        """
        parts = [
            f"# {in_markdown(weights)} in fewer bits, on {in_markdown(text)}",
            *(markdown_table(*table) for table in self.tables),
        ]
        parts += ["\n".join(f"- {in_markdown(line)}" for line in lines) for lines in (self.notes, self.advice)]
        return "\n\n".join(part for part in parts if part) + "\n"

    def flat_rows(self) -> list[dict[str, Any]]:
        """Returns a row of plain values for each level, measured or not."""
        values = [row.flat() | {"not_measured": None} for row in self.rows]
        return values + [
            dict.fromkeys(values[0]) | {"level": name, "not_measured": why} for name, why in self.failed.items()
        ]

    def summary(self, weights: str, text: str, precision: str | int) -> dict[str, Any]:
        """Returns the content of `summary.json`."""
        return {
            "weights": weights,
            "precision": precision,
            "text": text,
            "levels": [row.flat() for row in self.rows],
            "not_measured": self.failed,
            "recommendation": self.advice,
        }


def level_line(
    level: Level, done: Mapping[Level, MeasuredLevel], failed: Mapping[Level, str], context_length: int
) -> str:
    """Returns the result of one level in a line."""
    if level in failed:
        return f"  {level.name}: not measured: {failed[level]}"
    row = rows_of(done, [] if level == FULL else [level], context_length)[-1]
    change = "" if level == FULL else f" ({percent(row.change)})"
    return (
        f"  {level.name}: {row.measured.content.bits_per_weight:.2f} bits/weight, perplexity "
        f"{row.perplexity.value:.3f}{change}, {row.measured.seconds:.0f} s"
    )


# --- tables -----------------------------------------------------------------------------------------------------------


def main_table(rows: Sequence[Row]) -> LevelTable:
    """Returns a table of the size and the quality of each level."""
    header = ["level", "MiB", "bits", "perplexity", "change", "KL, nats", "KL, 99 %", "same first", "cloze"]
    body = []
    for row in rows:
        full = row.level == FULL
        content = row.measured.content
        cloze = "" if row.cloze is None else share(row.cloze)
        if not full and row.cloze_change is not None:
            cloze += f" {100 * row.cloze_change.value:+.0f}{noise(row.cloze_change)}"
        body.append(
            [
                row.level.name,
                f"{content.tensor_bytes / MIB:,.1f}",
                f"{content.bits_per_weight:.2f}",
                with_half(row.perplexity),
                "" if full else percent(row.change) + noise(row.change),
                "" if full else f"{row.divergence.value:.1e}",
                "" if full else f"{row.divergence_99:.1e}",
                "" if full else share(row.same_first),
                cloze,
            ]
        )
    return LevelTable(header, body)


def length_table(rows: Sequence[Row]) -> LevelTable:
    """Returns a table of the perplexity of each level by context length."""
    lengths = list(rows[0].by_length)
    header = ["perplexity by context", *(f"{length:,}" for length in lengths)]
    body = []
    for row in rows:
        cells = []
        for length in lengths:
            value, change = row.by_length[length]
            shown = "" if row.level == FULL else f" {percent(change, with_interval=False)}{noise(change)}"
            cells.append(f"{value.value:.3f}{shown}")
        body.append([row.level.name, *cells])
    return LevelTable(header, body)


def cost_table(rows: Sequence[Row]) -> LevelTable:
    """Returns a table of the speed and the memory of each level."""
    header = ["speed and memory", "prefill, tokens/s", "decode, tokens/s", "peak memory, MiB"]
    body = []
    for row in rows:
        cost = row.measured.cost
        if cost is None:
            body.append([row.level.name, "–", "–", "–"])
            continue
        peak = "–" if cost.peak_memory_bytes is None else f"{cost.peak_memory_bytes / MIB:,.0f}"
        prefill, decode = cost.prefill_tokens_per_second, cost.decode_tokens_per_second
        body.append([row.level.name, f"{prefill:,.0f}", f"{decode:,.1f}", peak])
    return LevelTable(header, body)


def table_legend(rows: Sequence[Row]) -> str:
    """Returns what the columns of the main table mean, and how much text they are measured on."""
    first = rows[0].flat()
    text = (
        f"{first['tokens']:,} tokens in {first['windows']:,} windows count; intervals: 95 %, over windows; change: "
        f"against the full model, paired; {NOISE}: zero lies inside the interval"
    )
    if first["divergence_tokens"] < first["tokens"]:
        text += f"; KL and same first: on the first {first['divergence_tokens']:,} tokens"
    return text


def failure_notes(failed: Mapping[Level, str]) -> list[str]:
    """Returns a line for each reason why levels were not measured."""
    levels: dict[str, list[str]] = {}
    for level, reason in failed.items():
        levels.setdefault(reason, []).append(level.name)
    return [f"{', '.join(names)}: not measured: {reason}" for reason, names in levels.items()]


def fallback_notes(rows: Sequence[Row]) -> list[str]:
    """Returns a line for each level that stores some tensors in another type."""
    return [
        f"{row.level.name}: {counted(flat['fallbacks'], 'tensor has', 'tensors have')} rows that the type "
        f"cannot hold: {flat['fallback_types']}"
        for row in rows
        if (flat := row.flat())["fallbacks"]
    ]


def noise(change: Estimate) -> str:
    """Returns a mark if the change is not distinguishable from zero."""
    return NOISE if change.is_noise else " "


def with_half(estimate: Estimate) -> str:
    """Returns a value with half the width of its interval."""
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:.3f}"
    return f"{estimate.value:.3f} ± {(estimate.high - estimate.low) / 2:.3f}"


def share(estimate: Estimate) -> str:
    """Returns a share in percent."""
    return f"{100 * estimate.value:.1f} %"


# --- the figure -------------------------------------------------------------------------------------------------------


def frontier_figure(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Returns a figure of each level's change in perplexity, with its 95 % interval, against its size.

    Args:
        rows: rows of `quantization.parquet`. Omits levels without a measurement, and levels with another type of cache,
            because another level has the same weights.
    """
    # pyplot would keep the figure in memory, and would use a screen if there is one.
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    figure = Figure(figsize=(9, 5.5), dpi=90, layout="constrained")
    axes = figure.add_subplot()
    names = []
    for method, colour in COLOURS.items():
        ours = sorted(
            (row for row in rows if row["method"] == method and row["tensor_bytes"] and "cache-" not in row["level"]),
            key=lambda row: row["tensor_bytes"],
        )
        sizes = [row["tensor_bytes"] / MIB for row in ours]
        changes = [100 * row["perplexity_change"] for row in ours]
        ends = [[100 * abs(row[f"perplexity_change_{end}"] - row["perplexity_change"]) for row in ours] for end in ENDS]
        axes.errorbar(
            sizes,
            changes,
            yerr=ends,
            marker=MARKERS[method],
            color=colour,
            capsize=2,
            linestyle="none",
            elinewidth=0.8,
            label=method,
        )
        for row, size, change in zip(ours, sizes, changes, strict=True):
            # The size shows whether the embedding is rounded, too.
            name = row["level"].partition(":")[2].replace("+embeddings", "").replace("+double", "")
            names.append(
                axes.annotate(name, (size, change), (5, 3), textcoords="offset points", fontsize=7, color=colour)
            )
    axes.set_xscale("log")
    # Linear up to 1 %, where the good levels lie, and logarithmic above.
    axes.set_yscale("symlog", linthresh=1.0)
    axes.set_ylim(bottom=min(-0.5, 1.2 * axes.dataLim.y0))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda change, _: f"{change:+,.0f}" if change else "0"))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: f"{size:,.0f}"))
    axes.xaxis.set_minor_formatter(FuncFormatter(lambda size, _: f"{size:,.0f}"))
    axes.axhline(0.0, color="#222222", linewidth=0.8)
    axes.set_xlabel("size of all tensors, MiB")
    axes.set_ylabel("perplexity above the full model's, %\n(linear up to 1, logarithmic above)")
    axes.legend(frameon=False)
    figure.draw_without_rendering()  # the layout and the scales are settled
    place_names(axes, names, radius=4 * figure.dpi / 72)
    return figure


NAME_PLACES = tuple(
    (side * across, up, "left" if side > 0 else "right")
    for across in (5, 14, 26)
    for up in (3, -9, 11, -17, 20, -26)
    for side in (1, -1)
)
"""Offsets of a name from its point in points of 1/72 inch, and its alignment; the first free place is taken."""


def place_names(axes: Axes, names: Sequence[Annotation], radius: float) -> None:
    """Moves the names of points to places where they cover neither each other nor another point.

    Args:
        radius: half the width of a point in pixels.
    """
    from matplotlib.transforms import Bbox

    taken = []
    for name in names:
        x, y = axes.transData.transform(name.xy)
        taken.append(Bbox([[x - radius, y - radius], [x + radius, y + radius]]))
    for name in sorted(names, key=lambda one: one.xy):
        covered = []
        for x, y, alignment in NAME_PLACES:
            name.set(position=(x, y), horizontalalignment=alignment)
            box = name.get_window_extent()
            outside = not (axes.bbox.contains(box.x0, box.y0) and axes.bbox.contains(box.x1, box.y1))
            covered.append(sum(box.overlaps(other) for other in taken) + outside)
            if not covered[-1]:
                break
        x, y, alignment = NAME_PLACES[covered.index(min(covered))]
        name.set(position=(x, y), horizontalalignment=alignment)
        taken.append(name.get_window_extent())
