"""Files and flags as one tree of values."""

import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_danube.cli.command_line import complete_loggers, merged, read_command_line, texts_of
from lightning_danube.cli.options import BEFORE, Typed
from lightning_danube.cli.trainer_options import TRAINER_OPTIONS


def test_the_trainers_options_are_lightnings() -> None:
    from lightning.pytorch import Trainer

    assert set(TRAINER_OPTIONS) == set(inspect.signature(Trainer).parameters)


def test_later_files_and_flags_count_and_each_value_knows_its_place(tmp_path: Path) -> None:
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("name: a\nmodel:\n  class_path: M\n  init_args:\n    decoder: {layers: 3, heads: 4}\n")
    second.write_text("# more\nmodel: {init_args: {decoder: {heads: 2}}}\n")
    args = ["--config", str(first), f"--config={second}", "--model.decoder.layers", "5", "--name=c", "--print_config"]
    stated = read_command_line(args)
    assert stated.tree["name"] == "c"
    assert stated.tree["model"]["init_args"]["decoder"] == {"layers": "5", "heads": 2}
    assert "decoder" not in stated.tree["model"]
    assert stated.place_of(("model", "decoder", "heads")) == f"{second}, line 2"
    assert stated.place_of(("model", "decoder", "layers")) == "--model.decoder.layers"
    assert stated.place_of(("model", "class_path")) == f"{first}, line 3"
    assert stated.place_of(("data", "x")) == ""


def test_a_flag_takes_the_place_of_all_that_files_state_below_its_key(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("data:\n  init_args:\n    stages:\n      - {name: one, tokens: 5}\n    sources: {web: {path: a}}\n")
    args = [
        "--config",
        str(file),
        "--data.init_args.stages",
        "[{name: b}]",
        "--data.init_args.sources",
        "{wiki: {path: b}}",
    ]
    stated = read_command_line(args)
    assert stated.place_of(("data", "stages", "0", "tokens")) == "--data.init_args.stages"
    # A mapping is merged with that of the file.
    assert stated.place_of(("data", "sources", "web", "path")) == f"{file}, line 5"
    added = read_command_line(["--config", str(file), "--data.init_args.stages+", "{name: b}"])
    assert added.place_of(("data", "stages", "0", "tokens")) == f"{file}, line 4"


def test_a_key_that_stands_twice_in_a_flag_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^--data\.sources, line 1: the key 'a' appears twice, first in line 1: remove or"
    ):
        read_command_line(["--data.sources", "{a: {path: x}, a: {path: y}}"])


def test_merging_is_jsonargparses() -> None:
    assert merged([1, 2], [3]) == [3]
    assert merged([{"class_path": "A"}], {"x": 1}) == [{"class_path": "A", "x": 1}]
    assert merged("A", {"x": 1}) == {"class_path": "A", "x": 1}
    assert merged("own.adam", {"x": 1}) == {"class_path": "own.adam", "x": 1}
    for text in ("documentation:packages", "danube-small", "mistral", "train.jsonl", "a/B"):
        assert merged(text, {"x": 1}) == {"x": 1}
    assert merged(Typed("{x: 1, y: 2}"), {"x": 3}) == {"x": 3, "y": 2}
    before = {"class_path": "A", "init_args": {"x": 1}}
    assert merged(before, {"class_path": "A", "init_args": {"y": 2}})["init_args"] == {"x": 1, "y": 2}
    assert merged(before, {"class_path": "B"}) == {"class_path": "B", BEFORE: {"x": 1}}


@pytest.mark.parametrize(
    ("option", "text", "inner"),
    [
        ("data.train", "documentation:packages", "path"),
        ("data.init_args.train", "train.jsonl", "path"),
        ("model.decoder", "danube3-500m", "num_hidden_layers"),
        ("name", "quickstart", "path"),
        ("trainer.strategy", "ddp", "find_unused_parameters"),
    ],
)
def test_an_option_below_a_text_is_refused(option: str, text: str, inner: str, tmp_path: Path) -> None:
    name = option.replace("init_args.", "")
    section, _, key = name.partition(".")
    written = {"class_path": "M", "init_args": {key: text}} if section in ("data", "model") else {key: text}
    file = tmp_path / "a.yaml"
    file.write_text(yaml.safe_dump({section: written if key else text}))
    line = next(number for number, one in enumerate(file.read_text().splitlines(), start=1) if text in one)
    said = f"--{option}.{inner} 3: {name} is the text {text!r} ({file}, line {line}), which has no options: give the"
    with pytest.raises(ValueError, match=f"^{re.escape(said)} whole value by --{name}$"):
        read_command_line(["--config", str(file), f"--{option}.{inner}", "3"])
    # The whole value may be given, and then a part of it.
    stated = read_command_line(["--config", str(file), f"--{option}", "{a: b}", f"--{option}.{inner}=3"])
    assert dict(texts_of(stated.tree))[*name.split("."), inner] == "3"


def test_a_value_is_added_to_a_list(tmp_path: Path) -> None:
    config = tmp_path / "a.yaml"
    config.write_text("trainer: {callbacks: [{class_path: A}]}")
    args = ["--config", str(config), "--trainer.callbacks+=B", "--trainer.callbacks.every", "3"]
    assert read_command_line(args).tree["trainer"]["callbacks"] == [
        {"class_path": "A"},
        {"class_path": "B", "every": "3"},
    ]


def test_an_option_of_one_item_among_several_is_refused(tmp_path: Path) -> None:
    """jsonargparse would set it for the last item, and nobody would notice."""
    config = tmp_path / "a.yaml"
    config.write_text(
        "data: {init_args: {stages: [{name: one, tokens: 5}, {name: two, tokens: 6}]}}\n"
        "trainer: {callbacks: [{class_path: a.B, init_args: {x: 1}}, C]}\n"
        "model: {init_args: {parts: [{x: 1}]}}\n"
    )
    for flag, names in (
        ("--data.init_args.stages.tokens", "data.init_args.stages is a list of 2 (one, two)"),
        ("--data.stages.tokens", "data.stages is a list of 2 (one, two)"),
        ("--trainer.callbacks.x", "trainer.callbacks is a list of 2 (B, C)"),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(f'{flag} 1: {names}, and the flag does not say which')}"):
            read_command_line(["--config", str(config), flag, "1"])
    # One item, or the item that a flag has just added, can be meant only.
    assert read_command_line(["--config", str(config), "--model.init_args.parts.x", "2"]).tree["model"] == {
        "init_args": {"parts": [{"x": "2"}]}
    }
    added = ["--trainer.callbacks+=D", "--trainer.callbacks.x", "3", "--trainer.callbacks.y", "4"]
    items = read_command_line(["--config", str(config), *added]).tree["trainer"]["callbacks"]
    assert items[2:] == [{"class_path": "D", "x": "3", "y": "4"}]


def test_a_value_may_hold_an_equals_sign() -> None:
    tree = read_command_line(["--name=a=b", "--data.init_args.tokenizer=dir/x=1", "--runs", "c=d"]).tree
    assert (tree["name"], tree["data"]["init_args"]["tokenizer"], tree["runs"]) == ("a=b", "dir/x=1", "c=d")


@pytest.mark.parametrize(
    "args",
    [
        ["--config", "A", "--config", "B"],
        ["--config=A", "-c", "B"],
        ["-c", "A", "--config=B"],
        ["--config=A", "--config=B"],
    ],
)
def test_configurations_count_in_their_order_however_they_are_given(args: list[str], tmp_path: Path) -> None:
    places = {name: str(tmp_path / f"{name.lower()}.yaml") for name in "AB"}
    for name, file in places.items():
        Path(file).write_text(f"name: {name}\n")
    given = [arg.replace("A", places["A"]).replace("B", places["B"]) for arg in args]
    stated = read_command_line(given)
    assert stated.files == [places["A"], places["B"]] and stated.tree["name"] == "B"
    assert stated.place_of(("name",)) == f"{places['B']}, line 1"


@pytest.mark.parametrize(
    ("given", "added"),
    [
        (["CSVLogger"], {"class_path": "CSVLogger", "init_args": {"save_dir": "here"}}),
        (
            ["CSVLogger", "--trainer.logger.flush_logs_every_n_steps", "5"],
            {"class_path": "CSVLogger", "init_args": {"flush_logs_every_n_steps": "5", "save_dir": "here"}},
        ),
        (
            ["[TensorBoardLogger, MLFlowLogger]"],
            [{"class_path": "TensorBoardLogger", "init_args": {"save_dir": "here"}}, "MLFlowLogger"],
        ),
        (["CSVLogger", "--trainer.logger.save_dir", "logs"], None),
        (["{class_path: CSVLogger, init_args: {save_dir: logs}}"], None),
        (["MLFlowLogger"], None),
        (["false"], None),
    ],
)
def test_loggers_of_local_files_get_the_directory_of_all_runs(given: list[str], added: Any) -> None:
    stated = read_command_line(["--runs", "here", "--trainer.logger", *given])
    complete_loggers(stated)
    assert stated.added == ([] if added is None else ["--trainer.logger", json.dumps(added)])
