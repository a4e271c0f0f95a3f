"""Every notebook runs from top to bottom on a real run, and defines no logic of its own."""

import ast
import re
import shutil
from pathlib import Path
from typing import Any

import nbformat
import pytest

from lightning_danube.__main__ import main

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
notebooks = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)

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
        parameters.source, replaced = re.subn(rf'(?m)^{variable} = ".*?"', f"{variable} = {value!r}", parameters.source)
        assert replaced == 1, f"{path.name}: the first code cell sets no {variable}"
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
    assert outputs(notebook, "error") == [] and outputs(notebook, "stream") == []
    shown = {kind for output in outputs(notebook, "execute_result") for kind in output.data}
    assert "text/html" in shown and ("image/png" in shown or path.stem == "paper_tables")
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
        "data.class_path": "lightning_danube.data.TextWindows",
        "data.init_args.text.path": str(directory / "text.txt"),
        "data.init_args.tokenizer": str(tiny_run),
        "data.init_args.context_lengths": "[32]",
        "data.init_args.cache_dir": str(directory),
        "model.class_path": "lightning_danube.tasks.QuantizationEvaluation",
        "model.init_args.weights": str(tiny_run),
        "model.init_args.levels": "[hqq:4/32, rounding:2/32, bitsandbytes:int8]",
        "trainer.accelerator": "cpu",
        "trainer.enable_progress_bar": "false",
        "trainer.callbacks": "[{class_path: callbacks.QuantizationSummary}]",
    }
    assert main(["test", *(f"--{key}={value}" for key, value in options.items())]) == 0
    return directory / "runs" / "tiny-test" / "version_0"


@pytest.fixture
def finished(path: Path, request: pytest.FixtureRequest) -> tuple[Path, str]:
    """Directory and name of what a notebook reads; those of studies take the results that come with the repository."""
    if path.stem not in ("pretraining_run", "quantization"):
        return request.getfixturevalue("tmp_path"), path.stem
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
@pytest.mark.parametrize(
    ("notebook", "message"),
    [
        ("pretraining_run", r"no run under .*quickstart: `make quickstart` makes one"),
        ("quantization", r"no evaluation under .*quickstart.yaml` makes one"),
        (
            "scaling",
            r"no result of the study quickstart: `python -m lightning_danube study .*quickstart.yaml` makes one",
        ),
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
