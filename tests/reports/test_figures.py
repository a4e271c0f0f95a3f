"""Figures show the run's numbers, with units on the axes and colours that everybody can tell apart."""

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure

from lightning_danube.reports import figures, runs
from lightning_danube.reports.runs import RecordedRun

DRAWN = [
    figures.stage_mixes,
    figures.mix_over_tokens,
    figures.training_loss,
    figures.held_out_losses,
    figures.losses_over_mix,
    figures.optimization,
    figures.throughput,
]


@pytest.fixture
def run(tiny_run: Path) -> RecordedRun:
    return runs.read_run(tiny_run)


@pytest.mark.parametrize("draw", DRAWN)
def test_every_figure_can_be_drawn_and_every_axis_says_what_it_shows(
    draw: Callable[[RecordedRun], Figure], run: RecordedRun, tmp_path: Path
) -> None:
    figure = draw(run)
    figure.savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size < 80_000  # six of them stay far below what a repository can bear
    for ax in figure.axes:
        across, up = ax.get_subplotspec().get_geometry()[:2] if ax.get_subplotspec() else (1, 1)  # type: ignore[union-attr]
        categories = any(text.get_text() in ("foundation", "foundation, seen") for text in ax.get_xticklabels())
        assert ax.get_xlabel() or across > 1 or categories
        assert ax.get_ylabel() or up > 1 or ax.get_yticklabels()[0].get_text().startswith("foundation, ")


def test_the_curve_that_is_drawn_is_the_one_that_was_logged(run: RecordedRun) -> None:
    (ax,) = figures.training_loss(run).axes
    loss = run.curve("loss/train")
    assert np.array_equal(ax.lines[0].get_xydata(), np.column_stack([loss.index, loss]))
    assert ax.get_ylabel() == "training loss, nats/token"
    assert [stage.get_text() for stage in ax.texts] == ["foundation", "refinement", "finish"]
    assert [line.get_xdata()[0] for line in ax.lines[1:]] == [12 * 256, 20 * 256]  # type: ignore[index]


def test_bars_are_as_long_as_the_shares(run: RecordedRun) -> None:
    (ax,) = figures.stage_mixes(run).axes
    widths = [bar.get_width() for bar in ax.patches if bar.get_width()]  # type: ignore[attr-defined]
    planned, seen = runs.planned_mix(run), runs.seen_mix(run)
    expected = [mix.loc[stage, source] for stage in planned.index for mix in (planned, seen) for source in run.sources]
    assert widths == pytest.approx(expected)
    marks = [line.get_xdata()[0] for line in ax.lines if len(line.get_xdata())]  # type: ignore[arg-type,index]
    assert marks == list(runs.PAPER_WEB_SHARES)


def test_a_panel_a_source_shows_its_losses_against_the_baseline(run: RecordedRun) -> None:
    axes = figures.held_out_losses(run).axes
    assert [ax.get_title() for ax in axes] == run.sources
    for ax, source in zip(axes, run.sources, strict=True):
        assert ax.lines[0].get_ydata()[0] == run.summary["unigram_loss"][source]  # type: ignore[index]
        assert list(ax.lines[1].get_ydata()) == [s["val_loss"][source] for s in run.summary["stages"]]  # type: ignore[arg-type]


def test_the_mix_below_the_losses_is_the_one_that_was_seen(run: RecordedRun) -> None:
    losses, mix = figures.losses_over_mix(run).axes
    seen = runs.seen_mix(run)
    bars = [bar for bar in mix.patches if bar.get_height()]  # type: ignore[attr-defined]
    heights = [seen.loc[stage, source] for stage in seen.index for source in run.sources]
    assert [bar.get_height() for bar in bars] == pytest.approx(heights)  # type: ignore[attr-defined]
    drawn = {str(line.get_label()): line.get_ydata() for line in losses.get_lines()}
    for source in run.sources:
        np.testing.assert_allclose(np.asarray(drawn[source]), run.curve(f"held_out/{source}").to_numpy())


def test_a_dark_figure_has_light_ink_and_the_same_colours_of_data(run: RecordedRun) -> None:
    light, dark = figures.losses_over_mix(run), figures.in_dark(figures.losses_over_mix(run))
    assert to_rgb(dark.get_facecolor()) == to_rgb(figures.DARK) != to_rgb(light.get_facecolor())
    for before, after in zip(light.axes, dark.axes, strict=True):
        ink = {figures.INK: figures.LIGHT_INK}
        colours = [line.get_color() for line in before.get_lines()]
        assert [line.get_color() for line in after.get_lines()] == [ink.get(str(one), one) for one in colours]
        for label in (after.xaxis.label, after.yaxis.label, *after.get_yticklabels()):
            assert label.get_color() == figures.LIGHT_INK
        assert [bar.get_facecolor() for bar in before.patches] == [bar.get_facecolor() for bar in after.patches]
    on_bars = [(text.get_text(), text.get_color()) for text in light.axes[1].texts]
    assert on_bars == [(text.get_text(), text.get_color()) for text in dark.axes[1].texts]


def test_hollow_marks_stay_hollow_and_names_get_lighter_in_a_dark_figure() -> None:
    figure, (ax,) = figures.new_figure(2)
    ax.plot(0, 0, "o", color=figures.INK, markerfacecolor=figures.INK)
    ax.plot(0, 0, "o", color=figures.FAINT, markerfacecolor="white")
    name, on_bar = ax.text(0, 0, "name", color="#000090"), ax.text(0, 0, "bar", color="black")
    figures.in_dark(figure)
    assert [line.get_markerfacecolor() for line in ax.get_lines()] == [figures.LIGHT_INK, figures.DARK]
    assert to_rgb(name.get_color()) == pytest.approx((2 / 3, 2 / 3, (2 + 0x90 / 255) / 3))
    assert on_bar.get_color() == "black"
    assert {to_hex(spine.get_edgecolor()) for spine in ax.spines.values()} == {figures.FAINT}


def test_the_peaks_share_is_drawn_only_where_a_peak_was_given(run: RecordedRun) -> None:
    assert len(figures.throughput(run).axes) == 2
    del run.curves["throughput/mfu"]
    assert len(figures.throughput(run).axes) == 1


def test_a_figure_of_nothing_says_what_is_missing(run: RecordedRun) -> None:
    del run.curves["throughput/tokens_per_second"]
    with pytest.raises(
        runs.MissingResult, match=r"name lightning_danube\.callbacks\.Throughput in trainer\.callbacks and train again"
    ):
        figures.throughput(run)


def test_a_run_that_is_going_on_is_drawn_as_far_as_it_came(run: RecordedRun, tmp_path: Path) -> None:
    stage = run.summary["stages"][2]
    stage["tokens"], stage["val_loss"] = 0, {}
    for draw in DRAWN:
        draw(run).savefig(tmp_path / "figure.png")


def test_a_source_keeps_its_colour_whatever_stands_beside_it() -> None:
    one = figures.source_colours(["web", "instruct"])
    other = figures.source_colours(["instruct", "forum", "web", *(f"more_{n}" for n in range(9))])
    assert one["web"] == other["web"] and one["instruct"] == other["instruct"]
    assert len(set(other.values())) == len(other)


# How a colour looks with red-, green- and blue-blindness (Machado et al. 2009, severity 1), in linear RGB.
BLIND = {
    "none": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def lab(colour: str, blindness: str) -> np.ndarray:
    """CIE L*a*b* (D65) of a colour as an eye sees it; a distance of about 2 can just be noticed."""
    rgb = np.array(to_rgb(colour))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(np.array(BLIND[blindness]) @ linear, 0, 1)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = to_xyz @ seen / (to_xyz @ np.ones(3))
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("blindness", BLIND)
def test_colours_can_be_told_apart_with_any_colour_vision(blindness: str) -> None:
    seen = {name: lab(colour, blindness) for name, colour in figures.COLOURS.items()}
    apart = {(a, b): float(np.linalg.norm(seen[a] - seen[b])) for a, b in itertools.combinations(seen, 2)}
    # Ten is several times what can just be noticed, enough for two areas that touch.
    assert min(apart.values()) > 10, min(apart, key=lambda pair: apart[pair])


def test_numbers_on_bars_have_contrast() -> None:
    assert figures.readable_on("#0072B2") == "white"
    assert figures.readable_on("#F0E442") == figures.readable_on("0.85") == "black"
    assert figures.readable_on("0.25") == "white"


@pytest.mark.parametrize(
    ("tokens", "said"), [(0, "0"), (512, "512"), (643_000, "643K"), (1.5e6, "1.5M"), (2.8e12, "2.8T")]
)
def test_tokens_are_counted_as_configs_write_them(tokens: float, said: str) -> None:
    assert figures.count(tokens) == said


def test_a_table_shows_what_is_missing_as_a_dash(run: RecordedRun) -> None:
    frame = runs.web_shares(run)
    frame.loc["finish", "web %, seen"] = float("nan")
    html = figures.table(frame, "shares").to_html()
    assert "3,072" in html and "90.6" in html and "–" in html
    assert figures.table(frame, "shares").to_html() == html


def test_each_panel_shows_its_own_curve(recorded: RecordedRun) -> None:
    for draw, tags in (
        (figures.training_loss, ("loss/train",)),
        (figures.optimization, ("optimizer/learning_rate", "optimizer/gradient_norm")),
        (figures.throughput, ("throughput/tokens_per_second", "throughput/mfu")),
    ):
        for ax, tag in zip(draw(recorded).axes, tags, strict=True):
            values = recorded.curve(tag)
            assert np.array_equal(ax.lines[0].get_xydata(), np.column_stack([values.index, values])), tag
    levels = [
        {line.get_ydata()[0] for line in ax.lines[1:]}  # type: ignore[index]
        for ax in figures.optimization(recorded).axes
    ]
    assert 0.75 not in levels[0] and 0.75 in levels[1]


def test_the_mix_fills_the_interval_in_which_it_was_trained_on(recorded: RecordedRun) -> None:
    (ax,) = figures.mix_over_tokens(recorded).axes
    (area,) = ax.collections[0].get_paths()
    for step, share in enumerate([0.9, 0.9, 0.6, 0.6, 0.2, 0.1]):
        middle = 100 * step + 50
        assert area.contains_point((middle, share - 1e-6)) and not area.contains_point((middle, share + 1e-6)), step


def test_each_bar_has_its_name(recorded: RecordedRun) -> None:
    (ax,) = figures.stage_mixes(recorded).axes
    names = dict(zip(ax.get_yticks().tolist(), [text.get_text() for text in ax.get_yticklabels()], strict=True))
    drawn: dict[str, list[float]] = {}
    for bar in ax.patches:
        if width := bar.get_width():  # type: ignore[attr-defined]
            middle = bar.get_y() + bar.get_height() / 2  # type: ignore[attr-defined]
            ends = drawn.setdefault(names[min(names, key=lambda y: abs(y - middle))], [])
            assert bar.get_x() == pytest.approx(ends[-1] if ends else 0)  # type: ignore[attr-defined]
            ends.append((ends[-1] if ends else 0) + width)
    assert drawn == {
        "one, planned": pytest.approx([0.75, 1.0]),
        "one, seen": pytest.approx([0.75, 1.0]),
        "two, planned": pytest.approx([0.2, 1.0]),
        "two, seen": pytest.approx([0.15, 1.0]),
    }
    marks = [line.get_xdata()[0] for line in ax.lines if len(line.get_xdata())]  # type: ignore[arg-type,index]
    assert marks == [0.906, 0.817]


def test_the_ink_on_a_colour_has_the_higher_contrast() -> None:
    """WCAG 2.1: (L1 + 0.05) / (L2 + 0.05), where L is the relative luminance."""
    inks = set()
    for colour in (*figures.COLOURS.values(), "#FF0000", "#0000FF", "#00FF00", "0.45", "0.5"):
        rgb = np.array(to_rgb(colour))
        linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        luminance = float(linear @ [0.2126, 0.7152, 0.0722])
        contrast = {"white": 1.05 / (luminance + 0.05), "black": (luminance + 0.05) / 0.05}
        assert figures.readable_on(colour) == max(contrast, key=contrast.__getitem__), colour
        inks.add(figures.readable_on(colour))
    assert inks == {"white", "black"}


def test_a_table_shows_a_rank_as_a_whole_number_beside_a_rate() -> None:
    index = pd.MultiIndex.from_tuples([("rank", 64.0), ("peak", 0.001)], names=["setting", "value"])
    shown = figures.table(pd.DataFrame({"accuracy": [0.5, 0.25]}, index=index), "name", digits=2).to_html()
    assert ">64<" in shown and ">0.001<" in shown and "64.0" not in shown and ">0.25<" in shown
