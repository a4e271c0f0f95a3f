"""A name from a file, a server or an option stays in its directory."""

from pathlib import Path

import pytest

from lightning_danube.__main__ import main
from lightning_danube.checkpoints.runs import resolve_checkpoint
from lightning_danube.outside.names import inside, plain_name

HOSTILE = ["", " ", ".", "..", "../x", "a/b", "/etc/passwd", "..\\x", "a\nb", "a\r", "a\x1b[31m", "a\x00b", " a", "a ",
           "a\u2028b", "a\u202eb", "\udc80", "x" * 201, "é" * 101]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_that_is_no_plain_one_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^it is .* so give a plain name$") as refused:
        inside(tmp_path, name, "it")
    assert str(refused.value).isprintable() and len(str(refused.value)) < 250


@pytest.mark.parametrize("name", [None, 3, ["a"], b"a"])
def test_what_is_no_text_is_no_name(name: object) -> None:
    with pytest.raises(ValueError, match="that is not text"):
        plain_name(name, "it")


@pytest.mark.parametrize("name", ["run", "my run", "v1.2-x_y", ".hidden", "...", "ラン", "x" * 200, "-a", "~"])
def test_a_plain_name_is_one_entry_of_its_directory(name: str, tmp_path: Path) -> None:
    path = inside(tmp_path, name, "it")
    path.touch()
    assert [one.name for one in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("verb", ["fit", "test"])
def test_a_run_writes_nothing_outside_its_directory(verb: str, tmp_path: Path) -> None:
    for name in ("../../x", "..", ".", "", "a\nb", "/tmp/x"):
        with pytest.raises(ValueError, match=r"^--name is "):
            resolve_checkpoint(verb, str(tmp_path), name, "last")
    assert resolve_checkpoint("fit", str(tmp_path), "my run", None).run == tmp_path / "my run" / "version_0"


def test_a_name_that_is_a_path_is_refused_in_one_line(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tiny)
    before = sorted(tiny.rglob("*"))
    assert main(["fit", "--config", str(tiny / "tiny.yaml"), "--name", "../../x"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --name is '../../x': that is a path;") and error.count("\n") == 1
    assert sorted(tiny.rglob("*")) == before
