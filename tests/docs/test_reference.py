"""The reference pages name everything that the code has: fields of summaries, exit codes, classes of data and tasks.
What the pages import or name of the package is there."""

import ast
import json
import pkgutil
import re
from pathlib import Path

import pytest

from docs.making.pages import FENCE, pages, read
from lightning_danube.chat.preference_summary import METRIC_NAMES
from lightning_danube.checkpoints.runs import WRITTEN_AT_EVERY_START
from lightning_danube.classification.scores import METRICS
from lightning_danube.signals import EXIT_STOPPED
from tests.test_layering import TASKS

ROOT = Path(__file__).resolve().parents[2]
SUMMARIES = {
    "Pre-training": ["pretraining/summary.py:fit_summary", "pretraining/summary.py:evaluation_summary"],
    "Fine-tuning for chat": [
        "chat/summary.py:training_summary",
        "chat/summary.py:chat_fit_summary",
        "callbacks/summaries/chat.py:_report_evaluation",
    ],
    "Preference tuning": [
        "chat/summary.py:training_summary",
        "chat/preference_summary.py:preference_fit_summary",
        "chat/preference_summary.py:preference_evaluation_summary",
    ],
    "Classification": [
        "classification/summary.py:classification_fit_summary",
        "callbacks/summaries/classification.py:_report_evaluation",
        "classification/summary.py:summary",
    ],
    "Quantization": ["quantization/summary.py:summary", "quantization/report.py:flat"],
    "Evaluation": ["evaluation/report.py:write"],
    "Studies": [
        "studies/report.py:_origin",
        "studies/report.py:write_report",
        "studies/report.py:_write_law_report",
        "studies/report.py:write_search_report",
    ],
}
"""Section of docs/summary.md → file of the package and function that makes the content of `summary.json`."""
COMPUTED = {
    "Preference tuning": {*METRIC_NAMES.values(), "…_before"},
    "Classification": {*METRICS, "validation", "test"},
}
"""Section → fields whose names are not written in these functions."""
INSIDE = {
    "Pre-training": ["pretraining/summary.py:stage_summaries"],
    "Fine-tuning for chat": ["chat/summary.py:compared"],
    "Evaluation": ["evaluation/results.py:as_row"],
    "Studies": ["studies/comparison.py:as_row"],
}
"""Section → functions that make the entries of a list in `summary.json`."""


def names_of(section: str) -> tuple[set[str], set[str]]:
    """Returns the fields that the tables of a section of docs/summary.md list, and all names in it."""
    (text,) = re.findall(rf"^## {section}\n(.*?)(?=^## |\Z)", read("docs/summary.md"), re.MULTILINE | re.DOTALL)
    cells = re.findall(r"^\| ([^|]*) \|", text, re.MULTILINE)
    name = re.compile(r"`([\w…]+)`")
    return set(name.findall(" ".join(cells))), set(name.findall(text))


def fields(place: str) -> set[str]:
    """Returns the keys of the outermost dictionaries that a function writes down, also of those it unpacks in them."""
    file, name = place.split(":")
    tree = ast.parse((ROOT / "lightning_danube" / file).read_text("utf-8"))
    (function,) = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == name)
    written = [node for node in ast.walk(function) if isinstance(node, ast.Dict)]
    values = [value for node in written for key, value in zip(node.keys, node.values, strict=True) if key is not None]
    nested = {node for value in values for node in ast.walk(value)}
    keys = [key for node in written if node not in nested for key in node.keys]
    found = {str(key.value) for key in keys if isinstance(key, ast.Constant)}
    assert found, f"{place} writes down no dictionary"
    # The page says once that every …_interval is an interval.
    return {key for key in found if not key.endswith("_interval")}


@pytest.mark.parametrize("section", SUMMARIES)
def test_the_page_lists_exactly_the_fields_of_a_summary(section: str) -> None:
    found = {field for place in SUMMARIES[section] for field in fields(place)} | COMPUTED.get(section, set())
    listed, _ = names_of(section)
    assert listed == found


@pytest.mark.parametrize("section", INSIDE)
def test_the_page_names_the_fields_of_the_entries_of_a_list(section: str) -> None:
    found = {field for place in INSIDE[section] for field in fields(place)}
    _, named = names_of(section)
    assert found - named == set()


def test_the_fields_of_the_kept_run_are_explained() -> None:
    facts = json.loads((ROOT / "benchmarks/results/quickstart/summary.json").read_text("utf-8"))
    page = read("docs/summary.md")
    assert [name for name in facts if f"`{name}`" not in page] == []


def test_the_files_of_every_start_are_explained() -> None:
    page = read("docs/run-files.md")
    assert [name for name in WRITTEN_AT_EVERY_START if f"| `{name}` |" not in page] == []


def test_the_exit_codes_are_those_of_the_program() -> None:
    rows = dict(re.findall(r"^\| (\d+) \| (.+) \|$", read("docs/errors.md"), re.MULTILINE))
    assert {"0", "1", "2", "130", "134", "138", "143"} | {str(EXIT_STOPPED)} == set(rows)
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


def names_of_the_package() -> dict[str, str]:
    """Returns dotted name → page: names in the text, and imports of the examples in Python."""
    found: dict[str, str] = {}
    for page in pages():
        text = read(page)
        names = re.findall(r"`(lightning_danube(?:\.\w+)+)`", text)
        for example in (ast.parse(block) for language, block in FENCE.findall(text) if language == "python"):
            imports = [node for node in ast.walk(example) if isinstance(node, ast.ImportFrom)]
            names += [f"{node.module}.{alias.name}" for node in imports for alias in node.names]
        # The changelog tells what was.
        found |= {name: page for name in names if name.startswith("lightning_danube.") and page != "CHANGELOG.md"}
    return found


NAMES = names_of_the_package()


def test_the_pages_name_parts_of_the_package() -> None:
    assert len(NAMES) > 10 and "docs/api.md" in NAMES.values()


@pytest.mark.parametrize("name", NAMES)
def test_a_name_of_the_package_on_a_page_exists(name: str) -> None:
    assert pkgutil.resolve_name(name) is not None, NAMES[name]


def test_a_wrong_name_of_the_package_is_found() -> None:
    with pytest.raises(AttributeError):
        pkgutil.resolve_name("lightning_danube.model.TokenStream")
