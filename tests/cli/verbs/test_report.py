"""Which run `report` takes, and where the page lies. What is on the page: tests/reports/test_run_page.py."""

from pathlib import Path

import pytest

from lightning_danube.__main__ import main
from lightning_danube.cli.verbs.report import _directory


@pytest.fixture
def version(tmp_path: Path) -> Path:
    for number in (2, 10):
        directory = tmp_path / "runs" / "mine" / f"version_{number}"
        directory.mkdir(parents=True)
        (directory / "config.yaml").write_text("name: mine\n")
    (tmp_path / "runs" / "mine" / "version_11").mkdir()  # it never began
    return directory


def test_a_run_is_named_by_its_directory_its_name_or_its_config(version: Path) -> None:
    for text in (version, version.parent, version / "config.yaml"):
        assert _directory(str(text)) == version


def test_a_run_that_is_not_there_is_refused(version: Path) -> None:
    runs = version.parents[1]
    with pytest.raises(ValueError, match=f"there is no run {runs}/mime: did you mean '{runs}/mine'"):
        _directory(f"{runs}/mime")
    with pytest.raises(ValueError, match=r"is not a run: neither it nor a version_<n> in it has a config.yaml"):
        _directory(str(runs))


def test_a_run_without_any_result_has_a_page(version: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(version)]) == 0
    assert capsys.readouterr().out == f"written: {version / 'report.html'}\n"
    page = (version / "report.html").read_text("utf-8")
    for missing in ("no summary.json", "no curves, of TensorBoardLogger or CSVLogger", "no session is recorded"):
        assert missing in page
