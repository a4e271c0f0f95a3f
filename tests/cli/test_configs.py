"""What jsonargparse reads is what `yaml_files` reads: keys are text, and none appears twice."""

import argparse
import re
from pathlib import Path
from typing import Any

import pytest
from jsonargparse import ArgumentParser

from lightning_danube.cli.configs import PARSER_OPTIONS, check_settings, set_parsing_rules
from lightning_danube.yaml_files import load_yaml


@pytest.fixture
def parser() -> ArgumentParser:
    set_parsing_rules()
    set_parsing_rules()  # more than once in a process, as commands from Python do it
    made = ArgumentParser(**PARSER_OPTIONS)
    made.add_argument("--config", action="config")
    made.add_argument("--mix", type=dict[str, float])
    made.add_argument("--sources", type=dict)
    made.add_argument("--rate", type=float)
    return made


def test_names_that_yaml_takes_for_other_types_are_names(parser: ArgumentParser, tmp_path: Path) -> None:
    text = "rate: 1e-4\nsources: {no: {path: a}, 2024: {path: '${rate}'}}\nmix: {no: 50, on: 50}\n"
    (tmp_path / "a.yaml").write_text(text)
    found: Any = parser.parse_args(["--config", str(tmp_path / "a.yaml")])
    assert found.rate == 1e-4 and dict(found.mix) == {"no": 50.0, "on": 50.0}
    assert {name: dict(source) for name, source in found.sources.items()} == {
        "no": {"path": "a"},
        "2024": {"path": 1e-4},
    }
    mix = parser.parse_args(["--mix", "{no: 1, 2024: 2, 1e3: 3}"]).mix
    assert dict(mix) == {"no": 1.0, "2024": 2.0, "1e3": 3.0}
    saved = load_yaml(parser.dump(found))
    assert set(saved["sources"]) == {"no", "2024"} and set(saved["mix"]) == {"no", "on"}


def test_a_key_that_stands_twice_is_refused_in_every_text(parser: ArgumentParser, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("mix:\n  web: 1\n  web: 2\n")
    with pytest.raises(argparse.ArgumentError, match="line 3: the key 'web' appears twice, first in line 2"):
        parser.parse_args(["--config", str(tmp_path / "a.yaml")])
    # read_command_line has named the key before.
    with pytest.raises(argparse.ArgumentError, match=r"Got value: \{web: 1, web: 2\}"):
        parser.parse_args(["--mix", "{web: 1, web: 2}"])


QUICKSTART = ["--config", "quickstart"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--data.batch_tokens 1000", "--data.batch_tokens is 1000, not a multiple of data.context_length (256): 1024"),
        ("--data.held_out 5", "--data.held_out is 5.0: give a share between 0 and 1, such as 0.01"),
        ("--model.learning_rate.warmup 20M", "--model.learning_rate.warmup is 20M, and the whole run has 1,001,472"),
        (
            "--model.decoder danube3-50m",
            "--model.decoder: no preset is called 'danube3-50m'; did you mean danube3-500m",
        ),
        (
            "--model.decoder.hidden_size 100",
            "--model.decoder.hidden_size 100 and num_attention_heads 4 make a head_dim",
        ),
        ("--model.lora.rank 3", "--model.lora.rank is given, and model.weights names no weights to adapt: name them"),
        # Neither the tokenizer nor the optimizer is loaded.
        ("--data.tokenizer ./nowhere --model.optimizer Nothing --data.held_out 5", "--data.held_out is 5.0"),
    ],
)
def test_the_settings_of_a_pre_training_run_are_checked(flags: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        check_settings([*QUICKSTART, *flags.split()])


@pytest.mark.parametrize(
    "flags",
    [
        "--data.tokenizer ./nowhere --model.optimizer Nothing",
        # Weights decide the context length.
        "--model.weights ./nowhere --data.batch_tokens 1000",
        "--data my.own.Data --data.batch_tokens 1000",
        "--model Pretraining",
    ],
)
def test_what_the_settings_alone_do_not_tell_is_checked_later(flags: str) -> None:
    check_settings([*QUICKSTART, *flags.split()])
