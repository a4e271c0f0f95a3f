"""A key is hidden wherever a line is printed, and no configuration may hold one."""

import ast
import json
import logging
import re
import warnings
from pathlib import Path
from urllib.parse import quote

import pytest

from lightning_danube.__main__ import main
from lightning_danube.outside.secrets import key_of, redacted, secret_in
from lightning_danube.terminal import clean_logs, show, tell

ROOT = Path(__file__).resolve().parents[2]
KEY = "sk-test-0123456789+/=äß"[:21]
"""Plus, slash and equals sign are written in other ways in addresses."""


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:pass@host/v1", "https://***@host/v1"),
        ("s3://id:p@ss@bucket/x and http://token@h", "s3://***@bucket/x and http://***@h"),
        ("http://host/v1?key=abc&n=3", "http://host/v1?key=***&n=3"),
        ("http://h/?api_key=a;X-Amz-Signature=b&sig=c#access_token=d", None),
        ("http://host/path@v1", "http://host/path@v1"),
        ("mail me@host, a = b", "mail me@host, a = b"),
        ("http://h/?monkey-count=5&page=2", None),
    ],
)
def test_secrets_of_addresses_are_hidden(text: str, shown: str | None) -> None:
    if shown is not None:
        assert redacted(text) == shown
    elif "monkey" not in text:
        assert redacted(text) == "http://h/?api_key=***;X-Amz-Signature=***&sig=***#access_token=***"


@pytest.mark.parametrize("form", [str, json.dumps, repr, lambda key: quote(key, safe=""), lambda key: f"[{key}]"])
def test_a_key_is_hidden_in_each_form(form: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", f" {KEY}\n")
    assert callable(form)
    assert "0123456789" not in redacted(f"before {form(KEY)} after") and secret_in(str(form(KEY)))


def test_what_is_no_key_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short values, and the places of files with keys."""
    monkeypatch.setenv("SOME_API_KEY", "EMPTY")
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", "/var/run/service/file")
    monkeypatch.setenv("DB_PASSWORD", "quickstart")
    text = "EMPTY /var/run/service/file"
    assert redacted(text) == text
    assert not secret_in("quickstart"), "a name that a password happens to be is no reason to refuse a config"


def test_a_variable_that_an_option_names_holds_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OF_THE_JUDGE", KEY)
    assert key_of("OF_THE_JUDGE") == KEY
    assert redacted(f"Bearer {KEY}") == "Bearer ***"
    assert key_of("NOT_SET_AT_ALL") is None


@pytest.mark.parametrize("key", ["sk-01234567\nX-Evil: 1", "sk-0123 4567", "sk-0123€4567", "sk-0123\x7f"])
def test_a_key_that_no_header_takes_is_refused_without_showing_it(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", key)
    with pytest.raises(ValueError, match=r"^the key in MY_KEY holds a space, a line end or a letter") as refused:
        key_of("MY_KEY")
    assert "0123" not in str(refused.value)


def test_white_space_around_a_key_is_no_part_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", f"\t{KEY}\r\n")
    assert key_of("MY_KEY") == KEY


@pytest.mark.parametrize("named", [KEY, "hf_abcDEF", ""])
def test_a_key_in_place_of_the_name_of_its_variable_is_refused_without_showing_it(named: str) -> None:
    with pytest.raises(ValueError, match="api_key_variable names no environment variable") as refused:
        key_of(named)
    assert not named or named not in str(refused.value)


def test_printed_lines_have_no_key(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HF_TOKEN", KEY)
    show(f"a {KEY}")
    tell(f"b {KEY}")
    assert capsys.readouterr() == ("a ***\n", "b ***\n")


@pytest.mark.parametrize("debug", [[], ["--debug"]])
@pytest.mark.parametrize(
    "override",
    [
        ("--data.init_args.sources.web.path", f"https://me:{KEY}@host/shards"),
        ("--data.init_args.sources.web.path", f"https://host/shards?key={KEY}"),
        ("--trainer.logger.init_args.tracking_uri", "http://sk-test-0123456789@host"),
        ("--trainer.callbacks+", f"{{class_path: Judge, init_args: {{base_url: u, api_key_variable: '{KEY}'}}}}"),
    ],
)
def test_a_configuration_with_a_key_is_refused_before_anything_is_written(
    tmp_path: Path,
    override: tuple[str, str],
    debug: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    config = ["--config", "quickstart", "--runs", str(tmp_path / "runs")]
    assert main(["fit", *config, *override, *debug]) == 2
    printed = "".join(capsys.readouterr())
    assert "0123456789" not in printed and override[0].partition("+")[0] in printed
    assert "key or a password" in printed or "names no environment variable" in printed
    assert debug or printed.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_key_of_the_environment_in_a_file_is_named_by_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    (tmp_path / "c.yaml").write_text(f"trainer:\n  logger:\n    class_path: X\n    init_args: {{key: {KEY}}}\n")
    assert main(["fit", "--config", "quickstart", "--config", str(tmp_path / "c.yaml")]) == 2
    message = capsys.readouterr().err
    assert "c.yaml, line 4: trainer.logger.key holds a key or a password (***)" in message


@pytest.mark.parametrize("folder", ["lightning_danube", "callbacks"])
def test_lines_are_printed_in_one_place(folder: str) -> None:
    """`terminal` hides keys and escapes control characters. Generated texts and JSON for a program are their own."""
    own = {"terminal.py", "cli/verbs/generate.py", "cli/verbs/inspect.py", "quantization/cost.py"}
    writers = ("print", "sys.stdout.write", "sys.stderr.write", "traceback.print_exc", "traceback.print_exception")
    found = set()
    for file in sorted((ROOT / folder).rglob("*.py")):
        text = file.read_text("utf-8")
        for node in ast.walk(ast.parse(text)) if re.search(r"print|\.write\(", text) else ():
            if isinstance(node, ast.Call) and ast.unparse(node.func) in writers:
                found.add(file.relative_to(ROOT / folder).as_posix())
    assert found <= own


def test_log_lines_and_warnings_of_libraries_have_no_key(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HF_TOKEN", KEY)
    before = logging.getLogRecordFactory()
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    try:
        clean_logs()
        logging.getLogger("somewhere").warning("refused %s: %s", KEY, "\x1b[31m")
    finally:
        logging.setLogRecordFactory(before)
    assert "refused ***: \\x1b[31m" in caplog.messages
    assert warnings.formatwarning(f"a {KEY}", UserWarning, "file.py", 1, "").startswith("file.py:1: UserWarning: a ***")
