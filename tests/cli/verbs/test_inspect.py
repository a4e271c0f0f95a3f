"""`inspect` from the command line. What it shows of each task: the tests of the data modules."""

import os
from pathlib import Path

import pytest

from lightning_danube.__main__ import main
from lightning_danube.cli.verbs.inspect import _say


def test_a_configuration_is_shown_in_the_terminal_and_as_a_page(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tiny / "data.html"
    config = ["--config", str(tiny / "tiny.yaml"), "--data.init_args.context_length", "16"]
    assert main(["inspect", *config, "--examples", "1", "--rows", "40", "--html", str(page)]) == 0
    said = capsys.readouterr().out
    assert "── web" in said and "── wiki" in said and "40 documents read" in said
    assert "(17 tokens, 16 learned)" in said  # the override counts
    assert "\x1b" not in said  # a pipe gets no colours
    assert f"written: {page}" in said and "row 1 of the training text" in page.read_text("utf-8")
    assert not (tiny / "runs").exists() and not (tiny / "cache").exists()


def test_nothing_to_learn_is_said_at_the_end_too(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tiny / "web.jsonl").write_text('{"words": 1}\n')
    assert main(["inspect", "--config", str(tiny / "tiny.yaml")]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "✗ NOTHING IS LEARNED FROM THIS SOURCE: web"


def test_a_negative_number_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "--config", "quickstart", "--rows", "-1"]) == 2
    assert capsys.readouterr().err == "error: --rows is -1: give 0 or more\n"


def test_data_of_others_say_what_they_lack(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "other.yaml"
    config.write_text("data: {class_path: lightning.pytorch.demos.boring_classes.BoringDataModule}\n")
    assert main(["inspect", "--config", str(config)]) == 2
    assert "data is BoringDataModule, which has no method shown_sources" in capsys.readouterr().err


def test_a_reader_that_leaves_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w", encoding="utf-8") as stream:
        monkeypatch.setattr("sys.stdout", stream)
        assert not _say("nobody reads this")
        assert _say("nor this")
