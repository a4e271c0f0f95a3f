"""Makers of the tables of results in the pages. Each reads files under benchmarks/results and returns Markdown."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet

from docs.making.typed import records

ROOT = Path(__file__).resolve().parents[2]
MAKERS = (
    "table",
    "joined",
    "windows",
    "outputs",
    "last_outputs",
    "stage_losses",
    "run_facts",
    "machine",
    "typed",
    "typed_on",
    "training",
    "generation",
    "compiled_generation",
    "gpu_training",
    "gpu_decoding",
    "gpu_attention",
    "gguf_sizes",
    "levels",
    "academic",
    "paper_shapes",
    "paper_stages",
    "paper_perplexity",
    "study",
    "trained_longer",
    "rank_and_rate",
    "ladder",
)
Rows = list[list[str]]


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def text_of(file: str) -> str:
    return (ROOT / file).read_text(encoding="utf-8")


def rows_of(file: str) -> list[dict[str, Any]]:
    """Returns the rows of a Parquet file."""
    rows: list[dict[str, Any]] = pyarrow.parquet.read_table(ROOT / file).to_pylist()
    return rows


def tables_of(file: str) -> list[Rows]:
    """Returns the Markdown tables of a file, each with its header and without the line below it."""
    found = []
    for block in re.findall(r"(?:^\|.*\|\n?)+", text_of(file), re.MULTILINE):
        rows = [[cell.strip() for cell in line.strip()[1:-1].split("|")] for line in block.strip().splitlines()]
        found.append([rows[0], *rows[2:]])
    return found


def columns(table: Rows, *names: str) -> Rows:
    """Returns some columns of a table, with its header.

    Raises:
        ValueError: the table has no such column.
    """
    places = [table[0].index(name) for name in names]
    return [[row[place] for place in places] for row in table]


def table(file: str) -> str:
    """Returns a table as it stands in a file."""
    name, _, number = file.partition("#")
    header, *rows = tables_of(name)[int(number or 1) - 1]
    return markdown(header, rows)


def joined(*files: str) -> str:
    """Returns tables with the same header as one table."""
    tables = [tables_of(file.partition("#")[0])[int(file.partition("#")[2] or 1) - 1] for file in files]
    assert all(one[0] == tables[0][0] for one in tables), "the headers differ"
    return markdown(tables[0][0], [row for one in tables for row in one[1:]])


def windows(file: str) -> str:
    """Returns what context windows cost, with the names that the page uses."""
    found = columns(tables_of(file)[0], "window", "tokens measured", "reread", "rolling", "whole")
    return markdown(["window", "tokens measured", "reread (`--window`)", "ring buffer", "all remembered"], found[1:])


# --- the quickstart ---------------------------------------------------------------------------------------------------


def outputs(file: str) -> str:
    """Returns a printed output as a block."""
    return f"```\n{text_of(file).strip()}\n```"


def last_outputs(file: str) -> str:
    """Returns what a pre-training run prints at its end, from the table of held-out losses on."""
    text = text_of(file)
    return f"```\n{text[text.index('held-out loss, nats') :].strip()}\n```"


def stage_losses(summary: str) -> str:
    """Returns held-out losses after the last stage, and bits/byte with their mean."""
    facts = json.loads(text_of(summary))
    sources = list(facts["val_loss"])
    bits = facts["val_bits_per_byte"]
    mean = sum(bits.values()) / len(bits)
    return markdown(
        ["", *sources, "mean"],
        [
            ["held-out loss, nats/token", *(f"{facts['val_loss'][name]:.3f}" for name in sources), ""],
            ["bits/byte (`val_bits_per_byte`)", *(f"{bits[name]:.3f}" for name in sources), f"{mean:.3f}"],
        ],
    )


def run_facts(summary: str) -> str:
    """Returns precision, steps, time, speed and mean bits/byte of a pre-training run."""
    facts = json.loads(text_of(summary))
    bits = facts["val_bits_per_byte"]
    minutes, seconds = divmod(round(facts["seconds"]), 60)
    cells = [
        facts["precision"],
        f"{facts['parameters']:,}",
        f"{facts['tokens']:,}",
        f"{facts['steps']:,}",
        f"{minutes} min {seconds:02d} s",
        f"{facts['tokens_per_second']:,.0f}",
        f"{sum(bits.values()) / len(bits):.3f}",
    ]
    return markdown(["precision", "parameters", "tokens", "steps", "time", "tokens/s", "mean bits/byte"], [cells])


def machine(file: str) -> str:
    """Returns where a result was measured, as a sentence."""
    return f"(Recorded: {text_of(file).strip()}.)"


# --- what the commands of a page printed ------------------------------------------------------------------------------

LONGEST_LINE = 150


def typed(block: str, begin: str = "", end: str = "") -> str:
    """Returns what a block of commands printed. docs/making/typed.py keeps it.

    Args:
        block: file and number, such as "benchmarks/results/typed/sft.txt#2".
        begin: what the first line that is shown begins with; `_` stands for a space. Default: the first line.
        end: what the last line that is shown begins with. Default: the last line.
    """
    name, _, number = block.partition("#")
    lines = records(ROOT / name)[int(number)].printed.splitlines()

    def place(beginning: str, after: int) -> int:
        wanted = beginning.replace("_", " ")
        found = [at for at, line in enumerate(lines) if at >= after and line.strip().startswith(wanted)]
        if not found:
            raise ValueError(f"{block}: no line begins with {wanted!r}")
        return found[0]

    first = place(begin, 0) if begin else 0
    last = place(end, first) if end else len(lines) - 1
    shown = [line if len(line) <= LONGEST_LINE else f"{line[:LONGEST_LINE].rstrip()} …" for line in lines]
    shown = [*["…"] * (first > 0), *shown[first : last + 1], *["…"] * (last < len(lines) - 1)]
    return "```text\n" + "\n".join(shown) + "\n```"


def typed_on(file: str) -> str:
    """Returns on which day, commit and machine the commands of a page were typed, as a sentence."""
    where = sorted({record.where for record in records(ROOT / file).values()})
    return f"(Recorded: {'; '.join(where)}.)"


# --- speed ------------------------------------------------------------------------------------------------------------


def training(wide: str, narrow: str) -> str:
    """Returns training speed beside others: with AVX-512 in two precisions, and with AVX2.

    Args:
        wide, narrow: results of `benchmarks/training.py` with AVX-512 and with AVX2.
    """
    chosen = ("tokens/CPU s", "danube ×", "of the ceiling", "peak MiB")
    parts = [columns(found, "", *chosen) for found in (*tables_of(wide), *tables_of(narrow))]
    header = ["tokens/CPU s, danube ×, share of the ceiling, peak MiB"]
    for title in ("AVX-512, bf16-mixed", "AVX-512, float32", "AVX2, float32"):
        header += [title, "", "", ""]
    called = {
        "transformers": "transformers' Trainer, with our allocator settings",
        "transformers as installed": "transformers' Trainer as installed",
    }
    rows = []
    for lines in zip(*(part[1:] for part in parts), strict=True):
        assert len({line[0] for line in lines}) == 1, "the contestants stand in another order"
        rows.append([called.get(lines[0][0], lines[0][0]), *(cell for line in lines for cell in line[1:])])
    return markdown(header, rows)


CONTESTANTS = {"danube": "`generate`", "danube compiled": "`generate --compile`", "unpacked": "without packing"}
SPEEDS = ("prefill, tokens/s", "× transformers", "decode, tokens/s", "× transformers")


def _speeds(row: Sequence[str]) -> list[str]:
    """Returns prefill and decoding speed, each with its factor, of a row of `benchmarks/generation.py`."""
    prefill, decode = (float(cell.split()[0].replace(",", "")) for cell in (row[3], row[5]))
    factors = ["1" if row[2] == "transformers" else row[place] for place in (4, 6)]
    return [f"{int(prefill + 0.5):,}", factors[0], f"{decode:.1f}", factors[1]]


def _generation_rows(files: Sequence[str]) -> Rows:
    rows, last = [], ""
    for lines in zip(*(tables_of(file)[0][1:] for file in files), strict=True):
        weights, prompt, contestant = lines[0][:3]
        assert all(line[:3] == lines[0][:3] for line in lines), "the contestants stand in another order"
        group = [weights, prompt] if f"{weights} {prompt}" != last else ["", ""]
        last = f"{weights} {prompt}"
        called = CONTESTANTS.get(contestant, contestant)
        rows.append([*group, called, *(cell for line in lines for cell in _speeds(line))])
    return rows


def generation(wide: str, narrow: str) -> str:
    """Returns speed of generation with AVX-512 and with AVX2, in tokens/s."""
    header = ["weights", "prompt", "", "AVX-512: prefill", "×", "decode", "×", "AVX2: prefill", "×", "decode", "×"]
    return markdown(header, _generation_rows([wide, narrow]))


def compiled_generation(file: str) -> str:
    """Returns speed of generation, with compiled steps among the contestants, in tokens/s."""
    header = ["weights", "prompt", "", "prefill", "× transformers", "decode", "× transformers"]
    return markdown(header, _generation_rows([file]))


def gpu_training(file: str) -> str:
    """Returns pre-training of the 500M on one GPU beside others, from a result of `benchmarks/gpu_parts.py`."""
    called = {
        "danube, as configured": "`fit` as configured",
        "danube, compiled, float8": "`fit` with `model.float8`",
        "LitGPT, compiled": "LitGPT, compiled",
    }
    chosen = columns(tables_of(file)[1], "contestant", "steps", "tokens_per_second", "least", "most", "mfu", "peak_gib")
    rows = [
        [called[name], rate, f"{least} to {most}", f"{100 * float(mfu):.1f} %", f"{float(peak):.1f}"]
        for name, _, rate, least, most, mfu, peak in chosen[1:]
    ]
    steps = chosen[1][1]
    header = ["", f"tokens/s, median of {steps} steps", "least to most", "MFU", "peak memory, GiB"]
    return markdown(header, rows)


def gpu_decoding(*files: str) -> str:
    """Returns decoding speed on one GPU: not recorded on an H100 and an H200, recorded and compiled on an H200."""
    kinds = [("not recorded, H100", files[0], "eager"), ("not recorded, H200", files[1], "as written")]
    kinds += [("recorded, H200", files[2], "as written"), ("recorded and compiled, H200", files[2], "compiled")]
    rows = []
    for title, file, kind in kinds:
        found = next(one for one in tables_of(file) if one[0][:2] == ["generation", "run"])
        first, second = ([float(cell) for cell in row[2:5]] for row in found[1:] if row[0] == kind)
        rows.append(
            [
                title,
                f"{first[0]:.0f} and {second[0]:.0f}",
                f"{100 * second[1]:.1f} %",
                f"{first[2]:.0f} and {second[2]:.0f}",
            ]
        )
    header = ["", "tokens/s, first and second run", "share of the memory's speed, second run", "first token, ms"]
    return markdown(header, rows)


def gpu_attention(file: str) -> str:
    """Returns milliseconds and TFLOP/s of the attention kernels on one GPU, the fastest first."""
    found = next(one for one in tables_of(file) if one[0][:2] == ["shape", "kernel"])
    shapes = list(dict.fromkeys(row[0] for row in found[1:]))
    measured = {(row[0], row[1]): row[2:4] for row in found[1:] if row[2] != "–"}
    kernels = sorted({kernel for _, kernel in measured}, key=lambda kernel: float(measured[shapes[0], kernel][0]))
    header = ["attention, forward and backward of one row", *(f"heads {shape} tokens" for shape in shapes)]
    rows = []
    for kernel in kernels:
        cells = [(float(ms), float(rate)) for ms, rate in (measured[shape, kernel] for shape in shapes)]
        rows.append([kernel, *(f"{ms:.2f} ms, {rate:.0f} TFLOP/s" for ms, rate in cells)])
    return markdown(header, rows)


# --- fewer bits -------------------------------------------------------------------------------------------------------


def gguf_sizes(file: str) -> str:
    """Returns planned and published sizes of the paper's models, in GB of 10⁹ bytes."""
    found: dict[str, dict[str, list[str]]] = {}
    for row in rows_of(file):
        published = row["published_gigabytes"]
        cells = [f"{row['gigabytes']:.3f}", "–" if published is None else f"{published:.2f}"]
        found.setdefault(row["type"], {})[row["model"]] = cells
    header = ["", "500M: planned", "published", "4B: planned", "published"]
    return markdown(header, [[kind, *one["danube3-500m"], *one["danube3-4b"]] for kind, one in found.items()])


def _change(row: dict[str, Any], full: float) -> str:
    """Returns the change of perplexity, paired, with its interval. A collapse is a factor."""
    change, low, high = (row[f"perplexity_change{end}"] for end in ("", "_low", "_high"))
    if change is None:
        return ""
    if change > 100:
        return f"× {row['perplexity'] / full:,.0f}"
    noise = " ≈" if row["perplexity_change_is_noise"] else ""
    return f"{100 * change:+.2f} % [{100 * low:+.2f}, {100 * high:+.2f}]{noise}"


def _cloze(row: dict[str, Any]) -> str:
    change = row["cloze_accuracy_change"]
    text = f"{100 * row['cloze_accuracy']:.0f} %"
    if change is None:
        return text
    noise = row["cloze_accuracy_change_low"] <= 0 <= row["cloze_accuracy_change_high"]
    return f"{text} {round(100 * change):+d}{' ≈' if noise else ''}"


def levels(file: str) -> str:
    """Returns what each level of a quantization evaluation keeps and loses."""
    found = [row for row in rows_of(file) if row["not_measured"] is None]
    full = next(row["perplexity"] for row in found if row["level"] == "full")
    header = ["level", "MiB", "bits", "perplexity", "change, paired [95 %]", "KL, nats", "KL, 99 %"]
    header += ["same first", "cloze", "peak MiB"]
    rows = []
    for row in found:
        size = row["perplexity"]
        if row["level"] == "full":
            # It has no change from itself.
            row |= dict.fromkeys(("perplexity_change", "divergence", "divergence_99", "same_first"))
            row["cloze_accuracy_change"] = None
        rows.append(
            [
                row["level"],
                f"{row['tensor_bytes'] / 2**20:.1f}",
                f"{row['bits_per_weight']:.2f}",
                f"{size:.2f}" if size < 10_000 else f"{size:,.0f}",
                _change(row, full),
                "" if row["divergence"] is None else f"{row['divergence']:.1e}",
                "" if row["divergence_99"] is None else f"{row['divergence_99']:.1e}",
                "" if row["same_first"] is None else f"{100 * row['same_first']:.1f} %",
                _cloze(row),
                f"{row['peak_memory_bytes'] / 2**20:.0f}",
            ]
        )
    return markdown(header, rows)


# --- evaluation -------------------------------------------------------------------------------------------------------


def academic(file: str) -> str:
    """Returns academic benchmarks in percent: the paper's columns, and the measured model with 95 % intervals."""
    found = [row for row in rows_of(file) if row["table"] == "academic"]
    ours = [row for row in found if row["measured"]]
    stated = {(row["model"], row["title"]): row["value"] for row in found if not row["measured"]}
    models = list(dict.fromkeys(model for model, _ in stated))
    rows = []
    for row in ours:
        theirs = [f"{100 * stated[model, row['title']]:.2f}" for model in models]
        if row["value"] is None:
            rows.append([row["title"], row["setting"], *theirs, "not run", "–"])
        else:
            score = f"{100 * row['value']:.2f} [{100 * row['low']:.1f}, {100 * row['high']:.1f}]"
            rows.append([row["title"], row["setting"], *theirs, score, f"{row['n']:.0f}"])
    # A benchmark of which fewer questions were asked would weigh as much as the others.
    most = max(row["n"] for row in ours if row["n"] is not None)
    run = [row for row in ours if row["n"] == most]
    averages = [sum(stated[model, row["title"]] for row in run) / len(run) for model in models]
    averages.append(sum(row["value"] for row in run) / len(run))
    rows.append([f"average of the {len(run)} with {most:.0f}", "", *(f"{100 * value:.2f}" for value in averages), ""])
    return markdown(["", "setting", *models, ours[0]["model"], "questions"], rows)


# --- the paper --------------------------------------------------------------------------------------------------------


def _frame(frame: Any, digits: int = 2) -> str:
    """Returns a pandas frame as Markdown. Titles on two levels are joined."""

    def shown(value: Any) -> str:
        if isinstance(value, str):
            return value
        if value is None or value != value:
            return "–"
        return f"{value:,.0f}" if float(value).is_integer() and abs(value) > 100 else f"{value:,.{digits}f}"

    titles = [", ".join(filter(None, title)) if isinstance(title, tuple) else str(title) for title in frame.columns]
    rows = [[str(name), *map(shown, values)] for name, values in zip(frame.index, frame.to_numpy(), strict=True)]
    return markdown([str(frame.index.name or ""), *titles], rows)


def paper_shapes(*_: str) -> str:
    """Returns the paper's Table 1 beside the presets of this project."""
    from lightning_danube.reports import paper

    return _frame(paper.shapes(), digits=0)


def paper_stages(*_: str) -> str:
    """Returns tokens and web shares of the three stages, in the paper and in the configurations."""
    from lightning_danube.reports import paper

    return _frame(paper.stages(), digits=1)


def paper_perplexity(*_: str) -> str:
    """Returns perplexity by llama.cpp's types: the paper's models, and two that were measured here."""
    from lightning_danube.reports import paper

    return _frame(paper.quantized_perplexity())


# --- studies ----------------------------------------------------------------------------------------------------------


def _mean(rows: Sequence[dict[str, Any]], metric: str) -> float:
    values = [row[metric] for row in rows]
    return float(sum(values) / len(values))


def _half(values: Sequence[float]) -> str:
    """Returns a mean with half of Student's 95 % interval."""
    from lightning_danube.intervals import student

    found = student(values)
    assert found.high is not None
    return f"{found.value:.3f} ± {found.high - found.value:.3f}"


def _p(value: float) -> str:
    return f"{value:.5f}" if value < 0.001 else f"{value:.3f}" if value < 0.1 else f"{value:.2f}"


def study(summary: str, runs: str) -> str:
    """Returns the baseline's means and the paired differences of each variant, with 95 % intervals.

    Shares of known facts are in percent, and their differences in points.

    Args:
        summary, runs: the study's `.json` and `.parquet`.
    """
    facts = json.loads(text_of(summary))
    rows = [row for row in rows_of(runs) if row["error"] is None]
    by_variant: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_variant.setdefault(row["variant"], []).append(row)
    baseline, metrics = facts["baseline"], [facts["metric"], *(name for name in facts["also"] if name != "parameters")]
    found = {facts["metric"]: facts["comparisons"], **facts["also"]}
    differences = {name: {one["variant"]: one for one in found[name]} for name in metrics}
    counts = "parameters" in facts["also"]

    def scaled(name: str) -> tuple[float, int]:
        return (100, 1) if name.startswith("recall.") else (1, 3)

    def title(name: str) -> str:
        if name == "val_loss":
            return "mean of sources"
        if name.startswith("recall."):
            return f"{name.removeprefix('recall.')}, %"
        source = name.removeprefix("val_loss.")
        return f"loss of {source} text" if facts["metric"].startswith("recall.") else source

    header = [
        "variant",
        *(["parameters"] if counts else []),
        title(metrics[0]),
        f"against {baseline} (95 %)",
        "p, Holm",
    ]
    lines = []
    for variant, group in by_variant.items():
        times, digits = scaled(metrics[0])
        cells = [variant, *([f"{_mean(group, 'parameters'):,.0f}"] if counts else [])]
        cells.append(f"{times * _mean(group, metrics[0]):.{digits}f}")
        if variant == baseline:
            cells += ["", ""]
        else:
            one = differences[metrics[0]][variant]
            ends = f"{times * one['low']:+.{digits}f} to {times * one['high']:+.{digits}f}"
            cells += [f"{times * one['mean']:+.{digits}f} ({ends})", _p(one["p"])]
        for name in metrics[1:]:
            times, digits = scaled(name)
            if variant == baseline:
                cells.append(f"{times * _mean(group, name):.{digits}f}")
            else:
                one = differences[name][variant]
                half = times * (one["high"] - one["low"]) / 2
                cells.append(f"{times * one['mean']:+.{digits}f} ± {half:.{digits}f}")
        lines.append(cells)
    return markdown([*header, *map(title, metrics[1:])], lines)


def trained_longer(summary: str, runs: str) -> str:
    """Returns divergence by level after short, middle and long training, with paired differences from the short one."""
    facts = json.loads(text_of(summary))
    rows = rows_of(runs)
    groups = {name: [row for row in rows if row["variant"] == name] for name in ("short", "middle", "long")}
    found = {facts["metric"]: facts["comparisons"], **facts["also"]}
    names = {
        "levels.full.perplexity": "full model's perplexity",
        "levels.hqq:2/64+embeddings.divergence": "hqq, 2 bits",
        "levels.hqq:3/64+embeddings.divergence": "hqq, 3 bits",
        "levels.hqq:4/64+embeddings.divergence": "hqq, 4 bits",
        "levels.bitsandbytes:nf4+embeddings.divergence": "bitsandbytes NF4",
        "levels.rounding:2/64+embeddings.divergence": "plain rounding, 2 bits",
        "levels.hqq:2/64+embeddings.perplexity_change": "hqq, 2 bits: perplexity",
    }
    lines = []
    for metric, called in names.items():
        cells = [called]
        for name, group in groups.items():
            mean = _mean(group, metric)
            if metric.endswith("perplexity"):
                cells.append(f"{mean:.0f}")
            elif metric.endswith("change"):
                cells.append(f"{100 * mean:+.1f} %")
            elif name == "short":
                cells.append(f"{mean:.4f}")
            else:
                one = next(one for one in found[metric] if one["variant"] == name)
                cells.append(f"{mean:.4f} ({one['mean']:+.4f}, {one['low']:.4f} to {one['high']:.4f})")
        lines.append(cells)
    return markdown(["", *groups], lines)


def rank_and_rate(runs: str) -> str:
    """Returns accuracy by LoRA's rank and peak learning rate: means over seeds with half their 95 % interval."""
    rows = [row for row in rows_of(runs) if row["error"] is None]
    rank, peak = "model.init_args.lora.rank", "model.init_args.learning_rate.peak"
    peaks = sorted({row[peak] for row in rows})
    lines = []
    for one in sorted({row[rank] for row in rows}):
        values = [[row["validation.accuracy"] for row in rows if (row[rank], row[peak]) == (one, at)] for at in peaks]
        lines.append([str(one), *map(_half, values)])
    return markdown(["rank", *(f"peak {at:g}" for at in peaks)], lines)


def ladder(runs: str) -> str:
    """Returns the held-out web loss by width and training tokens, for widths that have every number of tokens."""
    rows = [row for row in rows_of(runs) if row["error"] is None]
    widths = sorted({int(row["variant"].partition("-")[0]) for row in rows})
    lengths = sorted({int(row["tokens"]) for row in rows})
    lines = []
    for width in widths:
        group = [row for row in rows if row["variant"].startswith(f"{width}-")]
        values = [[row["val_loss.web"] for row in group if row["tokens"] == length] for length in lengths]
        size = f"{group[0]['parameters_without_embedding'] / 1e6:.2f}M"
        lines.append([str(width), size, *map(_half, values)])
    header = ["width", "parameters without embedding", *(f"{length / 1000:,.0f}K tokens" for length in lengths)]
    return markdown(header, lines)
