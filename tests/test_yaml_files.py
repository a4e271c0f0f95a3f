"""Configurations by name, the verb `configs`, and what a clone without its symbolic links says."""

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_danube import __main__
from lightning_danube.__main__ import check_links, main
from lightning_danube.checkpoints.runs import read_saved_config
from lightning_danube.cli.command_line import with_config_paths
from lightning_danube.yaml_files import (
    FOLDER,
    NotYaml,
    _loaders,
    config_file,
    config_names,
    description,
    lines_of_keys,
    load_yaml,
    read_config,
    with_text_keys,
)

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory: nothing may be read from the clone."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def error_of(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    assert main(list(args)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


def test_every_file_has_a_name() -> None:
    files = {file.relative_to(ROOT / "configs").as_posix() for file in (ROOT / "configs").rglob("*.yaml")}
    assert files == {f"{name}.yaml" for name in config_names()}
    assert {"quickstart", "sft/quickstart", "studies/quickstart"} <= set(config_names())


def test_a_name_is_found_from_any_directory_and_a_path_goes_first(elsewhere: Path) -> None:
    assert config_file("sft/quickstart") == str(FOLDER / "sft" / "quickstart.yaml")
    (elsewhere / "sft").mkdir()
    (elsewhere / "sft" / "quickstart").write_text("name: mine\n")
    assert config_file("sft/quickstart") == "sft/quickstart"


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("quickstrt", "quickstart"),
        ("sft/quikstart", "sft/quickstart"),
        ("danube3-5OOm", "danube3-500m"),
        ("configs/quickstart.yaml", "quickstart"),
        ("./configs/pretrain/laptop.yaml", "pretrain/laptop"),
        ("imdb-papr", "classification/imdb-paper"),
        ("experiments-of-mine/imdb-papr", "classification/imdb-paper"),
    ],
)
def test_a_typing_error_gets_the_nearest_name(typed: str, meant: str) -> None:
    with pytest.raises(ValueError, match=rf"no config file {typed}: did you mean \S*{meant}\?$"):
        config_file(typed)


def test_a_name_that_is_near_nothing_gets_the_command_that_lists_them() -> None:
    with pytest.raises(ValueError, match="no config file xyzzy: the command `configs` lists those that need no file"):
        config_file("xyzzy")


@pytest.mark.parametrize("verb", ["fit", "plan", "prepare", "study"])
def test_every_verb_with_a_config_answers_a_typing_error_in_one_line(
    verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert error_of(capsys, verb, "--config", "quickstrt").endswith("did you mean quickstart?")


def test_config_options_of_a_command_line_become_paths(elsewhere: Path) -> None:
    (elsewhere / "mine.yaml").write_text("name: mine\n")
    path = str(FOLDER / "quickstart.yaml")
    args = ["fit", "--config", "quickstart", "--config=quickstart", "-c", "mine.yaml", "--name", "quickstart"]
    assert with_config_paths(args) == [
        *("fit", "--config", path, f"--config={path}", "-c", "mine.yaml", "--name", "quickstart")
    ]
    assert with_config_paths(["fit", "--config"]) == ["fit", "--config"]


def test_configs_lists_each_name_with_its_first_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["configs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == config_names()
    assert lines[0].endswith(description("quickstart")) and len(description("quickstart")) > 20


def test_copy_writes_a_config_for_editing(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["configs", "copy", "sft/quickstart"]) == 0
    said = capsys.readouterr().out
    assert "written: sft-quickstart.yaml" in said and "fit --config sft-quickstart.yaml" in said
    assert (elsewhere / "sft-quickstart.yaml").read_text() == (ROOT / "configs/sft/quickstart.yaml").read_text()
    assert main(["configs", "copy", "evaluation/quickstart", "mine.yaml"]) == 0
    assert "test --config mine.yaml" in capsys.readouterr().out


def test_copy_never_overwrites(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (elsewhere / "mine.yaml").write_text("name: mine\n")
    said = error_of(capsys, "configs", "copy", "quickstart", "mine.yaml")
    assert said == "mine.yaml exists and is left as it is: name another file, as in configs copy quickstart mine.yaml"
    assert (elsewhere / "mine.yaml").read_text() == "name: mine\n"


def test_copy_into_a_place_that_cannot_be_written_is_one_line(
    elsewhere: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (
        error_of(capsys, "configs", "copy", "quickstart", "no/mine.yaml") == "no/mine.yaml: No such file or directory"
    )
    (elsewhere / "file").write_text("")
    assert error_of(capsys, "configs", "copy", "quickstart", "file/mine.yaml") == "file/mine.yaml: Not a directory"

    really_open = Path.open

    def refuse(self: Path, mode: str = "r", **kwargs: Any) -> Any:
        if mode == "x":
            raise PermissionError(13, "Permission denied", str(self))
        return really_open(self, mode, **kwargs)

    # Root may write everywhere, so the file system's refusal is made up.
    monkeypatch.setattr(Path, "open", refuse)
    assert error_of(capsys, "configs", "copy", "quickstart", "mine.yaml") == "mine.yaml: Permission denied"


def test_copy_of_what_is_not_there_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean quickstart?" in error_of(capsys, "configs", "copy", "quickstar")
    assert "which configuration? For example: " in error_of(capsys, "configs", "copy")
    assert "invalid choice: 'cpy'" in error_of(capsys, "configs", "cpy", "quickstart")


def test_a_clone_without_its_symbolic_links_says_so_in_one_line(
    elsewhere: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    check_links()
    for name in ("callbacks", "configs"):
        (elsewhere / name).write_text(f"../{name}")  # what git writes where it may not make a link
    monkeypatch.setattr(__main__, "PACKAGE", elsewhere)
    said = error_of(capsys, "fit", "--config", "quickstart")
    assert said.startswith(f"{elsewhere / 'callbacks'} is not a folder: git made no symbolic link to callbacks/.")
    assert "git config core.symlinks true" in said


@pytest.mark.parametrize("layout", ["clone", "wheel"])
def test_a_value_error_of_a_callback_is_a_users_mistake_in_both_layouts(layout: str, elsewhere: Path) -> None:
    """Paths decide it: in a clone the callbacks lie beside the package, in a wheel inside."""
    package = elsewhere / "lightning_danube"
    package.mkdir()
    real = elsewhere / "callbacks" if layout == "clone" else package / "callbacks"
    real.mkdir()
    if layout == "clone":
        (package / "callbacks").symlink_to("../callbacks")
    ours = __main__.folders_of(package)
    file = package / "callbacks" / "one.py"
    assert str(file.resolve()).startswith(ours)
    assert not str((elsewhere / "other.py").resolve()).startswith(ours)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "mine.yaml is empty: a configuration is a mapping of keys"),
        (b"- a\n", "mine.yaml holds a list: a configuration is a mapping"),
        (b"\xff\xfe", "mine.yaml is not UTF-8 text"),
        (b"a: 1\nb: [\n", "mine.yaml, line 3: not YAML ("),
        (b"a: 1\nb: 2: 3\n", "mine.yaml, line 2: not YAML ("),
        (b"a: 1\nb: 2\na: 3\n", "mine.yaml, line 3: the key 'a' appears twice, first in line 1: remove or rename one"),
        (
            b"- &x {a: 1}\n- [{b: {<<: *x, no: 2,\n no: 1}}]",
            "mine.yaml, line 3: the key 'no' appears twice, first in line 2",
        ),
    ],
)
def test_what_is_no_configuration_is_named_with_its_line(elsewhere: Path, content: bytes, message: str) -> None:
    (elsewhere / "mine.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(message)):
        read_config("mine.yaml")


TENFOLD = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 10)}]\n" for before, name in pairwise("abcdefghi")
)
"""A text of 330 bytes that stands for a billion values."""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TENFOLD, "its aliases repeat 1,234,567,880 values, more than 10,000: write them out"),
        ("a: &a [*a]", "line 1: an alias stands inside the value that it repeats"),
        ("a: 1\nb: &b {c: {d: *b}}", "line 2: an alias stands inside the value that it repeats"),
        ("a: " + "[" * 100_000, "nested more than 50 deep"),
        ("a: " + "[" * 60 + "]" * 60, "nested more than 50 deep"),
    ],
)
def test_what_stands_for_values_without_end_is_refused_at_once(elsewhere: Path, text: str, message: str) -> None:
    """By each reader: that of configurations, that of flags and of jsonargparse, and that of saved configs."""
    (elsewhere / "config.yaml").write_text(text)
    for read in (lambda: load_yaml(text), lambda: with_text_keys(text), lambda: read_config("config.yaml")):
        with pytest.raises(ValueError, match=re.escape(message)):
            read()
    with pytest.raises(ValueError, match=re.escape(message)):
        lines_of_keys("config.yaml")
    assert read_saved_config(elsewhere / "config.yaml") is None


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            "9" * 5000,
            "line 2: 99999999999999999999… (5,000 characters) cannot be read as int: put quotes around a text",
        ),
        ("!!int x", "line 2: x cannot be read as int"),
        ("!!float x", "line 2: x cannot be read as float"),
        ("!!bool x", "line 2: x cannot be read as bool"),
        ("!!binary x", "line 2: not YAML (failed to decode base64 data"),
        ("!!python/object/apply:os.system [ls]", "line 2: not YAML (could not determine a constructor for the tag"),
        ("\0", "not YAML (unacceptable character #x0000"),
        ("\ud800", "not YAML (unacceptable character #xd800"),
        ("*nothing", "line 2: not YAML (found undefined alias"),
    ],
)
def test_each_error_of_the_library_becomes_one_line(value: str, message: str) -> None:
    with pytest.raises(NotYaml, match=rf"^{re.escape(message)}[^\n]*$"):
        load_yaml(f"a: 1\nb: {value}")


def test_what_looks_like_a_date_is_text() -> None:
    """No option is a date; a name may be one, also of a day that does not exist."""
    assert load_yaml("[2024-01-02, 2024-13-45, !!timestamp x]") == ["2024-01-02", "2024-13-45", "x"]


def test_aliases_may_repeat_what_a_configuration_repeats() -> None:
    text = "a: &a {x: 1, y: [2, 3]}\nb: [*a, *a, {<<: *a, x: 4}]"
    assert load_yaml(text) == yaml.safe_load(text)


def test_each_key_is_known_by_its_line(elsewhere: Path) -> None:
    text = "# comment\na: 1\nb:\n  c: {d: 2,\n    e: 3}\n  list:\n    - x: 4\n      y: 5\n    - 6\n"
    (elsewhere / "mine.yaml").write_text(text)
    assert lines_of_keys("mine.yaml") == {
        ("a",): 2, ("b",): 3, ("b", "c"): 4, ("b", "c", "d"): 4, ("b", "c", "e"): 5, ("b", "list"): 6,
        ("b", "list", "0"): 7, ("b", "list", "0", "x"): 7, ("b", "list", "0", "y"): 8, ("b", "list", "1"): 9,
    }  # fmt: skip


WRITTEN = (
    "no: a\non: b\n2024: [{1e3: c, ~: d, 2024-01-01: e}]\n'yes': no\ntrue: &x {1: 2, a: 3}\nmore: {<<: *x, a: 4}\n"
)


def test_keys_are_text_as_they_are_written(elsewhere: Path) -> None:
    expected = {
        "no": "a", "on": "b", "2024": [{"1e3": "c", "~": "d", "2024-01-01": "e"}], "yes": False,
        "true": {"1": 2, "a": 3}, "more": {"1": 2, "a": 4},
    }  # fmt: skip
    (elsewhere / "mine.yaml").write_text(WRITTEN)
    assert read_config("mine.yaml") == load_yaml(WRITTEN) == yaml.safe_load(with_text_keys(WRITTEN)) == expected


@pytest.mark.parametrize("text", ["a: 1  # as it is\n", "no", "", "{a: 1e-4}", "a: [", "[1, 2]", "x y z"])
def test_texts_without_such_keys_are_left_as_they_are(text: str) -> None:
    assert with_text_keys(text) == text


def test_a_key_of_a_merge_may_be_given_anew() -> None:
    """Also where the mapping above is read before the one below."""
    text = "a: {x: &x {<<: &b {k: 1}, k: 2}}\ny: {<<: *x, k: 3}\nz: {<<: [*x, *b]}\n"
    read = load_yaml(text)
    assert read == yaml.safe_load(text)
    # PyYAML 6.0.4 takes the value of the last mapping in the list of z, earlier versions that of the first.
    assert (read["a"], read["y"]) == ({"x": {"k": 2}}, {"k": 3})


@pytest.mark.parametrize(
    ("first", "said"),
    [("# A run of minutes:\n", "A run of minutes"), ("#What it is.\n", "What it is"), ("a: 1  # no\n", ""), ("", "")],
)
def test_the_description_is_the_comment_of_the_first_line(elsewhere: Path, first: str, said: str) -> None:
    (elsewhere / "mine.yaml").write_text(f"{first}b: 2\n# the second comment\n")
    assert description("mine.yaml") == said


def test_names_without_a_folder_come_first() -> None:
    depths = ["/" in name for name in config_names()]
    assert depths == sorted(depths)
    for own in (False, True):
        names = [name for name in config_names() if ("/" in name) is own]
        assert names == sorted(names)


ODD = [
    "{no: 1, 2024: 2, 1e3: 3, yes: {a: ~}}",
    "- 'a: b'\n- \"c\\n\"\n- |\n  two\n  lines\n- >-\n  one\n  line",
    "a: &x {b: 1}\nc: *x\nd: {<<: *x, e: 2}",
    "a: 2024-01-01\nb: 1_000\nc: 0x10\nd: 0o7\ne: .inf\nf: 1:30",
    "é: 你好 😀  # a comment",
    "",
    "a: 'x",
    "a: [1",
    "a: 1\n b: 2",
    "a: *unknown",
    "--- a\n--- b",
    "a: !!int x",
    "\ud800: 1",
    "\x00",
]


@pytest.mark.parametrize("text", [*ODD, *config_names()])
def test_a_text_means_the_same_without_the_reader_in_c(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def read() -> list[Any]:
        found: list[Any] = []
        for reader in (load_yaml, with_text_keys):
            try:
                found.append(reader(text))
            except NotYaml as error:
                found.append(str(error))
        return found

    if text in config_names():
        text = Path(config_file(text)).read_text("utf-8")
    fast = read()
    monkeypatch.setattr("lightning_danube.yaml_files._loaders", lambda: _loaders()[-1:])
    assert read() == fast
    assert yaml.__with_libyaml__  # otherwise both were the same
