"""What a command line may import before it does its work. Heavy libraries take seconds."""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from lightning_danube.__main__ import TRAINER_VERBS, check_text
from lightning_danube.cli.verbs import COMMANDS

ROOT = Path(__file__).resolve().parents[1]

HEAVY = (
    *("torch", "lightning", "torchmetrics", "transformers", "tokenizers", "datasets", "peft", "bitsandbytes"),
    *("tensorboard", "matplotlib", "scipy", "sklearn", "pandas", "pyarrow", "numpy", "jsonargparse", "optuna"),
    *("lm_eval", "hqq", "llama_cpp", "gguf", "datatrove", "huggingface_hub", "safetensors", "omegaconf", "yaml"),
)


LIGHT = {"yaml", "omegaconf", "numpy"}
"""Read configurations, and load in a tenth of a second."""


def imported_by(*commands: Sequence[str]) -> dict[str, set[str]]:
    """Runs command lines one after the other in one process. Returns for each the heavy libraries that it is the first
    to import, if there are any."""
    code = (
        "import json, sys\nfrom lightning_danube.__main__ import main\nfound = []\n"
        "for args in json.loads(sys.argv[1]):\n    try:\n        main(args)\n    except SystemExit:\n        pass\n"
        "    found.append([*sys.modules])\nprint()\nprint(json.dumps(found))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(commands)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    after = [{*HEAVY} & {*modules} for modules in json.loads(done.stdout.splitlines()[-1])]
    assert len(after) == len(commands)
    first = [now - before for before, now in zip([set(), *after], after, strict=False)]
    return {" ".join(command): names for command, names in zip(commands, first, strict=True) if names}


def heavier_than(allowed: set[str], *commands: Sequence[str]) -> dict[str, set[str]]:
    """As `imported_by`, without the libraries that are allowed."""
    return {command: names - allowed for command, names in imported_by(*commands).items() if names - allowed}


def test_help_imports_nothing_heavy() -> None:
    assert not imported_by(["--help"], ["--version"], ["fti"], *([verb, "--help"] for verb in COMMANDS))


@pytest.mark.parametrize(
    "mistake",
    [
        ["--config", "quickstrat"],
        ["--config", "quickstart", "--trainerr.max_steps", "3"],
        ["--config", "quickstart", "--model.init_args.vocab_size", "3"],
        ["--config", "quickstart", "--model.init_args.optimizer", "Muonn"],
        ["--config", "quickstart", "--data.class_path", "lightning_danube.pretraining.CurriculumDta"],
        ["--config", "quickstart", "--trainer.callbacks+=Progres"],
    ],
)
def test_a_typing_error_is_found_before_anything_heavy_is_imported(mistake: list[str]) -> None:
    assert not heavier_than(LIGHT, *([verb, *mistake] for verb in [*TRAINER_VERBS, "plan", "prepare", "inspect"]))


def test_a_wrong_number_is_found_before_anything_heavy_is_imported() -> None:
    # The small tokenizer gives the size of the vocabulary. It loads in milliseconds.
    assert not heavier_than(
        LIGHT | {"tokenizers"},
        *(
            ["fit", "--config", "quickstart", *mistake]
            for mistake in (
                ["--model.init_args.decoder.hidden_size", "100"],
                ["--data.init_args.batch_tokens", "1000"],
                ["--trainer.logger", "[CSVLogger, MLFlowLoger]"],
            )
        ),
    )


def test_a_wrong_setting_of_every_task_is_found_before_anything_heavy_is_imported(tmp_path: Path) -> None:
    mistakes = (
        ("fit", "sft/quickstart", "--data.batch_rows", "0"),
        ("validate", "dpo/quickstart", "--model.beta", "0"),
        ("predict", "classification/quickstart", "--model.head_learning_rate", "0"),
        ("test", "quantization/quickstart", "--model.levels", "[gguf:Q4_K_X]"),
        ("test", "evaluation/quickstart", "--data.needle.trials", "0"),
        ("fit", "sft/quickstart", "--trainer.gradient_clip_val", "-1"),
        ("fit", "sft/quickstart", "--trainer.max_steps", "0"),
    )
    exists = f"--model.weights={tmp_path}"
    assert not heavier_than(
        LIGHT, *([verb, "--config", config, exists, *mistake] for verb, config, *mistake in mistakes)
    )


def test_a_missing_file_is_found_before_anything_heavy_is_imported() -> None:
    missing = ["--config", "quickstart", "--data.init_args.sources.web.path", "nowhere.jsonl"]
    assert not heavier_than(LIGHT, *([verb, *missing] for verb in ("fit", "prepare", "inspect")))
    # The verb `tokenizer` offers the engines of the package tokenizers.
    assert not heavier_than(LIGHT | {"tokenizers"}, ["tokenizer", "--out", "x", *missing])


def test_inspect_refuses_wrong_data_before_anything_heavy_is_imported() -> None:
    config = ["inspect", "--config", "classification/quickstart", "--data.tokenizer", "danube-small"]
    wrong = (["--data.batch_texts", "0"], ["--data.tokenizer", "runs/none/version_0"])
    assert not heavier_than(LIGHT | {"tokenizers"}, *([*config, *one] for one in wrong))


def test_generate_reads_its_options_before_it_loads_torch() -> None:
    nothing_to_continue = ["generate", "--weights", "there"]
    assert not imported_by([*nothing_to_continue, "--promt", "x"], nothing_to_continue)


def test_a_missing_model_is_refused_before_anything_heavy_is_imported() -> None:
    commands = (
        ["export", "--format", "hf", "--out", "model"],
        ["export", "--format", "gguf", "--out", "model.gguf"],
        ["export", "--format", "peft", "--out", "model"],
        ["generate", "--prompt", "x"],
        ["chat"],
    )
    assert not heavier_than({"yaml", "numpy"}, *([*command, "--weights", "runs/none"] for command in commands))


@pytest.mark.medium
def test_a_generation_needs_no_lightning(tmp_path: Path) -> None:
    """Weights that are missing: the loader is imported, the trainer's libraries are not."""
    found = imported_by(["generate", "--weights", str(tmp_path / "nothing"), "--prompt", "x"])
    heavy = {"lightning", "torchmetrics", "datasets", "peft", "scipy", "sklearn", "matplotlib", "pandas"}
    assert not heavy & set().union(*found.values())


def test_the_test_sees_what_is_imported() -> None:
    command = ["fit", "--config", "quickstart", "--name", "{a: 1, a: 2}"]
    assert "yaml" in imported_by(["--version"], command, command)[" ".join(command)]


def test_pythons_parser_still_lists_its_options_in_a_private_attribute() -> None:
    assert "--help" in argparse.ArgumentParser()._option_string_actions


def test_an_argument_that_is_no_text_is_named() -> None:
    check_text(["fit", "--name", "ü"])
    with pytest.raises(ValueError, match=r"^argument 3 \(\\udcff\) is not text in utf-8: give it in UTF-8$"):
        check_text(["fit", "--name", os.fsdecode(b"\xff")])


@pytest.mark.medium
def test_a_locale_without_the_letters_prints_their_numbers() -> None:
    """And an argument that the locale cannot read is an error in one line."""
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(ROOT)}
    args = [sys.executable, "-m", "lightning_danube", "plan", "--config", "quickstart"]
    shown = subprocess.run(args, capture_output=True, env={**os.environ, **locale}, check=True).stdout
    assert b"\\xd7" in shown and shown.isascii()
    refused = subprocess.run([*args, "--name", "ü"], capture_output=True, env={**os.environ, **locale}, check=False)
    assert refused.returncode == 2 and refused.stderr.startswith(
        b"error: argument 5 (\\udcc3\\udcbc) is not text in ascii"
    )


@pytest.mark.medium
def test_an_odd_environment_changes_nothing_of_what_is_printed() -> None:
    """Without assertions and docstrings, without any variable, on terminals of a wrong width, without a HOME."""
    usual = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    shown = set()
    for flags, environment in (
        ([], usual),
        (["-O"], usual),
        (["-OO"], usual),
        ([], {}),
        ([], usual | {"HOME": "/proc"}),
        *(([], usual | {"COLUMNS": columns, "TERM": "dumb"}) for columns in ("20", "1", "0", "-5", "x")),
    ):
        args = [sys.executable, *flags, "-m", "lightning_danube", "configs"]
        done = subprocess.run(args, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
        assert done.returncode == 0 and not done.stderr, (flags, environment, done.stderr)
        shown.add(done.stdout)
    assert len(shown) == 1 and "quickstart" in shown.pop()
