"""Options that are read from the source are those of the imported classes, and refuse nothing that those take."""

import dataclasses
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch import LightningDataModule

from lightning_danube.cli.command_line import (
    FACTS_OF_DATA,
    check_command_line,
)
from lightning_danube.cli.configs import open_classes
from lightning_danube.cli.options import Reader, Refusal, options_of
from lightning_danube.cli.source import OPEN, SourceReader, class_as_written

CONFIGS = sorted((Path(__file__).parents[2] / "lightning_danube" / "configs").rglob("*.yaml"))
CLASSES = sorted({path for one in CONFIGS for path in re.findall(r"class_path: ([\w.]+)", one.read_text("utf-8"))})
WRONG: list[Any] = ["5x", 0.5, -1, None, True, [1], {"nothing": 1}, "lightning_danube.training.optim.Muon"]


def imported(class_path: str) -> type:
    module, _, name = class_path.rpartition(".")
    found: type = getattr(import_module(module), name)
    return found


@pytest.mark.parametrize("class_path", CLASSES)
def test_the_options_are_those_of_the_imported_class(class_path: str) -> None:
    written, real = class_as_written(class_path), options_of(imported(class_path))
    if written is None:
        assert real[1] or class_path == "lightning_danube.callbacks.TrainingOverlap"  # its constructor is Lightning's
        return
    assert {one.name for one in dataclasses.fields(written)} == set(real[0]) and not real[1]


def sections(config: dict[str, Any]) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    for name in ("data", "model"):
        if name in config:
            yield (name,), config[name]
    for number, one in enumerate(config.get("trainer", {}).get("callbacks", ())):
        yield ("trainer", "callbacks", str(number)), one


def refused(reader: Reader, owner: type, section: dict[str, Any], path: tuple[str, ...]) -> str:
    try:
        reader.class_options(owner, section, path)
    except Refusal as refusal:
        return f"{'.'.join(refusal.path)}: {refusal}"
    return ""


@pytest.mark.parametrize("file", CONFIGS, ids=lambda path: path.stem)
def test_it_refuses_only_what_the_imported_class_refuses(file: Path) -> None:
    """Each option of each shipped configuration gets wrong values, at both levels."""
    early, late = SourceReader(taken=FACTS_OF_DATA), Reader(taken=FACTS_OF_DATA, check=True, open_to=open_classes())
    for path, section in sections(yaml.safe_load(file.read_text("utf-8"))):
        section = {"class_path": section} if isinstance(section, str) else section
        written, real = class_as_written(section["class_path"]), imported(section["class_path"])
        if written is None:
            continue
        given = section.get("init_args") or {}
        assert refused(early, written, section, path) == ""
        for key, value in given.items():
            others = (
                [*WRONG, *({**value, inner: wrong} for inner in value for wrong in WRONG)]
                if isinstance(value, dict)
                else WRONG
            )
            for other in others:
                changed = {**section, "init_args": {**given, key: other}}
                said = refused(early, written, changed, path)
                assert said in ("", refused(late, real, changed, path))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--data.init_args.context_lenght 5", "is not an option of CurriculumData: did you mean 'context_length'?"),
        ("--data.init_args.context_length 5x", "context_length: expected a whole number, not 5x"),
        ("--model.init_args.decoder.hiden_size 5", "is not an option of DecoderShape: did you mean 'hidden_size'?"),
        (
            "--model.init_args.learning_rate.warmup 5x",
            "--model.init_args.learning_rate.warmup is '5x': give tokens such as",
        ),
        ("--model.learning_rate.warmup 105%", "--model.learning_rate.warmup is '105%', more than the whole run"),
        ("--data.init_args.stages [{name:,tokens:0,mix:{}}]", "--data.init_args.stages: data.stages.0"),
        ("--data.init_args.sources.web.typ 3", "'typ' is not an option of Source"),
        ("--data.init_args.sources.web.max_tokens 5x", "--data.init_args.sources.web.max_tokens is '5x': give a"),
        ("--data.filters.min_words -1", "--data.filters.min_words is -1, max_words 100000: give 0 or more"),
        (
            "--model.decoder.hidden_size 100",
            "--model.decoder.hidden_size 100 and num_attention_heads 4 make a head_dim of 25, which is odd;",
        ),
        (
            "--model.decoder.hidden_size 130",
            "--model.decoder.hidden_size 130 is not a multiple of num_attention_heads 4;",
        ),
        ("--model.decoder.num_key_value_heads 3", "num_key_value_heads 3 does not divide num_attention_heads 4; these"),
        ("--model.decoder.num_hidden_layers 0", "--model.decoder.num_hidden_layers is 0; it has to be above 0"),
        ("--model.decoder.rope_scaling.factor 0", "rope_scaling.factor is 0.0; it has to be a number above 0"),
        ("--model.lora.rank 0", "--model.lora.rank: lora has rank 0, alpha 32, dropout 0.05: rank at least 1"),
    ],
)
def test_a_command_line_is_checked(flags: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        check_command_line(["--config", "quickstart", *flags.split()])


@pytest.mark.medium
def test_a_list_of_callbacks_may_name_each_without_its_module(tmp_path: Path) -> None:
    """A subprocess: this one has imported the callbacks."""
    (tmp_path / "short.yaml").write_text("trainer: {callbacks: [{class_path: Checkpoints, init_args: {keep: 5}}]}")
    command = [sys.executable, "-m", "lightning_danube", "fit", "--config", "quickstart", "--config", "short.yaml"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([*command, "--print_config"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "keep: 5" in done.stdout


def test_a_verb_that_reads_the_data_needs_no_options_of_the_model(tmp_path: Path) -> None:
    config = tmp_path / "data.yaml"
    config.write_text("model: {class_path: lightning_danube.pretraining.Pretraining}")
    check_command_line(["--config", str(config)])


def test_a_class_of_another_package_is_left_to_the_reader() -> None:
    assert class_as_written("lightning.pytorch.callbacks.RichProgressBar") is None
    assert class_as_written("lightning_danube.callbacks.Nothing") is None
    assert class_as_written("lightning_danube.nowhere.Nothing") is None


def test_nothing_large_is_imported() -> None:
    """A subprocess: this one has imported everything."""
    code = (
        "import sys; from lightning_danube.cli.command_line import check_command_line as check;"
        "check(['--config', 'quickstart']); print(*({'torch', 'lightning', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


OWN = "your own subclass of AdamW by its class path (docs/pretraining.md, An optimizer or a schedule of your own)"


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--model.optimizer=Muonn", f"--model.optimizer: expected AdamW or Muon, or {OWN}, not Muonn"),
        (
            "--model.optimizer.class_path=lightning_danube.training.optim.Muno",
            "--model.optimizer.class_path: there is no class 'Muno' in lightning_danube.training.optim: did you mean "
            "lightning_danube.training.optim.Muon?",
        ),
        ("--model.optimizer.init_args.pekk=3", "'pekk' is not an option of Muon: did you mean 'peak'?"),
        (
            "--data=lightning_danube.pretraining.CurriculumDta",
            "--data: there is no class 'CurriculumDta' in lightning_danube.pretraining: did you mean "
            "lightning_danube.pretraining.CurriculumData?",
        ),
        (
            "--data.class_path=lightning_danube.pretrainin.CurriculumData",
            "--data.class_path: there is no module lightning_danube.pretrainin: did you mean "
            "'lightning_danube.pretraining'?",
        ),
        (
            "--data=CurriculumDta",
            "--data: there is no LightningDataModule called 'CurriculumDta': did you mean "
            "lightning_danube.pretraining.CurriculumData?",
        ),
        (
            "--model=Pretrainin",
            "--model: there is no LightningModule called 'Pretrainin': did you mean "
            "lightning_danube.pretraining.Pretraining?",
        ),
        (
            "--trainer.callbacks+=Progres",
            "--trainer.callbacks+: trainer.callbacks.7: there is no Callback called 'Progres': did you mean Progress?",
        ),
        (
            "--trainer.logger=WandbLoggr",
            "--trainer.logger: trainer.logger.0: there is no Logger called 'WandbLoggr': did you mean WandbLogger?",
        ),
        (
            "--trainer.callbacks=lightning_danube.callbacks.Progres",
            "--trainer.callbacks: trainer.callbacks.0: there is no class 'Progres' in lightning_danube.callbacks: did "
            "you mean lightning_danube.callbacks.Progress?",
        ),
    ],
)
@pytest.mark.parametrize("imported", [True, False])
def test_a_misspelt_class_is_found_early(
    flag: str, message: str, imported: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not imported:  # as in a command: then the names of Lightning's classes come from its source
        monkeypatch.delitem(sys.modules, "lightning.pytorch")
    with pytest.raises(ValueError, match=re.escape(message)):
        check_command_line(["--config", "quickstart", flag])


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        (
            "--trainer.logger=[CSVLogger, MLFlowLoger]",
            "--trainer.logger: trainer.logger.1: there is no Logger called 'MLFlowLoger': did you mean MLFlowLogger?",
        ),
        (
            "--trainer.logger=[{class_path: CSVLoger}]",
            "--trainer.logger: trainer.logger.0: there is no Logger called 'CSVLoger': did you mean CSVLogger?",
        ),
        (
            "--trainer.callbacks=[Progres]",
            "--trainer.callbacks: trainer.callbacks.0: there is no Callback called 'Progres': did you mean Progress?",
        ),
        (
            "--trainer.callbacks+={class_path: lightning_danube.callbacks.Checkpoints, init_args: {keeep: 3}}",
            "--trainer.callbacks+: trainer.callbacks.7: 'keeep' is not an option of Checkpoints: did you mean 'keep'?",
        ),
        (
            "--trainer.callbacks=[{class_path: Checkpoints, init_args: {keeep: 3}}]",
            "--trainer.callbacks: trainer.callbacks.0: 'keeep' is not an option of Checkpoints: did you mean 'keep'?",
        ),
        (
            "--model={class_path: lightning_danube.pretraining.Pretrainin}",
            "--model: there is no class 'Pretrainin' in lightning_danube.pretraining: did you mean",
        ),
    ],
)
def test_a_misspelt_class_in_a_typed_list_or_mapping_is_found_early(flag: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        check_command_line(["--config", "quickstart", flag])


class UsersDataModules(LightningDataModule):
    """A class that a program defines beside its call of `fit`."""


@pytest.mark.parametrize(
    "flag",
    [
        "--model.optimizer=Muon",
        "--model.optimizer=AdamW",
        "--model.optimizer=my.own.Optimizer",
        "--model.optimizer=lightning_danube.training.optim.muon.Muon",
        "--data=CurriculumData",
        "--data=UsersDataModules",
        "--data=my.own.CurriculumDta",
        "--data=lightning_danube.pretraining.data.CurriculumData",
        "--trainer.callbacks+=Progress",
        "--trainer.callbacks+=ModelCheckpoint",  # nearly `Checkpoints`, but Lightning's
        "--trainer.logger=CSVLogger",
        "--trainer.logger=false",
        "--trainer.logger=[TensorBoardLogger, MLFlowLogger]",
        "--trainer.logger=[my.own.Logger, {class_path: CSVLogger, init_args: {save_dir: logs}}]",
        "--trainer.logger=true",
        "--trainer.callbacks=null",
        "--trainer.callbacks=[]",
    ],
)
def test_a_class_that_may_exist_passes(flag: str) -> None:
    check_command_line(["--config", "quickstart", flag])


def test_the_open_classes_are_those_of_the_reader() -> None:
    assert tuple(one.__name__ for one in open_classes()) == OPEN
