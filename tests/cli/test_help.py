"""`fit --help`: what a person reads who wants to change a run."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_danube.__main__ import main
from lightning_danube.cli.command_line import LINKED
from lightning_danube.cli.help import help_of
from lightning_danube.cli.options import options_of
from lightning_danube.yaml_files import config_names, description

RUNS = [name for name in config_names() if not name.startswith("studies/")]


@pytest.mark.parametrize("name", RUNS)
def test_the_options_of_the_model_and_the_data_come_first(name: str) -> None:
    said = help_of("fit", ["--config", name, "--help"])
    sections = re.findall(r"^(\w+)[:, ].*$", said, re.MULTILINE)
    assert [one for one in sections if one in ("data", "model", "callbacks", "trainer")][:2] == ["data", "model"]
    assert said.index("\ndata: ") < said.index("\nmodel: ") < said.index("\nrun\n") < said.index("\ntrainer, ")
    assert description(name) in said
    assert all(len(line) <= 140 for line in said.splitlines())
    assert len(said.splitlines()) < 150


def test_values_types_and_explanations_are_told(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["fit", "--config", "quickstart", "--help", "--data.held_out", "0.05", "--runs", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert re.search(r"--data.context_length INT +tokens a training row predicts \(256\)", said)
    assert re.search(r"--data.held_out NUMBER[^-]*\(0\.05\)", said)
    assert re.search(r"--data.seed INT +of the order of rows \(1\)", said)  # ${seed_everything}, resolved
    assert re.search(r"--model.optimizer Muon", said) and re.search(
        r"--model.optimizer.momentum NUMBER .*\(0.95\)", said
    )
    assert re.search(r"--model.decoder.num_hidden_layers INT +\(3\)", said)
    assert re.search(r"Checkpoints +every_n_steps 200, keep 2", said)
    assert "--model.vocab_size" not in said  # follows from the data
    assert not list(tmp_path.iterdir())


def test_every_option_of_the_classes_is_told() -> None:
    from lightning_danube.pretraining import CurriculumData, Pretraining

    said = help_of("fit", ["--config", "quickstart"])
    for section, owner in (("data", CurriculumData), ("model", Pretraining)):
        for option in options_of(owner)[0].keys() - LINKED.keys():
            assert f"--{section}.{option} " in said


def test_without_a_config_the_help_says_how_to_get_the_rest_and_loads_nothing() -> None:
    code = (
        "import sys; from lightning_danube.__main__ import main; main(['fit', '--help']);"
        "print(sorted({'torch', 'lightning', 'jsonargparse'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    assert "fit --config quickstart --help" in done.stdout and "--ckpt_path last|FILE" in done.stdout
    assert len(done.stdout.splitlines()) < 30
