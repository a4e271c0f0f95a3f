"""Every notebook runs from top to bottom on a real run or on made-up studies, and defines no logic of its own."""

import ast
import itertools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pandas as pd
import pytest

from lightning_danube.__main__ import main
from lightning_danube.yaml_files import read_config

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
notebooks = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)

# What each notebook of studies reads.
STUDIES = {
    "attention": ("attention", "attention-shape"),
    "curriculum": ("curriculum", "curriculum-paper", "world"),
    "lora": ("lora", "lora-grid"),
    "scaling": ("scaling",),
}
LOGIC = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda, ast.For, ast.While, ast.If, ast.Try)


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def execute(path: Path, runs: Path, name: str) -> Any:
    """Executes a notebook on the runs under `<runs>/<name>`, in its own folder as Jupyter does."""
    from nbclient import NotebookClient  # only the slow tests' environment has it

    notebook = read(path)
    parameters = code_cells(notebook)[0]
    for variable, value in (("RUNS", str(runs)), ("NAME", name)):
        parameters.source = re.sub(rf'(?m)^{variable} = ".*?"', f"{variable} = {value!r}", parameters.source)
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(FOLDER)}}).execute()
    return notebook


def outputs(notebook: Any, kind: str) -> list[Any]:
    return [output for cell in code_cells(notebook) for output in cell.outputs if output.output_type == kind]


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS, f"no notebook in {FOLDER}: the tests of this file check nothing"


@notebooks
def test_cells_only_call(path: Path) -> None:
    for cell in code_cells(read(path)):
        tree = ast.parse(re.sub(r"(?m)^%.*$", "", cell.source))
        logic = [node for node in ast.walk(tree) if isinstance(node, LOGIC)]
        assert not logic, f"{path.name} defines logic, which belongs into lightning_danube/reports: {cell.source}"


@notebooks
def test_the_committed_notebook_shows_a_whole_run(path: Path) -> None:
    notebook = read(path)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    # A study that was not run yet is named in place of its figures.
    missing = [error.ename for error in outputs(notebook, "error")]
    assert set(missing) <= ({"MissingResult"} if path.stem in STUDIES else set())
    assert outputs(notebook, "stream") == []
    shown = {kind for output in outputs(notebook, "execute_result") for kind in output.data}
    assert missing or ("text/html" in shown and "image/png" in shown)
    assert path.stat().st_size < 500_000
    # Paths of the machine that executed it are nobody's business.
    assert not re.search(r"/(home|work|root|tmp)/", path.read_text("utf-8"))


@pytest.fixture(scope="session")
def tiny_levels(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a finished evaluation of the tiny run."""
    directory = tmp_path_factory.mktemp("tiny_levels")
    (directory / "text.txt").write_text(" ".join(f"the river {number} walks slowly" for number in range(300)))
    options = {
        "name": "tiny",
        "runs": str(directory / "runs"),
        "data.class_path": "lightning_danube.quantization.TextWindows",
        "data.init_args.text.path": str(directory / "text.txt"),
        "data.init_args.tokenizer": str(tiny_run),
        "data.init_args.context_lengths": "[32]",
        "data.init_args.cache_dir": str(directory),
        "model.class_path": "lightning_danube.quantization.QuantizationEvaluation",
        "model.init_args.weights": str(tiny_run),
        "model.init_args.levels": "[hqq:4/32, rounding:2/32, bitsandbytes:int8]",
        "trainer.accelerator": "cpu",
        "trainer.enable_progress_bar": "false",
        "trainer.callbacks": "[{class_path: lightning_danube.callbacks.QuantizationSummary}]",
    }
    assert main(["test", *(f"--{key}={value}" for key, value in options.items())]) == 0
    return directory / "runs" / "tiny-test" / "version_0"


def made_rows(study: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows as a study writes them, with made-up numbers."""
    draw = np.random.default_rng(0)
    origin = {"study": study["name"], "error": None, "command": "python -m x", "commit": "abcdef1", "machine": "one"}
    metrics = [study["metric"], *study.get("also", [])]
    rows = []
    if study.get("search"):
        values = [value if isinstance(value, list) else [1, 8, 64] for value in study["search"].values()]
        for trial, one in enumerate(itertools.islice(itertools.product(*values), study.get("trials"))):
            for seed in study["seeds"]:
                found = {metric: float(draw.normal(0.5, 0.1)) for metric in metrics}
                rows.append({"trial": trial, "seed": seed, **found, **dict(zip(study["search"], one, strict=True))})
        return [{**row, **origin} for row in rows]
    for place, variant in enumerate(study["variants"]):
        for seed in study["seeds"]:
            noise = {metric: float(draw.normal(0, 0.01)) for metric in metrics}
            if study.get("law"):
                width, tokens = map(int, variant.split("-"))
                size, tokens = 50 * width**2, 1000 * tokens
                facts = {"parameters_without_embedding": size, "tokens": tokens}
                loss = 1.5 + 30 * size**-0.3 + 300 * tokens**-0.3
                rows.append({"variant": variant, "seed": seed, study["metric"]: loss + seed / 1000, **facts})
            else:
                found = {metric: 5 + seed - 0.02 * place + noise[metric] for metric in metrics}
                rows.append({"variant": variant, "seed": seed, **found})
    return [{**row, "state": "complete", **origin} for row in rows]


@pytest.fixture(scope="session")
def made_studies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of runs with a result of each study that a notebook reads."""
    runs = tmp_path_factory.mktemp("made_studies")
    for name in itertools.chain(*STUDIES.values()):
        directory = runs / "studies" / name
        directory.mkdir(parents=True)
        rows = made_rows(read_config(f"studies/{name}"))
        pd.DataFrame(rows).to_parquet(directory / "study.parquet")
        importances = {"model.init_args.lora.rank": 0.6, "model.init_args.learning_rate.peak": 0.4}
        (directory / "summary.json").write_text(json.dumps({"name": name, "importances": importances}))
    return runs


@pytest.fixture
def finished(path: Path, request: pytest.FixtureRequest) -> tuple[Path, str]:
    """Directory and name of what a notebook reads."""
    if path.stem in STUDIES:
        return request.getfixturevalue("made_studies"), path.stem
    run: Path = request.getfixturevalue("tiny_levels" if path.stem == "quantization" else "tiny_run")
    return run.parent.parent, run.parent.name.removesuffix("-test")


@pytest.mark.slow
@notebooks
def test_it_runs_on_a_finished_run(path: Path, finished: tuple[Path, str]) -> None:
    executed = execute(path, *finished)
    assert outputs(executed, "error") == [] and outputs(executed, "stream") == []
    committed = [len(cell.outputs) for cell in code_cells(read(path))]
    assert [len(cell.outputs) for cell in code_cells(executed)] == committed


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDIES)
def test_without_results_only_that_is_said(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    # Read by the kernel's Python as it starts: there are no results that come with the repository.
    (tmp_path / "sitecustomize.py").write_text(
        "from pathlib import Path\nfrom lightning_danube.reports import runs\nruns.RESULTS = Path('nowhere')\n"
    )
    errors = outputs(execute(FOLDER / f"{name}.ipynb", tmp_path, name), "error")
    assert errors and all(len(error.traceback) == 1 for error in errors)
    # A study can be run again. A measurement comes with the clone.
    ways = re.compile(r"there is no result of the study [\w-]+: `|start in a clone of the repository")
    assert [error.traceback[0] for error in errors if not ways.search(error.traceback[0])] == []


@pytest.mark.slow
def test_a_study_that_was_not_run_is_named_and_the_others_are_shown(made_studies: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    shutil.copytree(made_studies, runs)
    rows = pd.read_parquet(runs / "studies" / "world" / "study.parquet").assign(state="running")
    rows.to_parquet(runs / "studies" / "world" / "study.parquet")
    executed = execute(FOLDER / "curriculum.ipynb", runs, "curriculum")
    errors = outputs(executed, "error")
    assert errors and all(len(error.traceback) == 1 for error in errors)
    assert all("no run of world came to its end: `python -m" in error.traceback[0] for error in errors)
    shown = [output for output in outputs(executed, "execute_result") if "image/png" in output.data]
    assert len(shown) == 5


@pytest.mark.slow
def test_notebooks_are_executed_in_place_or_stay_as_they_were(tmp_path: Path) -> None:
    from nbformat.v4 import new_code_cell, new_notebook

    for name, source in (("good", "1 + 1"), ("bad", "raise ValueError('no run')")):
        nbformat.write(new_notebook(cells=[new_code_cell(source)]), tmp_path / f"{name}.ipynb")
    before = (tmp_path / "bad.ipynb").read_bytes()
    command = [sys.executable, str(FOLDER / "execute.py"), str(tmp_path / "bad.ipynb"), str(tmp_path / "good.ipynb")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "good.ipynb: executed" in done.stdout
    assert "bad.ipynb: stays as it was: ValueError: no run" in done.stderr
    assert (tmp_path / "bad.ipynb").read_bytes() == before
    (cell,) = read(tmp_path / "good.ipynb").cells
    assert cell.outputs[0].data["text/plain"] == "2" and "execution" not in cell.metadata


@pytest.mark.slow
@pytest.mark.parametrize(
    ("notebook", "message"),
    [
        ("pretraining_run", r"no run under .*/quickstart: `\S+ -m \S+ fit --config quickstart --runs \S+` makes one"),
        ("quantization", r"/quickstart-test: `\S+ -m \S+ test --config quantization/quickstart` makes one"),
    ],
)
def test_without_a_run_it_stops_with_one_line_that_says_how_to_get_one(
    notebook: str, message: str, tmp_path: Path
) -> None:
    from nbclient.exceptions import CellExecutionError

    with pytest.raises(CellExecutionError, match=message):
        execute(FOLDER / f"{notebook}.ipynb", tmp_path, "quickstart")


@pytest.mark.slow
def test_what_a_run_lacks_is_said_in_one_line_and_the_rest_is_shown(tiny_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "tiny" / "version_0"
    shutil.copytree(tiny_run, run, ignore=shutil.ignore_patterns("checkpoints", "summary.json"))
    executed = execute(FOLDER / "pretraining_run.ipynb", tmp_path, "tiny")
    errors = outputs(executed, "error")
    assert errors and all(error.ename == "MissingResult" for error in errors)
    assert all(len(error.traceback) == 1 and "no summary.json" in error.traceback[0] for error in errors)
    assert outputs(executed, "execute_result")
