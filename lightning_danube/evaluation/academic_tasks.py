"""The paper's academic benchmarks, and their questions in local files with the hub's layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_danube.terminal import nearest_name
from lightning_danube.text.reading import BadRow, format_of, read_rows


@dataclass(frozen=True)
class AcademicTask:
    """A task of the lm-evaluation-harness with the paper's setting.

    Args:
        name: the harness's name of the task, or of a group of tasks whose documents are pooled.
        title: the task's name in the paper.
        folder: the task's folder in the harness, under lm_eval/tasks.
        shots: examples before each question.
        metric, filter: the score that is compared with the paper's score. Accuracy is normalised by the answer's length
            (acc_norm) for ARC-c and HellaSwag, as on the Open LLM Leaderboard of that time. For tasks that are not on
            the leaderboard, the paper does not name the metric.
        chance: the score of guessing, if all questions have equally many choices.
    """

    name: str
    title: str
    folder: str
    shots: int
    metric: str = "acc"
    filter: str = "none"
    chance: float | None = None

    @property
    def setting(self) -> str:
        named = {"exact_match": "exact match", "f1": "F1"}
        return f"{self.shots}-shot {'mc2' if self.name.endswith('_mc2') else named.get(self.metric, self.metric)}"


PAPER_TASKS = (
    AcademicTask("arc_challenge", "ARC-c", "arc", 25, "acc_norm", chance=0.25),
    AcademicTask("hellaswag", "HellaSwag", "hellaswag", 10, "acc_norm", chance=0.25),
    AcademicTask("mmlu", "MMLU", "mmlu/default", 5, chance=0.25),
    AcademicTask("truthfulqa_mc2", "TruthfulQA", "truthfulqa", 0),
    AcademicTask("winogrande", "Winogrande", "winogrande", 5, chance=0.5),
    AcademicTask("gsm8k", "GSM8K", "gsm8k", 5, "exact_match", "strict-match"),
    AcademicTask("arc_easy", "ARC-e", "arc", 25, chance=0.25),
    AcademicTask("bbh_cot_fewshot", "BBH", "bbh/cot_fewshot", 3, "exact_match", "get-answer"),
    AcademicTask("commonsense_qa", "CommonsenseQA", "commonsense_qa", 3, chance=0.2),
    AcademicTask("coqa", "CoQA", "coqa", 0, "f1"),
    AcademicTask("piqa", "PIQA", "piqa", 3, chance=0.5),
    AcademicTask("sciq", "SciQ", "sciq", 3, chance=0.25),
)
"""In the paper's order. PIQA is about physical interaction; some summaries call it PhysicsQA."""


def academic_tasks(names: Sequence[str]) -> list[AcademicTask]:
    """Returns the tasks of these names.

    Raises:
        ValueError: a name is unknown (the message suggests the nearest name) or given twice.
    """
    known = {task.name: task for task in PAPER_TASKS}
    for name in names:
        if name not in known:
            by_title = {task.title.lower(): task.name for task in PAPER_TASKS}
            close = by_title.get(name.lower()) or nearest_name(name.lower(), known)
            hint = f"did you mean {close}? " if close else ""
            raise ValueError(f"data.tasks names {name!r}: {hint}there are {', '.join(known)}")
    if twice := [name for name in names if list(names).count(name) > 1]:
        raise ValueError(f"data.tasks names {twice[0]} twice")
    return [known[name] for name in names]


def split_files(directory: Path, dataset: str, name: str | None, split: str) -> list[Path]:
    """Returns the files of a split, plain or compressed; an empty list if there are none.

    They are `<directory>/<dataset>/<name>/<split>.jsonl` or `…/<split>-00000-of-00001.parquet`, as in a copy of the
    hub's repository. There, the files of a data set without a name are in `data`.
    """
    places = [directory / dataset / name] if name else [directory / dataset, directory / dataset / "data"]
    for folder in places:
        found = [file for pattern in (f"{split}.*", f"{split}-*") for file in sorted(folder.glob(pattern))]
        if files := [file for file in found if format_of(file.name) in ("jsonl", "parquet", "csv")]:
            return files
    return []


def read_split(files: Sequence[Path]) -> list[dict[str, Any]]:
    """Returns all rows of a split.

    Raises:
        ValueError: a row cannot be read, or its columns differ from the first row's; the message names file and row.
    """
    rows: list[dict[str, Any]] = []
    for file in files:
        for number, values in read_rows(str(file)):
            if isinstance(values, BadRow):
                raise ValueError(values.message)
            if not isinstance(values, Mapping):
                raise ValueError(f"{file}, row {number}: expected an object, found {type(values).__name__}")
            if rows and values.keys() != rows[0].keys():
                odd = sorted(set(values) ^ set(rows[0]))
                where = "is missing, which the first row has" if odd[0] in rows[0] else "is not in the first row"
                raise ValueError(f"{file}, row {number}: the column {odd[0]!r} {where}")
            rows.append(dict(values))
    if not rows:
        raise ValueError(f"{', '.join(map(str, files))}: there are no rows")
    return rows
