"""What jsonargparse reads is what `yaml_files` reads: keys are text, and none appears twice."""

import argparse
import pkgutil
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from jsonargparse import ArgumentParser

from lightning_danube.cli.command_line import read_command_line, with_config_paths
from lightning_danube.cli.configs import PARSER_OPTIONS, SETTINGS, check_settings, set_parsing_rules
from lightning_danube.cli.options import options_of
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


def check(config: str, *flags: str) -> None:
    check_settings(read_command_line(with_config_paths(["--config", config, *flags])), "fit")


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
        ("--data.tokenizer ./nowhere --model.optimizer my.own.Optimizer --data.held_out 5", "--data.held_out is 5.0"),
    ],
)
def test_the_settings_of_a_pre_training_run_are_checked(flags: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        check("quickstart", *flags.split())


@pytest.mark.parametrize(
    ("config", "flags", "message"),
    [
        ("sft/quickstart", "--data.batch_rows 0", "--data.batch_rows is 0: it must be at least 1"),
        ("sft/quickstart", "--data.held_out 2", "--data.held_out is 2.0: give a share between 0 and 1, such as 0.02"),
        ("sft/quickstart", "--data.workers -1", "--data.workers is -1: give 0 to "),
        ("sft/quickstart", "--data.sources {}", "--data.sources is empty: name at least one"),
        ("sft/quickstart", "--model.optimizer Muon", "--model.optimizer is Muon, which trains from random weights"),
        ("dpo/quickstart", "--data.batch_pairs 0", "--data.batch_pairs is 0: it must be at least 1"),
        ("dpo/quickstart", "--data.validation_pairs 0", "--data.validation_pairs is 0: it must be at least 1"),
        ("dpo/quickstart", "--model.beta 0", "--model.beta is 0.0: give a number above 0, such as 0.1"),
        ("classification/quickstart", "--data.epochs 0", "--data.epochs is 0: it must be at least 1"),
        ("classification/quickstart", "--data.test_share 2", "--data.test_share is 2.0: give a share between 0 and 1"),
        ("classification/quickstart", "--model.head_learning_rate 0", "--model.head_learning_rate is 0.0: it must be"),
        ("classification/quickstart", "--data.most_frequent_classes 1", "--data.most_frequent_classes is 1: at least"),
        ("quantization/quickstart", "--data.context_lengths [0]", "--data.context_lengths is [0]: name different"),
        ("quantization/quickstart", "--data.stride 0", "--data.stride is 0: it must be at least 1 and below the"),
        ("quantization/quickstart", "--model.levels [bitsandbytes:nf5]", "level 'bitsandbytes:nf5': bitsandbytes has"),
        ("evaluation/quickstart", "--data.context_length 1", "--data.context_length is 1: it must be at least 2"),
        ("evaluation/quickstart", "--data.tasks [arc_esy]", "data.tasks names 'arc_esy': did you mean arc_easy?"),
        ("evaluation/quickstart", "--data.directory ./none", "--data.directory: there is no directory ./none"),
        ("evaluation/quickstart", "--data.needle.trials 0", "--data.needle.trials is 0: it must be at least 1"),
        ("evaluation/quickstart", "--model.places 0", "--model.places is 0: it must be at least 1"),
        ("evaluation/quickstart", "--model.dtype float31", "--model.dtype is 'float31'; it has to be one of float32"),
    ],
)
def test_the_settings_of_every_task_are_checked(config: str, flags: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        check(config, *flags.split())


CONFIGS = Path(__file__).parents[2] / "lightning_danube" / "configs"
RUNS = sorted(path for path in CONFIGS.rglob("*.yaml") if path.parent.name != "studies")


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_no_configuration_of_the_package_is_refused(path: Path) -> None:
    check(str(path))


@pytest.mark.parametrize("named", SETTINGS)
def test_settings_have_the_options_and_the_defaults_of_their_class(named: str) -> None:
    rooms = ("chat", "classification", "evaluation", "pretraining", "quantization")
    (owner,) = (
        getattr(module, named)
        for module in map(import_module, (f"lightning_danube.{room}" for room in rooms))
        if named in module.__all__
    )
    settings = pkgutil.resolve_name(f"lightning_danube.{SETTINGS[named]}")
    assert {one.name: (one.hint, one.default) for one in options_of(settings)[0].values()} == {
        one.name: (one.hint, one.default) for one in options_of(owner)[0].values()
    }


@pytest.mark.parametrize(
    ("config", "key", "message"),
    [
        ("quickstart", "data: {init_args: {micro_batch_size: '${name}'}}", "expected a whole number, not quickstart"),
        ("sft/quickstart", "data: {init_args: {held_out: '${name}'}}", "expected a number, not sft-quickstart"),
        ("sft/quickstart", "trainer: {max_steps: '${name}'}", "expected a whole number, not sft-quickstart"),
        ("sft/quickstart", "trainer: {max_epochs: '${seed_everything}'}", "is 0, so fit would do nothing"),
    ],
)
def test_the_value_of_a_reference_is_checked_and_shown(config: str, key: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(f"seed_everything: 0\n{key}\n")
    with pytest.raises(ValueError, match=rf"own\.yaml, line 2: [\w.]+:? {message}.* \(the value of \$\{{\w+\}}\)$"):
        check(config, "--config", str(tmp_path / "own.yaml"))


@pytest.mark.parametrize(
    "flags",
    [
        "--data.tokenizer ./nowhere --model.optimizer my.own.Optimizer",
        # Weights decide the context length.
        "--model.weights ./nowhere --data.batch_tokens 1000",
        "--data my.own.Data --data.batch_tokens 1000",
        "--model Pretraining",
    ],
)
def test_what_the_settings_alone_do_not_tell_is_checked_later(flags: str) -> None:
    check("quickstart", *flags.split())
