import sys
from pathlib import Path

import pytest

from callbacks.summary import program


def test_the_next_command_can_be_typed_as_it_stands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "prefix", str(tmp_path / ".venv"))
    monkeypatch.setattr(sys, "base_prefix", "/usr")
    monkeypatch.delenv("VIRTUAL_ENV", raising=False)
    assert program("python") == ".venv/bin/python"
    monkeypatch.setenv("VIRTUAL_ENV", str(tmp_path / ".venv"))
    assert program("python") == "python"
    monkeypatch.setattr(sys, "base_prefix", str(tmp_path / ".venv"))
    monkeypatch.delenv("VIRTUAL_ENV")
    assert program("tensorboard") == "tensorboard"
