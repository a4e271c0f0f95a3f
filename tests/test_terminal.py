import shlex
import sys
from pathlib import Path

import pytest

from lightning_danube.terminal import (
    amount,
    as_typed,
    counted,
    markdown_code,
    markdown_table,
    minutes_and_seconds,
    name_meant,
    nearest_name,
    program,
    quoted,
    runnable,
    tell,
    text_table,
)


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The programs' folder of an environment inside the working directory; PATH does not lead there."""
    folder = tmp_path / ".venv" / "bin"
    folder.mkdir(parents=True)
    for name in ("python", "tensorboard", "lightning-danube"):
        (folder / name).write_text("#!/bin/sh\n")
        (folder / name).chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    return folder


@pytest.mark.parametrize("name", ["python", "tensorboard"])
def test_a_program_is_its_name_where_path_leads_to_it_and_else_its_path(
    name: str, environment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert program(name) == f".venv/bin/{name}"
    monkeypatch.setenv("PATH", f"{environment}:/usr/bin")
    assert program(name) == name


def test_a_program_outside_the_working_directory_has_its_whole_path(
    environment: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "else where"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert program("python") == str(environment / "python")
    # Python was started as ../.venv/bin/python.
    monkeypatch.setattr(sys, "executable", str(elsewhere / ".." / ".venv" / "bin" / "python"))
    assert program("python") == str(environment / "python")


def test_a_path_with_a_space_is_one_argument(
    environment: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    moved = tmp_path / "my environment"
    environment.parent.rename(moved)
    monkeypatch.setattr(sys, "executable", str(moved / "bin" / "python"))
    assert shlex.split(program("python")) == ["my environment/bin/python"]


def test_an_interpreter_of_another_name_is_found(environment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (environment / "python").rename(environment / "python3")
    monkeypatch.setattr(sys, "executable", str(environment / "python3"))
    assert program("python") == ".venv/bin/python3"


def test_the_next_command_begins_as_this_one_did(environment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [str(environment / "lightning-danube"), "fit"])
    assert (as_typed(), runnable()) == ("lightning-danube", ".venv/bin/lightning-danube")
    monkeypatch.setattr(sys, "argv", ["/somewhere/lightning_danube/__main__.py", "fit"])
    assert as_typed() == "python -m lightning_danube"
    assert runnable() == ".venv/bin/python -m lightning_danube"


@pytest.mark.parametrize("text", ["The", "The function returns", 'say "yes"', "$HOME and !", "it's", "a\\b", "runs/x"])
def test_a_quoted_text_is_one_argument(text: str) -> None:
    assert shlex.split(quoted(text)) == [text]


def test_double_quotes_are_used_where_they_are_enough() -> None:
    assert quoted("The function returns") == '"The function returns"'
    assert quoted("runs/quickstart/version_0") == "runs/quickstart/version_0"


def test_tables_align() -> None:
    assert text_table(["a", "n"], [["long", "1"], ["b", "1,000"]]) == (
        "a         n\n───────────\nlong      1\nb     1,000"
    )


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.4, "0 min 00 s"), (65.2, "1 min 05 s"), (119.7, "2 min 00 s"), (7200, "120 min 00 s")]
)
def test_a_duration_has_whole_seconds(seconds: float, shown: str) -> None:
    assert minutes_and_seconds(seconds) == shown


def test_a_block_of_code_keeps_its_lines() -> None:
    assert markdown_code("a\n  b") == "    a\n      b"


def test_a_bar_in_a_cell_does_not_end_it() -> None:
    assert markdown_table(["a ", "n"], [["x|y", r"c:\d"]]) == "| a | n |\n| --- | --- |\n| x\\|y | c:\\\\d |"


@pytest.mark.parametrize("text", ["$HOME and more", "`pwd` here", "wait!", "a\\b c", 'say "yes"'])
def test_what_a_shell_would_replace_stands_in_single_quotes(text: str) -> None:
    assert quoted(text) == f"'{text}'"


def test_messages_leave_stdout_to_the_output(capsys: pytest.CaptureFixture[str]) -> None:
    tell("warning: x")
    assert capsys.readouterr() == ("", "warning: x\n")


def test_the_rule_below_a_header_is_as_long_as_the_longest_row() -> None:
    header, rule, *rows = text_table(["a", ""], [["long", "1"], ["b", "100"]]).splitlines()
    assert len(header) == 1 and len(rule) == max(map(len, rows)) == 9


def test_a_program_of_the_same_name_elsewhere_is_not_called(
    environment: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "tensorboard").write_text("#!/bin/sh\n")
    (other / "tensorboard").chmod(0o755)
    monkeypatch.setenv("PATH", str(other))
    assert program("tensorboard") == ".venv/bin/tensorboard"


def test_the_nearest_known_name_is_meant() -> None:
    known = ["river", "stone", "stones"]
    assert nearest_name("rivr", known) == "river" and nearest_name("stons", iter(known)) == "stones"
    assert nearest_name("light", known) is None and nearest_name("ston", known, least=0.95) is None
    assert name_meant("rivr", known) == "did you mean 'river'?"
    assert name_meant("light", dict.fromkeys(known), "it has") == "it has river, stone, stones"
    many = name_meant("light", [f"run{n}" for n in range(10_000)])
    assert many.startswith("there are run0, run1, ") and many.endswith(", run59 and 9,940 more")


@pytest.mark.parametrize(("number", "told"), [(1, "1 epoch"), (2, "2 epochs"), (0, "0 epochs"), (1024, "1,024 epochs")])
def test_an_amount_has_its_noun_in_the_right_number(number: int, told: str) -> None:
    assert amount(number, "epoch") == told


@pytest.mark.parametrize(
    ("number", "told"), [(0, "0 tensors are"), (1, "1 tensor is"), (2, "2 tensors are"), (1234, "1,234 tensors are")]
)
def test_a_counted_thing_has_its_verb_in_the_right_number(number: int, told: str) -> None:
    assert counted(number, "tensor is", "tensors are") == told
