"""The commands in the pages are read out and checked: programs, verbs, options, configurations, files."""

from __future__ import annotations

import argparse
import importlib
import re
import tomllib
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from docs.making.pages import Command, commands, pages, read
from lightning_danube.__main__ import TRAINER_VERBS
from lightning_danube.cli.verbs import COMMANDS
from lightning_danube.yaml_files import config_file, config_names
from tests.test_configs import Instantiated

ROOT = Path(__file__).resolve().parents[2]
# The changelog tells what was, and benchmarks/README.md has its own tests.
SHOWN = [command for page in pages() if page != "CHANGELOG.md" for command in commands(page, read(page))]
MISTYPED = {"lightning-danube fit --config quickstrat"}
"""What pages show because it is refused."""
OURS = [command for command in SHOWN if command.program == "lightning-danube" and command.line not in MISTYPED]
# Files that a reader brings, or that the page has the reader write. A name that begins with my- is always one of these.
READERS = {"run.yaml", "five-sources.yaml", "other_mix.yaml", "longer.yaml", "short.yaml"}


def ids(command: Command) -> str:
    return f"{Path(command.page).stem}: {command.line[:70]}"


def test_the_pages_show_commands() -> None:
    assert len(SHOWN) > 150 and len(OURS) > 100
    typed = {"fit", "test", *COMMANDS} - {"requeue"}  # a batch script calls requeue
    assert {command.arguments[0] for command in OURS if command.arguments} >= typed


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    for command in SHOWN:
        if command.program == "make":
            asked = [word for word in command.words[1:] if re.fullmatch(r"[a-z][\w-]*", word)]
            assert set(asked) <= targets, f"{command.page}: {command.line}"


def test_extras_exist() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    asked = re.compile(r"(?:'\.|lightning-danube)\[([a-z0-9,-]+)\]'")
    found = [(page, name) for page in pages() for names in asked.findall(read(page)) for name in names.split(",")]
    assert len(found) > 5
    for page, name in found:
        assert name in extras, f"{page} asks for the extra {name!r}"


def scripts() -> list[Command]:
    return [command for command in SHOWN if command.program.startswith("python") and command.words[1].endswith(".py")]


@pytest.mark.parametrize("command", scripts(), ids=ids)
def test_a_script_exists_and_has_the_options(command: Command) -> None:
    file = ROOT / command.words[1]
    assert file.is_file()
    source = file.read_text("utf-8")
    # benchmarks share some options with a neighbour.
    source += "".join(neighbour.read_text("utf-8") for neighbour in file.parent.glob("steps.py"))
    for option in (word.partition("=")[0] for word in command.words[2:] if word.startswith("--")):
        assert f'"{option}"' in source, f"{command.page}: {file.name} has no {option}"


class Refused(Exception):
    """A parser refused a command."""


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        raise Refused(message)


def check_configs(configs: list[str]) -> None:
    for config in configs:
        in_a_run = re.fullmatch(r"runs/[\w-]+/version_\d+/config\.yaml", config)
        if not (config in READERS or config.startswith("my-") or in_a_run):
            assert config in config_names(), f"there is no configuration {config!r}"


@pytest.mark.parametrize("command", OURS, ids=ids)
def test_a_command_has_a_verb_with_these_options(command: Command) -> None:
    """Options of a configuration are checked by the test below, which reads the configuration."""
    verb, *arguments = command.arguments or ["--help"]
    if verb in TRAINER_VERBS:
        check_configs([value for option, value in pairwise(arguments) if option == "--config"])
        return
    if verb.startswith("-"):
        return
    assert verb in COMMANDS, f"there is no verb {verb!r}"
    module = importlib.import_module(f"lightning_danube.cli.verbs.{verb}")
    parser = Parser(allow_abbrev=False)
    module.add_arguments(parser)
    parsed, rest = parser.parse_known_args(arguments)
    if hasattr(parsed, "overrides"):
        assert all(word.startswith("--") for word in rest[::2]), rest
        check_configs(parsed.config or [])
    else:
        assert rest == []


@pytest.mark.parametrize(
    "line", ["generate --weight x", "generate --weights x y", "configs copy", "fit --config nowhere", "talk"]
)
def test_a_wrong_command_is_found(line: str) -> None:
    command = Command("page.md", f"lightning-danube {line}")
    if line == "configs copy":
        test_a_command_has_a_verb_with_these_options(command)  # refused by the verb itself, not by the parser
        return
    with pytest.raises((Refused, AssertionError)):
        test_a_command_has_a_verb_with_these_options(command)


def test_commands_are_read_out_of_a_page() -> None:
    text = """
# Page

```
$ python -m lightning_danube fit --config quickstart \\
    --trainer.max_steps 1   # short
some output
A=1 lightning-danube configs
```

Type `make test`, or `lightning-danube generate
--weights x`, but not `lightning-danube fit --config <the same>` and not `fit`.

```yaml
lightning-danube: no
```
"""
    found = commands("page.md", text)
    assert [command.program for command in found] == [
        "lightning-danube",
        "lightning-danube",
        "make",
        "lightning-danube",
    ]
    assert found[0].arguments == ["fit", "--config", "quickstart", "--trainer.max_steps", "1"]
    assert found[3].arguments == ["generate", "--weights", "x"]


def trainer_commands() -> list[Command]:
    unique = {
        tuple(command.arguments): command
        for command in OURS
        if command.arguments[:1] and command.arguments[0] in TRAINER_VERBS
    }
    return [
        command for command in unique.values() if "--config" in command.arguments and "--help" not in command.arguments
    ]


# What a page has the reader write, and the section of the page that has it written.
WRITTEN = {
    "docs/second-day.md": {"my-tuning.yaml", "my-continuing.yaml"},
    "docs/changed-runs.md": {"other_mix.yaml", "longer.yaml"},
    "docs/prepare.md": {"run.yaml", "five-sources.yaml"},
    "docs/pretraining.md": {"short.yaml"},
}
NOT_HERE = {
    "optimizer mine.SGD": "mine.py is the reader's; tests/training/optim has the same optimizer",
    "evaluation/paper": "the questions come from the hub",
    "logger MLFlowLogger": "needs the extra mlflow: tests/training/trackers",
    "logger WandbLogger": "needs the extra wandb: tests/training/trackers",
}
"""What a command holds → why it is not read here."""


def reason_not_here(command: Command) -> str | None:
    if set(command.arguments) & READERS or any(
        word.startswith(("my-", "runs/")) and word.endswith(".yaml") for word in command.arguments
    ):
        return "its configuration is the reader's"
    return next((why for what, why in NOT_HERE.items() if what in " ".join(command.arguments)), None)


def test_a_mistyped_command_is_shown_and_refused() -> None:
    for line in MISTYPED:
        (command,) = (command for command in SHOWN if command.line == line)
        with pytest.raises(AssertionError):
            test_a_command_has_a_verb_with_these_options(command)


def test_what_is_not_here_is_shown_by_a_page() -> None:
    shown = [" ".join(command.arguments) for command in OURS]
    assert [what for what in NOT_HERE if not any(what in line for line in shown)] == []
    written = {name for names in WRITTEN.values() for name in names}
    assert written >= READERS
    for page, names in WRITTEN.items():
        for name in names:
            assert name in read(page), f"{page} does not say what {name} is"


READ = [command for command in trainer_commands() if reason_not_here(command) is None]


def test_most_commands_are_read() -> None:
    assert len(READ) > 25


@pytest.mark.medium
@pytest.mark.parametrize("command", READ, ids=ids)
def test_a_command_of_the_trainer_is_one_that_would_begin(
    command: Command, tmp_path: Path, tiny_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The configuration is read with the options of the command, and data, model and trainer are made from it."""
    monkeypatch.chdir(tmp_path)
    configs = [value for option, value in pairwise(command.arguments) if option == "--config"]
    options = ["--trainer.accelerator", "cpu", "--runs", str(tmp_path)]
    if "    weights: " in Path(config_file(configs[0])).read_text("utf-8"):
        options += ["--model.init_args.weights", str(tiny_run)]
        if configs[0].startswith("pretrain/"):
            options += ["--data.init_args.context_length", "32"]
    arguments = [config_file(word) if word in configs else word for word in command.arguments]
    if "--ckpt_path" in arguments:  # the run that it names is not here, and a test needs one
        place = arguments.index("--ckpt_path")
        arguments = ["fit", *arguments[1:place], *arguments[place + 2 :]]
    with torch.device("meta"):
        cli = Instantiated([*arguments, *options])
    assert cli.trainer is not None and cli.model is not None
