"""Finds the benchmark questions that occur in a run's training texts."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lightning_danube.files import default_cache_dir, read_json
from lightning_danube.text.corpora import Source, is_streamed, read_documents
from lightning_danube.text.quality import Benchmarks
from lightning_danube.tokens.finished_shards import is_finished
from lightning_danube.yaml_files import load_yaml


class TrainingTexts(NamedTuple):
    """A run's texts according to its own files: the sources it read tokens from, and its cache of embedded texts."""

    sources: dict[str, Source]
    cache_dir: Path


def training_texts(run: Path) -> TrainingTexts | None:
    """Reads the texts of a pre-training run from its directory. None for other runs, or if its files do not say."""
    try:
        config = load_yaml((run / "config.yaml").read_text(encoding="utf-8"))
        data = config["data"]["init_args"]
        if not str(config["data"]["class_path"]).endswith("CurriculumData"):
            return None
        sources = {name: Source(**options) for name, options in data["sources"].items()}
        stages = read_json(run / "summary.json")["stages"]
        seen = {name for stage in stages for name, tokens in stage["tokens_by_source"].items() if tokens}
    except (OSError, KeyError, TypeError, ValueError):
        return None
    cache = data.get("cache_dir")
    kept = {name: source for name, source in sources.items() if name in seen}
    return TrainingTexts(kept, Path(cache).expanduser() if cache else default_cache_dir())


class Overlap(NamedTuple):
    """The row numbers found in the texts, the number of rows searched for, and the sources that were not searched."""

    found: set[int]
    looked_for: int
    not_read: list[str]


def overlap(rows: Sequence[Mapping[str, Any]], texts: TrainingTexts) -> Overlap:
    """Finds the rows that share 13 consecutive words (or all words of a shorter text) with a training text.

    Searches each source completely, although the run may have read only a part of it.
    """
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        try:
            benchmark = Benchmarks.read([str(file)])
        except ValueError:
            return Overlap(set(), 0, [])  # all texts are too short: a match would prove nothing
    looked_for = len(rows) - benchmark.files[0].rows_too_short
    found: set[int] = set()
    not_read = []
    for name, source in texts.sources.items():
        if is_streamed(source) or source.has_tokens or is_finished(source.path):
            not_read.append(name)
            continue
        for document in read_documents(name, source, texts.cache_dir):
            found.update(benchmark.found_in(document.text))
    return Overlap(found, looked_for, not_read)
