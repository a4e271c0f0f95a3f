"""Of the working directory only the modules are imported that a configuration names."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_danube.outside.modules import leave_working_directory, let_in

ROOT = Path(__file__).resolve().parents[2]


def test_a_file_beside_the_data_is_not_run(tmp_path: Path) -> None:
    """Neither in place of an installed package nor in place of one that is missing."""
    for name in ("yaml", "argparse", "difflib", "wandb"):
        (tmp_path / f"{name}.py").write_text("open('was_run', 'w')\n")
    (tmp_path / "run.yaml").write_text("nonsense: 1\n")
    command = [sys.executable, "-m", "lightning_danube", "fit", "--config", "run.yaml"]
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True)
    assert done.returncode == 2 and b"nonsense" in done.stderr  # read by the installed package
    assert not (tmp_path / "was_run").exists()


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), "/somewhere"])
    return str(tmp_path)


def test_the_working_directory_leaves_the_path(elsewhere: str) -> None:
    leave_working_directory()
    assert sys.path == ["/somewhere"]
    leave_working_directory()
    assert sys.path == ["/somewhere"]


def test_a_clone_in_which_the_program_runs_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", [str(ROOT), "/somewhere"])
    leave_working_directory()
    assert sys.path == [str(ROOT), "/somewhere"]


@pytest.mark.parametrize("text", ["mine.Task", "{class_path: mine.Task, init_args: {x: 1}}", "package.module.Task"])
def test_a_named_module_is_let_in_behind_all_others(elsewhere: str, text: str) -> None:
    leave_working_directory()
    Path("mine.py").touch()
    Path("package").mkdir()
    let_in(text)
    let_in(text)
    assert sys.path == ["/somewhere", elsewhere]


@pytest.mark.parametrize("text", ["other.Task", "data/mine.jsonl", "/x/mine.py", "mine", "0.5", "Xmine.Task"])
def test_nothing_else_is_let_in(elsewhere: str, text: str) -> None:
    leave_working_directory()
    Path("mine.py").touch()
    let_in(text)
    assert sys.path == ["/somewhere"]
