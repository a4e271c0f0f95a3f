"""Missing files are refused before PyTorch is imported, in a line that names the place and what helps."""

import re
from pathlib import Path

import pytest

from lightning_danube.cli.command_line import Stated, read_command_line, with_config_paths
from lightning_danube.cli.named_files import check_files
from lightning_danube.terminal import as_typed
from lightning_danube.yaml_files import config_file


@pytest.fixture(autouse=True)
def _in_an_empty_directory(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file with a similar name would be suggested."""
    monkeypatch.chdir(tmp_path_factory.mktemp("empty"))


def stated(*arguments: str) -> Stated:
    return read_command_line(with_config_paths(arguments))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data.init_args.sources.web.path", "nowhere.jsonl"], "--data.init_args.sources.web.path: there is no file"),
        (["--data.init_args.sources", "{mine: {path: ./nowhere}}"], "--data.init_args.sources: there is no file ./now"),
        (["--data.init_args.train", "nowhere.csv.gz"], "--data.init_args.train: there is no file nowhere.csv.gz"),
    ],
)
def test_a_missing_file_is_found_early(flags: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        check_files(stated("--config", "quickstart", *flags), "fit")


def test_a_pattern_without_files_is_found_early(tmp_path: Path) -> None:
    path = tmp_path / "[a]" / "*" / "*.jsonl"  # the directory is a name, not a pattern
    flags = ["--config", "quickstart", "--data.init_args.sources.web.path", str(path)]
    (tmp_path / "[a]" / "b").mkdir(parents=True)
    with pytest.raises(
        ValueError, match=rf"^--data\.init_args\.sources\.web\.path: there is no file {re.escape(str(path))}"
    ):
        check_files(stated(*flags), "fit")
    (tmp_path / "[a]" / "b" / "c.jsonl").touch()
    check_files(stated(*flags), "fit")


def test_a_missing_text_of_a_quantization_is_found_early() -> None:
    flags = ["--model.init_args.weights=smollm2", "--data.init_args.text.path=./nowhere.txt"]
    missing = stated("--config", "quantization/quickstart", *flags)
    with pytest.raises(ValueError, match=r"^--data\.init_args\.text\.path: there is no file \./nowhere\.txt$"):
        check_files(missing, "test")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("last", "there is no checkpoint under {runs}/quickstart to resume from: leave out --ckpt_path last to begin"),
        ("nowhere.ckpt", "--ckpt_path nowhere.ckpt: there is no such file"),
    ],
)
def test_a_missing_checkpoint_is_found_early(value: str, message: str, tmp_path: Path) -> None:
    flags = ["--config", "quickstart", "--ckpt_path", value, "--runs"]
    with pytest.raises(ValueError, match=f"^{re.escape(message.format(runs=tmp_path))}"):
        check_files(stated(*flags, str(tmp_path)), "fit")
    checkpoints = tmp_path / "quickstart" / "version_0" / "checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints / "step_1.ckpt").touch()
    if value == "last":
        check_files(stated(*flags, str(tmp_path)), "fit")


@pytest.mark.parametrize("value", ["last-or-new", "s3://bucket/run.ckpt", "${name}.ckpt"])
def test_a_checkpoint_that_may_be_absent_is_left_to_the_run(value: str, tmp_path: Path) -> None:
    check_files(stated("--config", "quickstart", "--ckpt_path", value, "--runs", str(tmp_path)), "fit")


def test_a_missing_file_of_a_configuration_is_named_with_its_line() -> None:
    with pytest.raises(ValueError, match=r"smollm2-lora\.yaml, line \d+: data\.sources\.conversations\.path: there is"):
        check_files(stated("--config", "sft/smollm2-lora"), "fit")


@pytest.mark.parametrize(
    "path",
    [
        "documentation:web",
        "owner/name",
        "s3://bucket/texts.jsonl",
        "tokens.ds",
        "${name}.jsonl",
        ".",
    ],
)
def test_what_may_be_no_file_is_left_to_the_data(path: str) -> None:
    check_files(stated("--config", "quickstart", "--data.init_args.sources.web.path", path), "fit")


@pytest.mark.parametrize("verb", ["fit", "test"])
@pytest.mark.parametrize("option", ["--data.init_args.tokenizer", "--model.init_args.weights"])
def test_missing_weights_and_tokenizers_are_found_early(option: str, verb: str, tmp_path: Path) -> None:
    (tmp_path / "version_0").mkdir()
    arguments = ["--config", "sft/quickstart", f"{option}={tmp_path}/version_1"]
    if "tokenizer" in option:
        arguments.append(f"--model.init_args.weights={tmp_path}/version_0")
    else:
        arguments.append("--data.init_args.tokenizer=mistral")
    meant = f"there is no file or directory {tmp_path}/version_1 (did you mean {tmp_path}/version_0?)"
    with pytest.raises(ValueError, match=f"^{re.escape(f'{option}: {meant}')}"):
        check_files(stated(*arguments), verb)


def test_what_a_verb_does_not_read_may_be_missing() -> None:
    texts = ["--config", "classification/quickstart", "--model.weights=smollm2", "--data.train=nowhere.jsonl"]
    check_files(stated(*texts, "--data.predict=texts:mine"), "predict")
    with pytest.raises(ValueError, match=r"^--data\.train: there is no file nowhere\.jsonl$"):
        check_files(stated(*texts), "predict")
    check_files(stated(*texts[:3], "--data.predict=nowhere.jsonl"), "fit")
    benchmarks = stated("--config", "quickstart", "--data.decontaminate", "[nowhere.jsonl]")
    check_files(benchmarks, "tokenizer")
    with pytest.raises(ValueError, match=r"^--data\.decontaminate: there is no file nowhere\.jsonl$"):
        check_files(benchmarks, "prepare")


@pytest.mark.parametrize(
    ("config", "flag", "value", "verb"),
    [
        ("classification/quickstart", "--data.train", "{path: nowhere.jsonl}", "fit"),
        ("classification/quickstart", "--data.train", "nowhere.jsonl", "inspect"),
        ("classification/quickstart", "--data.validation", "nowhere.jsonl", "fit"),
        ("classification/quickstart", "--data.test", "nowhere.jsonl", "validate"),
        ("classification/quickstart", "--data.predict", "nowhere.jsonl", "predict"),
        ("classification/quickstart", "--data.predict", "nowhere.jsonl", "inspect"),
        ("quickstart", "--data.sources.web.path", "nowhere.jsonl", "prepare"),
        ("quickstart", "--data.sources.web.path", "nowhere.jsonl", "validate"),
        ("evaluation/quickstart", "--data.mt_bench", "{path: nowhere.jsonl}", "test"),
        ("evaluation/chat", "--data.mt_bench.path", "nowhere.jsonl", "test"),
        ("evaluation/quickstart", "--data.wildbench", "{path: nowhere.jsonl}", "test"),
        ("evaluation/quickstart", "--data.retrieval.path", "nowhere.jsonl", "test"),
        ("evaluation/quickstart", "--data.retrieval.corpus", "nowhere.jsonl", "inspect"),
        ("evaluation/quickstart", "--data.texts.web.path", "nowhere.jsonl", "test"),
        ("evaluation/quickstart", "--data.needle.haystack.path", "nowhere.jsonl", "test"),
    ],
)
def test_every_file_of_the_data_is_looked_for(config: str, flag: str, value: str, verb: str) -> None:
    missing = stated("--config", config, "--model.weights=owner/name", flag, value)
    with pytest.raises(ValueError, match=f"^{re.escape(flag)}: there is no file nowhere.jsonl$"):
        check_files(missing, verb)


def test_references_are_told_from_answers() -> None:
    given = ["{path: owner/name, references: nowhere.jsonl}", "--model.weights=owner/name"]
    with pytest.raises(ValueError, match=r"^--data\.mt_bench: there is no file nowhere\.jsonl$"):
        check_files(stated("--config", "evaluation/quickstart", "--data.mt_bench", *given), "test")


@pytest.mark.parametrize("verb", ["inspect", "fit"])
@pytest.mark.parametrize("config", ["sft/quickstart", "dpo/quickstart", "classification/quickstart"])
def test_a_missing_run_is_named_with_its_line_and_the_command_that_makes_it(
    config: str, verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tokenizer is a reference to the weights: the line of the weights counts."""
    monkeypatch.chdir(tmp_path)
    file = Path(config_file(config))
    (weights,) = re.findall(r"^    weights: (.*)$", file.read_text("utf-8"), re.MULTILINE)
    line = file.read_text("utf-8").splitlines().index(f"    weights: {weights}") + 1
    makes = {"runs/quickstart/version_0": "quickstart", "runs/sft-quickstart/version_0": "sft/quickstart"}[weights]
    message = (
        f"{file}, line {line}: model.weights: there is no file or directory {weights} "
        f"(`{as_typed()} fit --config {makes}` makes one)"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check_files(stated("--config", config), verb)
    (tmp_path / weights).mkdir(parents=True)
    check_files(stated("--config", config), verb)


def test_a_verb_that_reads_only_the_data_needs_no_weights() -> None:
    own = ["--config", "sft/quickstart", "--data.tokenizer", "mistral", "--ckpt_path", "nowhere.ckpt"]
    check_files(stated(*own), "inspect")
    # Pre-training that begins with weights takes from them what the data leave open.
    continued = ["--config", "pretrain/continue-danube3-500m", "--model.weights=./nowhere"]
    with pytest.raises(ValueError, match=r"^--model\.weights: there is no file or directory \./nowhere$"):
        check_files(stated(*continued), "inspect")
    check_files(stated(*continued, "--data.tokenizer=mistral", "--data.context_length=256"), "inspect")


def test_the_files_of_a_class_of_another_package_are_left_to_it(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("data: {class_path: mine.Texts, init_args: {train: made/later.csv}}")
    check_files(stated("--config", str(own)), "fit")
    with pytest.raises(ValueError, match=r"^--data\.tokenizer: there is no file or directory \./nowhere$"):
        check_files(stated("--config", str(own), "--data.tokenizer=./nowhere"), "fit")


def test_references_in_a_circle_are_left_to_the_parser() -> None:
    check_files(stated("--config", "sft/quickstart", "--model.weights=${data.tokenizer}"), "fit")
