"""The reference pages name everything that the code has: fields of summaries, exit codes, classes of data and tasks."""

import ast
import json
import re
from pathlib import Path

import pytest

from docs.making.pages import read
from lightning_danube.signals import EXIT_STOPPED
from tests.test_layering import TASKS

ROOT = Path(__file__).resolve().parents[2]
SUMMARIES = {
    "pretraining/summary.py": ["fit_summary", "stage_summaries", "evaluation_summary"],
    "chat/summary.py": ["training_summary", "chat_fit_summary"],
    "chat/preference_summary.py": ["preference_fit_summary", "preference_evaluation_summary"],
    "classification/summary.py": ["classification_fit_summary", "summary"],
    "quantization/summary.py": ["summary"],
    "studies/report.py": ["_origin"],
}
"""File → functions that make the content of `summary.json`."""
# Fields of a class in a list of classes.
INSIDE = {"label"}


def fields(file: str, functions: list[str]) -> set[str]:
    """Returns the keys of the dictionaries that functions write down."""
    tree = ast.parse((ROOT / "lightning_danube" / file).read_text("utf-8"))
    found = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name in functions]
    assert {node.name for node in found} == set(functions)
    dictionaries = [part for node in found for part in ast.walk(node) if isinstance(part, ast.Dict)]
    return {str(key.value) for one in dictionaries for key in one.keys if isinstance(key, ast.Constant)} - INSIDE


@pytest.mark.parametrize(("file", "functions"), SUMMARIES.items())
def test_every_field_of_a_summary_is_explained(file: str, functions: list[str]) -> None:
    found = fields(file, functions)
    assert len(found) > 3
    named = set(re.findall(r"`(\w+)`", read("docs/summary.md")))
    assert sorted(found - named) == [], "docs/summary.md does not explain these fields"


def test_the_fields_of_the_kept_run_are_explained() -> None:
    facts = json.loads((ROOT / "benchmarks/results/quickstart/summary.json").read_text("utf-8"))
    page = read("docs/summary.md")
    assert [name for name in facts if f"`{name}`" not in page] == []


def test_the_exit_codes_are_those_of_the_program() -> None:
    rows = dict(re.findall(r"^\| (\d+) \| (.+) \|$", read("docs/errors.md"), re.MULTILINE))
    assert {"0", "1", "2", "130", "138", "143"} | {str(EXIT_STOPPED)} == set(rows)
    assert "--ckpt_path last" in rows[str(EXIT_STOPPED)]


def test_every_class_of_data_and_task_has_its_options_on_the_page() -> None:
    page = read("docs/options.md")
    shown = set(re.findall(r"^::: ([\w.]+)$", page, re.MULTILINE))
    for room in TASKS:
        tree = ast.parse((ROOT / "lightning_danube" / room / "__init__.py").read_text("utf-8"))
        (exported,) = (
            ast.literal_eval(node.value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__"
        )
        for name in exported:
            known = (
                f"lightning_danube.{room}." if name != "CurriculumData" else "lightning_danube.pretraining.settings."
            )
            assert any(one.startswith(known) for one in shown), f"docs/options.md lacks {name}"
            assert name in page, f"docs/options.md lacks {name}"
