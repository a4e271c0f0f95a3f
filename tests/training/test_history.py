"""What a line of a run's history says of the code. Whole runs: tests/pretraining/test_changed_runs.py."""

import importlib.metadata
import json
import platform
import subprocess
from datetime import datetime
from pathlib import Path

import pytest

from lightning_danube.training import history


def test_a_line_has_the_time_with_its_zone_and_the_versions(tmp_path: Path) -> None:
    before = datetime.now().astimezone().replace(microsecond=0)
    history.append_history(tmp_path / "history.jsonl", step=7, differences={"é": [1, None]})
    (line,) = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text("utf-8").splitlines()]
    time = datetime.fromisoformat(line["time"])
    assert before <= time <= datetime.now().astimezone()
    assert (line["step"], line["differences"]) == (7, {"é": [1, None]})
    assert line["versions"]["python"] == platform.python_version()
    for package in ("torch", "lightning", "transformers"):
        assert line["versions"][package] == importlib.metadata.version(package)


def test_a_commit_says_whether_files_differ_from_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> str:
        name = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        done = subprocess.run(["git", "-C", str(tmp_path), *name, *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    monkeypatch.setattr(history, "__file__", str(tmp_path / "history.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert history.commit() is None
    git("init", "--quiet")
    (tmp_path / "history.py").write_text("first")
    git("add", "history.py")
    git("commit", "--quiet", "--message", "first")
    head = git("rev-parse", "HEAD")
    (tmp_path / "unknown").touch()
    assert history.commit() == head and len(head) == 40
    (tmp_path / "history.py").write_text("second")
    assert history.commit() == f"{head}+changes"
    monkeypatch.setenv("PATH", "")
    assert history.commit() is None
