"""`tokenizer`: what it writes, what it prints, and what it refuses."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from lightning_danube.__main__ import main
from lightning_danube.tokens.shards import is_held_out
from lightning_danube.tokens.tokenizer import load_hf_tokenizer


def make(*arguments: object) -> int:
    return main(["tokenizer", *map(str, arguments)])


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that a mistake gets."""
    capsys.readouterr()
    assert make(*arguments) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and not said.out, said
    return said.err


def test_a_configurations_sources_give_a_tokenizer(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tiny / "own"
    assert make("--config", tiny / "tiny.yaml", "--vocab-size", 300, "--out", out) == 0
    header, _, own, mistral, last = capsys.readouterr().out.splitlines()
    assert header.split()[-3:] == ["pieces", "web", "wiki"]
    assert own.split()[:2] == [str(out), "300"] and mistral.split()[:2] == ["mistral", "32,000"]
    assert last.endswith(f"tokenizer: {out}")
    assert {path.name for path in out.iterdir()} == {"tokenizer.json", "tokenizer_config.json"}
    tokenizer = AutoTokenizer.from_pretrained(out)
    # The rows that tiny.yaml holds out, by the tokenizer itself.
    texts = [json.loads(line)["text"] for line in (tiny / "web.jsonl").read_text().splitlines()]
    held_out = [text for text in texts if is_held_out(text, 0.05)]
    tokens = sum(len(tokenizer(text, add_special_tokens=False).input_ids) for text in held_out)
    assert own.split()[2] == f"{sum(map(len, held_out)) / tokens:.2f}"
    assert load_hf_tokenizer(str(out))("river 12").input_ids == tokenizer("river 12").input_ids


def test_the_configuration_may_name_the_tokenizer_that_is_to_be_made(tiny: Path) -> None:
    name = ["--data.init_args.tokenizer", tiny / "own"]
    assert make("--config", tiny / "tiny.yaml", "--vocab-size", 300, "--out", tiny / "own", *name) == 0
    assert main(["prepare", "--config", str(tiny / "tiny.yaml"), *map(str, name)]) == 0


@pytest.mark.medium
def test_paths_are_enough(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tiny / "note.txt").write_text("a note a note a note")
    sources = ["--source", tiny / "web.jsonl", "--source", tiny / "note.txt"]
    assert make(*sources, "--vocab-size", "0.27k", "--out", tiny / "own") == 0
    # A short text has nothing to hold out, so no column.
    assert capsys.readouterr().out.splitlines()[0].split()[-2:] == ["pieces", str(tiny / "web.jsonl")]
    assert make("--source", tiny / "note.txt", "--vocab-size", 264, "--out", tiny / "other") == 0
    assert "too little text to hold some out" in capsys.readouterr().out


def test_skipped_rows_are_told(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (tiny / "web.jsonl").open("a") as file:
        file.write("no JSON\n")
    arguments = ["--config", tiny / "tiny.yaml", "--vocab-size", 300, "--out", tiny / "own"]
    assert "web.jsonl, row 301" in refused(capsys, *arguments)
    assert make(*arguments, "--data.init_args.sources.web.on_bad_row", "skip") == 0
    assert "web: 1 row was skipped" in capsys.readouterr().out


def test_a_tokenizer_is_there_whole_or_not_at_all(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--source", tiny / "web.jsonl", "--out", tiny / "own"]
    assert "the text gives" in refused(capsys, *arguments, "--vocab-size", 20_000)
    assert sorted(path.name for path in tiny.iterdir()) == ["tiny.yaml", "web.jsonl", "wiki.jsonl"]
    assert make(*arguments, "--vocab-size", 270) == 0
    before = (tiny / "own/tokenizer.json").read_bytes()
    assert "own is not empty (tokenizer.json, tokenizer_config.json)" in refused(capsys, *arguments)
    assert make(*arguments, "--vocab-size", 280, "--overwrite") == 0
    assert (tiny / "own/tokenizer.json").read_bytes() != before
    (tiny / "own/notes.txt").write_text("mine")
    assert "it is not overwritten" in refused(capsys, *arguments, "--overwrite")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--vocab-size", "260", "--source", "TMP/web.jsonl"], "--vocab-size is 260: the special tokens"),
        (
            ["--vocab-size", "many", "--source", "TMP/web.jsonl"],
            "--vocab-size is 'many': give a positive",
        ),
        ([], "give the texts either by --config NAME, which has data.sources, or by --source PATH"),
        (["--config", "TMP/tiny.yaml", "--source", "TMP/web.jsonl"], "give the texts either by --config"),
        (["--source", "TMP/nowhere.jsonl"], "there is no file TMP/nowhere.jsonl"),
        (["--source", "TMP/empty.txt"], "holds no text to learn from"),
        (["--source", "TMP/web.jsonl", "--seed", "3"], "unrecognized arguments: --seed 3"),
        (["--config", "TMP/nowhere.yaml"], "there is no config file TMP/nowhere.yaml"),
        (["--config", "TMP/tiny.yaml", "--vocabsize", "300"], "--vocabsize is not an option of this command"),
        (["--config", "TMP/chat.yaml"], "data is ChatData: only the sources of CurriculumData are plain texts"),
    ],
)
def test_mistakes_get_one_line(
    arguments: list[str], message: str, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tiny / "empty.txt").write_text("\n\n")
    (tiny / "chat.yaml").write_text(
        "data: {class_path: lightning_danube.chat.ChatData, "
        "init_args: {context_length: 8, sources: {a: {path: a.jsonl}}}}"
    )
    given = [argument.replace("TMP", str(tiny)) for argument in arguments]
    assert message.replace("TMP", str(tiny)) in refused(capsys, *given, "--out", tiny / "own")
    assert not (tiny / "own").exists()


def test_a_place_that_cannot_be_written_is_told_before_text_is_read(
    tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "lightning_danube.tokens.tokenizer_training.TextSample.texts", lambda sample: pytest.fail("read")
    )
    message = refused(capsys, "--source", tiny / "web.jsonl", "--out", tiny / "web.jsonl" / "own")
    assert f"{tiny / 'web.jsonl'}" in message
