"""What a person reads when a command line or a config is wrong: one line, exit code 2, no traceback."""

import copy
import importlib.util
import inspect
import json
import mmap
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import time
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from jsonargparse import Namespace
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.plugins import AsyncCheckpointIO, MixedPrecision
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy
from tokenizers import normalizers

import lightning_danube.__main__ as program
from lightning_danube.__main__ import main, user_message
from lightning_danube.chat import ChatData
from lightning_danube.checkpoints.runs import LOCK
from lightning_danube.checkpoints.single import DurableCheckpointIO
from lightning_danube.cli import trainer_verbs
from lightning_danube.cli.configs import resolved_config
from lightning_danube.cli.verbs import COMMANDS
from lightning_danube.files import locked


def error_of(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """The one line that a wrong command line prints."""
    assert main(list(args)) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "trainer: {max_epoch: 3}",
            "bad.yaml, line 1: 'max_epoch' is not an option of Trainer: did you mean 'max_epochs'?",
        ),
        (
            "trainer: {max_epochs: abc}",
            "bad.yaml, line 1: trainer.max_epochs: expected a whole number or null, not abc",
        ),
        (
            "trainer: {callbacks: [{class_path: lightning_danube.callbacks.Checkpoints, init_args: {every: 3}}]}",
            "trainer.callbacks.0: 'every' is not an option of Checkpoints: did you mean 'save_every'?",
        ),
        (
            "trainer: {callbacks: [{class_path: lightning_danube.callbacks.Checkpoint}]}",
            "there is no class 'Checkpoint' in lightning_danube.callbacks: did you mean "
            "lightning_danube.callbacks.Checkpoints?",
        ),
        (
            "trainer: {callbacks: [{class_path: nothing.Checkpoint}]}",
            "the class 'nothing.Checkpoint' cannot be imported (No module named 'nothing')",
        ),
        (
            "model: {init_args: {decoder: {hiden_size: 3}}}",
            "line 1: model.decoder: 'hiden_size' is not an option of DecoderShape: did you mean 'hidden_size'",
        ),
        (
            "model:\n  init_args:\n    learning_rat: {peak: 1.0e-3}",
            "line 3: model: 'learning_rat' is not an option of Pretraining: did you mean 'learning_rate'?",
        ),
        (
            "model: {init_args: {learning_rate: {peek: 1.0e-3}}}",
            "line 1: model.learning_rate: 'peek' is not an option of LearningRate: did you mean 'peak'?",
        ),
        (
            "model: {init_args: {optimizer: {bettas: [0.9, 0.9]}}}",
            "line 1: model.optimizer: 'bettas' is not an option of AdamW: did you mean 'betas'?",
        ),
        (
            "model: {init_args: {optimizer: {class_path: Muon, init_args: {peek: 0.1}}}}",
            "line 1: model.optimizer: 'peek' is not an option of Muon: did you mean 'peak'?",
        ),
        (
            "model: {init_args: {optimizer: {class_path: Muon, init_args: {momentum: 1.0}}}}",
            "optimizer.momentum is 1.0: give a number from 0 to below 1, such as 0.95",
        ),
        (
            "model: {init_args: {optimizer: {class_path: lightning_danube.training.optim.Muno}}}",
            "there is no class 'Muno' in lightning_danube.training.optim: did you mean "
            "lightning_danube.training.optim.Muon?",
        ),
        (
            "model: {init_args: {decoder: {hidden_size: x}}}",
            "model.decoder.hidden_size: expected a whole number, not x",
        ),
        (
            "model: {init_args: {decoder: {vocab_size: 5}}}",
            "'vocab_size' is taken from data.tokenizer: leave it out here",
        ),
        (
            "model: {init_args: {decoder: {max_position_embeddings: 5}}}",
            "'max_position_embeddings' is taken from data.context_length: leave it out here",
        ),
        (
            "model: {init_args: {total_tokens: 5}}",
            "bad.yaml, line 1: model.init_args.total_tokens is taken from data.stages: leave it out here",
        ),
        (
            "model: {init_args: {learning_rate: {shape: exponential}}}",
            "bad.yaml, line 1: model.learning_rate.shape is 'exponential': choose cosine, linear or wsd, or name your",
        ),
        (
            "model: {init_args: {decoder: danube3-500M}}",
            "no preset is called 'danube3-500M'; did you mean danube3-500m?",
        ),
        (
            "model: {init_args: {decoder: {num_key_value_heads: 3}}}",
            "num_key_value_heads 3 does not divide num_attention_heads 4; these do: 1, 2, 4",
        ),
        (
            "model: {init_args: {learning_rate: {warmup: 10M}}}",
            "bad.yaml, line 1: model.learning_rate.warmup is 10M, and the whole run has 6,656 tokens: give a share of "
            "the run, such as '5 %', or at most 6656",
        ),
        (
            "data: {init_args: {context_lenght: 64}}",
            "'context_lenght' is not an option of CurriculumData: did you mean 'context_length'?",
        ),
        ("data: {init_args: {context_length: [1]}}", "data.context_length: expected a whole number, not [1]"),
        ("data: {init_args: {context_length: 0}}", "data.context_length is 0: it must be at least 1"),
        (
            "data: {init_args: {batch_tokens: 250}}",
            "data.batch_tokens is 250, not a multiple of data.context_length (32): 256 would be",
        ),
        (
            "data: {init_args: {micro_batch_size: 3}}",
            "a step of 8 rows (data.batch_tokens / data.context_length) does not divide into 1 device × "
            "micro-batch of 3 rows: data.micro_batch_size = 1, 2, 4 or 8 would",
        ),
        ("data: {init_args: {held_out: 1.5}}", "data.held_out is 1.5: give a share between 0 and 1"),
        (
            "data: {init_args: {held_out: 0.00001}}",
            "source 'web' has 300 documents, none of them held out: raise data.held_out",
        ),
        (
            "data: {init_args: {max_epochs: 0.1}}",
            "more than data.max_epochs = 0.1: add text, lower its share or raise max_epochs",
        ),
        (
            "data: {init_args: {context_length: 32768, batch_tokens: 32768, micro_batch_size: 1}, }",
            "fewer than one row of data.context_length + 1 = 32769",
        ),
        (
            "data: {init_args: {sources: {web: {pth: x}}}}",
            "data.sources.web: 'pth' is not an option of Source: did you mean 'path'?",
        ),
        (
            "data: {init_args: {sources: {web: 3}}}",
            "data.sources.web: expected a mapping of the options of Source, not 3",
        ),
        (
            "data: {init_args: {sources: {'a/b': {path: x.txt}}}}",
            "a source is called 'a/b': use letters, digits, - and _",
        ),
        (
            f"data: {{init_args: {{sources: {{{'s' * 300}: {{path: x.txt}}}}}}}}",
            "a source is called 'ssssssssssssssssssss'… (300 letters)",
        ),
        (
            "data: {init_args: {stages: [{nam: x, tokens: 5, mix: {web: 1}}]}}",
            "data.stages.0: 'nam' is not an option of Stage: did you mean 'name'?",
        ),
        (
            "data: {init_args: {stages: [{name: x, tokens: 5K, mix: {web: abc}}]}}",
            "data.stages.0.mix.web: expected a number, not abc",
        ),
        ("data: {init_args: {stages: [{name: x, tokens: 5K, mix: {web: -1}}]}}", "gives source 'web' the share -1.0"),
        ("data: {init_args: {stages: [{name: x, tokens: 5K, mix: {web: .nan}}]}}", "gives source 'web' the share nan"),
        ("data: {init_args: {stages: [{name: x, tokens: 5K, mix: {web: 0}}]}}", "all shares of stage 'x' are 0"),
        (
            "data: {init_args: {stages: [{name: x, tokens: 5K, mix: {wbe: 1}}]}}",
            "stage 'x' mixes the unknown source 'wbe': did you mean 'web'?",
        ),
        ("data: {init_args: {stages: []}}", "data.stages is empty"),
        ("data: {init_args: {tokenizer: ./nowhere}}", "data.tokenizer: there is no file or directory ./nowhere"),
        ('data: {init_args: {seed: "${nothing}"}}', "${nothing} refers to a key that no config states"),
        (
            "data: {init_args: {sources: {web: {path: missing.jsonl}, wiki: {path: missing.jsonl}}}}",
            "bad.yaml, line 1: data.sources.web.path: there is no file missing.jsonl",
        ),
        ("seed_everything: abc", "seed_everything: expected true or false or a whole number, not abc"),
        ("trainer: {precision: half}", "bad.yaml, line 1: trainer.precision is half: choose one of 32-true,"),
        ("trainer: {max_epochs: 3}", "trainer.max_epochs is 3: a curriculum is one epoch; make its stages longer"),
        (
            "trainer: {accumulate_grad_batches: 4}",
            "trainer.accumulate_grad_batches is 4: it follows from data.batch_tokens and data.micro_batch_size",
        ),
        (
            "trainer: {val_check_interval: 5}",
            "trainer.val_check_interval is 5: validation comes at the end of each stage",
        ),
        (
            "trainer: {gradient_clip_algorithm: value}",
            "trainer.gradient_clip_algorithm is 'value': only 'norm' is supported",
        ),
        ("trainer: {strategy: fsdp3}", "trainer.strategy is fsdp3: did you mean fsdp?"),
        ("trainer: {accelerator: tpu}", "error: trainer: "),
        ("trainer: {accelerator: mps}", "trainer.accelerator is mps, and PyTorch finds no such device on this machine"),
        ("trainer: {max_steps: -7}", "trainer.max_steps is -7: give a whole number from 1 on, or -1 for no limit"),
        ("trainer: {limit_val_batches: -3}", "trainer.limit_val_batches is -3: give a number of batches from 0 on"),
        (
            "trainer: {num_nodes: 2}",
            "trainer.num_nodes is 2, and nothing tells the machines of each other: start the run",
        ),
        (
            "trainer: {gradient_clip_val: -1}",
            "trainer.gradient_clip_val is -1: give the largest norm, such as 1.0, or 0 for none",
        ),
        ("naem: x", "bad.yaml, line 1: 'naem' is not an option of this command: did you mean 'name'?"),
        ("- 1", "bad.yaml holds a list: a configuration is a mapping of keys such as data, model, trainer"),
        ("", "bad.yaml is empty: a configuration is a mapping"),
        ("data: [1", "bad.yaml, line 1: not YAML (expected ',' or ']', but got '<stream end>')"),
    ],
)
def test_wrong_configs_are_answered_in_one_line(
    tiny: Path, capsys: pytest.CaptureFixture[str], change: str, message: str
) -> None:
    (tiny / "bad.yaml").write_text(change)
    said = error_of(capsys, "fit", "--config", str(tiny / "tiny.yaml"), "--config", str(tiny / "bad.yaml"))
    assert message in said
    assert not (tiny / "runs").exists()


def test_a_path_is_told_as_it_was_asked_for() -> None:
    error = PermissionError(13, "Permission denied", f"shared/.my-model.{'0' * 32}.partial/config.json")
    assert user_message(error) == "shared/my-model/config.json: Permission denied"
    assert user_message(OSError(28, "No space left on device")) == (
        "No space left on device (the system names no file; --debug shows where)"
    )


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "out of memory (MemoryError): "),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes.\nmore"),
            "out of memory (DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes.): ",
        ),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), "out of memory (CUDA out of memory"),
        (
            OSError(12, "Cannot allocate memory", "a.bin"),
            "out of memory ([Errno 12] Cannot allocate memory: 'a.bin'): ",
        ),
        (RuntimeError("unable to mmap 9 bytes from file <a>: Cannot allocate memory (12)"), "out of memory (unable to"),
        (ImportError("a.so: failed to map segment from shared object"), "out of memory (a.so: failed to map segment"),
        (Exception("out of memory"), "out of memory (out of memory): "),  # of tokenizers
        (RuntimeError("can't start new thread"), "out of memory (can't start new thread): "),
        (OSError("write failed (os error 12)"), "out of memory (write failed (os error 12)): "),
    ],
)
def test_memory_that_runs_out_is_one_line_with_the_way_out(error: Exception, said: str) -> None:
    message = user_message(error)
    assert message is not None and message.startswith(said) and "\n" not in message
    assert message.endswith("needs less; `plan` shows what a pre-training run takes")
    # Where a file is read, any error becomes a ValueError that calls the file damaged.
    damaged = ValueError("the file is damaged")
    damaged.__cause__ = error
    assert user_message(damaged) == message
    assert user_message(RuntimeError("a fault of ours")) is None
    first, second = RuntimeError("a fault"), RuntimeError("its consequence")
    first.__cause__, second.__cause__ = second, first
    assert user_message(first) is None
    no_permission = ImportError("a.so: failed to map segment from shared object: Operation not permitted")
    assert user_message(no_permission) is None


def test_memory_is_kept_for_the_line_of_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without free memory, the interpreter cannot even find the cause of an error."""
    kept: list[int] = []

    class Map:
        def __init__(self, _: int, size: int) -> None:
            if sum(kept) + size > 16 << 20:  # all that the system gives
                raise OSError(12, "Cannot allocate memory")
            kept.append(size)
            self.size = size

        def close(self) -> None:
            if self.size in kept:
                kept.remove(self.size)

    said: list[tuple[str, int]] = []
    monkeypatch.setattr(mmap, "mmap", Map)
    monkeypatch.setattr(program, "tell", lambda line: said.append((line.split(":")[1], sum(kept))))
    for error in (MemoryError(), SystemError("error return without exception set"), KeyError("of a library")):

        def fail(args: list[str], error: BaseException = error) -> int:
            said.append(("at work", sum(kept)))
            raise error

        monkeypatch.setattr(program, "_dispatch", fail)
        assert program.main(["fit"]) == 2
    kept.append(9 << 20)  # too little is left to begin
    assert program.main(["fit"]) == 2
    assert said == [
        ("at work", 8 << 20),
        (" out of memory (MemoryError)", 0),
        ("at work", 8 << 20),
        (" out of memory (error return without exception set)", 0),
        ("at work", 8 << 20),
        (" out of memory (KeyError", 0),
        (" out of memory ([Errno 12] Cannot allocate memory)", 9 << 20),
    ]
    monkeypatch.undo()
    assert user_message(SystemError("error return without exception set")) is None  # a bug, where memory is left
    # Memory may be there again when the error is reported.
    monkeypatch.setattr(resource, "getrlimit", lambda of: (1 << 32, resource.RLIM_INFINITY))
    assert str(user_message(SystemError("f returned NULL"))).startswith("out of memory (f returned NULL): ")


def test_an_error_is_told_where_no_memory_is_left_to_find_its_cause(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> int:
        raise MemoryError

    monkeypatch.setattr(program, "_dispatch", fail)
    monkeypatch.setattr(program, "user_message", fail)
    assert program.main(["fit"]) == 2
    assert capfd.readouterr().err.startswith("error: out of memory: a smaller model, ")


def test_what_failed_is_freed_before_its_line_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    class Weights:
        pass

    kept: list[weakref.ref[Weights]] = []

    def fail(args: list[str]) -> int:
        weights = Weights()
        kept.append(weakref.ref(weights))
        raise MemoryError

    said = []
    monkeypatch.setattr(program, "_dispatch", fail)
    monkeypatch.setattr(program, "tell", lambda line: said.append((kept[-1]() is None, line.split(":")[0])))
    assert program.main(["fit"]) == 2 and said == [(True, "error")]


def test_a_missing_option_is_named(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = (tiny / "tiny.yaml").read_text()
    without = re.sub(r"(learning_rate: \{peak: [^,]+), final: [^,}]+", r"\1", config)
    assert without != config
    (tiny / "bad.yaml").write_text(without)
    line = next(number for number, text in enumerate(without.splitlines(), 1) if "learning_rate" in text)
    said = error_of(capsys, "fit", "--config", str(tiny / "bad.yaml"))
    assert f"bad.yaml, line {line}: model.learning_rate: 'final' is missing from LearningRate" in said


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["fti"], "unknown command 'fti': did you mean 'fit'?"),
        (["xyz"], "unknown command 'xyz': there are fit, validate, test, predict"),
        (["fit"], "give a configuration, for example --config quickstart"),
        (["fit", "--config", "nowhere.yaml"], "there is no config file nowhere.yaml"),
        (["fit", "quickstart"], "'quickstart' is not an option: a configuration is given by --config quickstart"),
        (
            ["fit", "--config", "TINY", "--trainer.precision", "fp8"],
            "--trainer.precision is fp8: choose one of 32-true,",
        ),
        (["fit", "--config", "TINY", "--trainer.precision=fp8"], "--trainer.precision is fp8: choose one of 32-true,"),
        (["fit", "--config", "TINY", "--trainer.devices", "64"], "--trainer.devices is 64, and this machine has"),
        (["fit", "--config", "TINY", "--trainer.devices", "-1"], "trainer: `devices` selected with"),
        (["fit", "--config", "TINY", "--trainer.devices", str(10**30)], "trainer: cannot fit 'int'"),
        (["fit", "--config", "TINY", "--seed_everything", "-1"], "--seed_everything is -1: give a number from 0 to"),
        (
            ["fit", "--config", "TINY", "--seed_everything", str(2**32)],
            "--seed_everything is 4294967296: give a number",
        ),
        (["fit", "--config", "TINY", "--data.batch_tokens", str(10**30)], "more than 1,000T: count again"),
        (["fit", "--config", "TINY", "--data.validation_rows", "-1"], "validation_rows is -1: it must be at least 1"),
        (
            ["fit", "--config", "TINY", "--model.decoder.num_hidden_layers", str(10**9)],
            "num_hidden_layers is 1000000000; it may be at most 10,000",
        ),
        (
            ["fit", "--config", "TINY", "--data.workers", str(10**9)],
            "data.workers is 1000000000: give 0 to ",
        ),
        (
            ["fit", "--config", "TINY", "--data.processes", str(10**9)],
            "data.processes is 1000000000: give 1 to ",
        ),
        (["prepare", "--config", "TINY", "--processes", str(10**12)], "--processes is 1000000000000: give 1 to "),
        (  # before 13 TB are asked for
            [
                "fit",
                "--config",
                "TINY",
                "--model.decoder.hidden_size",
                "16384",
                "--model.decoder.num_hidden_layers",
                "9999",
            ],
            "model.decoder has 32,",
        ),
        (
            ["fit", "--config", "TINY", "--ckpt_path", "last-or-new", "--trainer.fast_dev_run", "true"],
            "trainer.fast_dev_run tries the first steps of a run, and --ckpt_path names a run that has done them",
        ),
        (["fit", "--config", "TINY", "--name", "&a [*a]"], "--name, line 1: an alias stands inside the value"),
        (["fit", "--config", "TINY", "--model.vocab_size", "7"], "--model.vocab_size is taken from data.tokenizer"),
        (["fit", "--config", "TINY", "--ckpt_path", "last"], "there is no checkpoint under"),
        (["fit", "--config", "TINY", "--ckpt_path", "nowhere.ckpt"], "--ckpt_path nowhere.ckpt: there is no such file"),
        (["fit", "--config", "TINY", "--ckpt_path", "DIRECTORY"], "the directory has no checkpoints/*.ckpt"),
        (["validate", "--config", "TINY"], "validate needs a trained model: give --ckpt_path last"),
        (
            ["fit", "--config", "TINY", "--model.init_args.learning_rat.peak", "1"],
            "error: --model.init_args.learning_rat.peak: 'learning_rat' is not an option of Pretraining: did you mean "
            "'learning_rate'?",
        ),
        (
            ["fit", "--config", "TINY", "--model.learning_rate.peek", "1"],
            "error: --model.learning_rate.peek: 'peek' is not an option of LearningRate: did you mean 'peak'?",
        ),
        (
            ["fit", "--config", "TINY", "--trainer.strategy.data_parallel_size", "2"],
            "error: --trainer.strategy.data_parallel_size: 'data_parallel_size' is an option of a class, and none is "
            "named: give --trainer.strategy with a class first",
        ),
        (
            ["fit", "--config", "TINY", "--trainer.max_step", "5"],
            "'max_step' is not an option of Trainer: did you mean 'max_steps'?",
        ),
        (
            ["generate", "--weights", "x", "--max-new-token", "5"],
            "unrecognized arguments: --max-new-token 5: did you mean --max-new-tokens?",
        ),
        (["generate"], "the following arguments are required: --weights"),
        (
            ["generate", "--weights", "nowhere", "--prompt", "x"],
            "--weights nowhere: there is no such file or directory",
        ),
        (
            ["generate", "--weights", "DIRECTORY", "--prompt", "x"],
            "neither a Hugging Face directory (config.json) nor a run",
        ),
        (["generate", "--weights", "TINY", "--prompt", "x"], "truncated, or neither a checkpoint"),
        (
            ["generate", "--weights", "x", "--prompt", "x", "--max-new-tokens", "0"],
            "--max-new-tokens is 0: it must be at least 1",
        ),
        (
            ["generate", "--weights", "EMPTY", "--prompt", "x", "--temperature", "-1"],
            "temperature is -1.0; it has to be at least 0 (0 takes the likeliest token)",
        ),
        (["generate", "--weights", "x", "--prompt", ""], "--prompt is empty: give at least one word"),
        (["generate", "--weights", "x", "--prompt", "a", "--prompt", " "], "--prompt number 2 is empty"),
        (["export", "--weights", "nowhere", "--out", "x"], "--weights nowhere: there is no such file or directory"),
        (
            ["export", "--weights", "nowhere", "--out", "x", "--format", "xyz"],
            "argument --format: invalid choice: 'xyz'",
        ),
    ],
)
def test_wrong_command_lines_are_answered_in_one_line(
    tiny: Path, capsys: pytest.CaptureFixture[str], args: list[str], message: str
) -> None:
    empty = tiny / "empty"
    empty.mkdir()
    (empty / "config.json").write_text("{}")
    places = {"TINY": str(tiny / "tiny.yaml"), "DIRECTORY": str(tiny), "EMPTY": str(empty)}
    assert message in error_of(capsys, *[places.get(arg, arg) for arg in args])


def test_bad_rows_are_named_with_file_and_row(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (tiny / "wiki.jsonl").open("a") as file:
        file.write('{"text": "unfinished\n')
    said = error_of(capsys, "fit", "--config", str(tiny / "tiny.yaml"))
    assert f"{tiny / 'wiki.jsonl'}, row 301: not JSON" in said


@pytest.mark.medium
def test_checkpoints_of_another_model_or_tokenizer_are_refused(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from lightning_danube.tokens.tokenizer import DocumentTokenizer

    config = ["--config", str(tiny / "tiny.yaml")]
    assert main(["fit", *config]) == 0
    capsys.readouterr()
    said = error_of(capsys, "validate", *config, "--ckpt_path", "last", "--model.init_args.decoder.hidden_size", "64")
    assert "another decoder than the config: hidden_size 32 (here 64)" in said

    hf = copy.deepcopy(DocumentTokenizer("danube-small").hf)  # the original is shared by all that ask for it
    hf.backend_tokenizer.normalizer = normalizers.Lowercase()
    hf.save_pretrained(tiny / "other")
    said = error_of(
        capsys, "validate", *config, "--ckpt_path", "last", "--data.init_args.tokenizer", str(tiny / "other")
    )
    assert "the checkpoint was trained with the tokenizer 'danube-small'" in said


VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"GOMP_SPINCOUNT": "3000", "PYTORCH_ALLOC_CONF": "expandable_segments:True"}),
        ({"GOMP_SPINCOUNT": "7"}, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}),
        ({"OMP_WAIT_POLICY": "active", "PYTORCH_ALLOC_CONF": "max_split_size_mb:512"}, {}),
        ({"OMP_WAIT_POLICY": "active", "PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:512"}, {}),
    ],
)
def test_what_torch_reads_when_it_is_loaded_is_set_unless_the_user_has_set_it(
    given: dict[str, str], expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    spec = importlib.util.find_spec("lightning_danube")
    assert spec is not None and spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    found = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert found == {**given, **expected}


def test_the_package_does_not_load_torch() -> None:
    """torch would then have read its variables before they are set."""
    code = "import sys, lightning_danube; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fti", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_our_own_faults_keep_their_traceback(
    tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr("lightning_danube.pretraining.task.Pretraining.training_step", broken)
    assert main(["fit", "--config", str(tiny / "tiny.yaml")]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_only_parsers_of_whole_configurations_skip_the_last_validation() -> None:
    parser = trainer_verbs.RunParser(exit_on_error=False)
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--note", type=str)
    wrong = Namespace(count="many", note="read")
    with pytest.raises(TypeError, match="many"):
        parser.validate(wrong)
    with pytest.raises(TypeError, match="many"):
        parser.dump(wrong)
    parser.texts = {("note",): "stated"}
    parser.validate(wrong)
    assert yaml.safe_load(parser.dump(wrong)) == {"count": "many", "note": "stated"}


def test_print_config_round_trips(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def printed(file: Path) -> str:
        with pytest.raises(SystemExit) as stop:
            main(["fit", "--config", str(file), "--print_config"])
        assert stop.value.code == 0
        return capsys.readouterr().out

    first = printed(tiny / "tiny.yaml")
    (tiny / "again.yaml").write_text(first)
    assert printed(tiny / "again.yaml") == first
    assert yaml.safe_load(first)["data"]["init_args"]["seed"] == 3  # ${seed_everything}, resolved


TEXTS = {"separator": "\n## ", "name": "# 1", "split": "it's \\n", "revision": None, "text": "a\tb"}
"""Texts that jsonargparse alone would change: it reads them twice, and writes mappings of flags as Python does."""


@pytest.mark.medium
@pytest.mark.parametrize(
    "flags",
    [
        ["--data.init_args.sources", json.dumps({"web": {"path": "a.txt", **TEXTS}, "wiki": {"path": "b.txt"}})],
        ["--data.init_args.sources.web", json.dumps({"path": "a.txt", **TEXTS})],
        [
            "--data.sources.web.path",
            "a.txt",
            *(f"--data.sources.web.{key}={text or 'null'}" for key, text in TEXTS.items()),
        ],
    ],
)
def test_texts_are_kept_letter_by_letter(tiny: Path, capsys: pytest.CaptureFixture[str], flags: list[str]) -> None:
    args = ["--config", str(tiny / "tiny.yaml"), *flags]
    with pytest.raises(SystemExit):
        main(["fit", *args, "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)
    for config in (printed, resolved_config(args)):
        source = config["data"]["init_args"]["sources"]["web"]
        assert {key: source.get(key) for key in TEXTS} == TEXTS


def test_small_files_compose(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tiny / "model.yaml").write_text("model: {init_args: {decoder: {num_key_value_heads: 1}}}")
    with pytest.raises(SystemExit):
        main(["fit", "-c", str(tiny / "tiny.yaml"), "-c", str(tiny / "model.yaml"), "--name=other", "--print_config"])
    config = yaml.safe_load(capsys.readouterr().out)
    decoder = config["model"]["init_args"]["decoder"]
    assert (decoder["num_key_value_heads"], decoder["num_attention_heads"], config["name"]) == (1, 4, "other")


@pytest.mark.medium
def test_files_may_each_state_a_source(tiny: Path) -> None:
    more = "data: {init_args: {sources: {books: {path: b.txt, separator: '# '}, web: {on_bad_row: skip}}}}"
    (tiny / "more.yaml").write_text(more)
    args = ["--config", str(tiny / "tiny.yaml"), "--config", str(tiny / "more.yaml"), "--data.sources.web.split=x"]
    before = resolved_config(args[:2])["data"]["init_args"]["sources"]
    sources = resolved_config(args)["data"]["init_args"]["sources"]
    assert sources.keys() == {*before, "books"} and sources["books"]["separator"] == "# "
    assert sources["web"] == {**before["web"], "on_bad_row": "skip", "split": "x"}


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"  {verb} " in said for verb in ["fit", "validate", "test", "predict", *COMMANDS])
    assert main([]) == 2
    for verb in COMMANDS:
        with pytest.raises(SystemExit) as stop:
            main([verb, "--help"])
        assert stop.value.code == 0


def test_help_imports_nothing_heavy() -> None:
    """The overview stays fast by what it leaves out, which can be asserted without a clock."""
    code = (
        "import sys; from lightning_danube.__main__ import main; main(['--help']);"
        "print(sorted({'torch', 'lightning', 'transformers'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


@pytest.mark.slow
def test_a_real_process_ends_with_the_right_exit_code(tiny: Path) -> None:
    command = [sys.executable, "-m", "lightning_danube", "fit", "--config", str(tiny / "tiny.yaml")]
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert json.loads((tiny / "runs/tiny/version_0/summary.json").read_text())["seconds"] < time.monotonic() - began
    wrong = subprocess.run([*command, "--nmae", "x"], capture_output=True, text=True)
    assert (wrong.returncode, wrong.stdout, len(wrong.stderr.splitlines())) == (2, "", 1)


def test_lightning_still_has_the_private_methods_of_its_command_line() -> None:
    expected = {
        "_parse_ckpt_path": ["self"],
        "_run_subcommand": ["self", "subcommand"],
        "_get": ["self", "config", "key", "default"],
        "_parser": ["self", "subcommand"],
    }
    found = {name: list(inspect.signature(getattr(LightningCLI, name)).parameters) for name in expected}
    assert found == expected


def test_lightning_still_has_the_private_connectors_of_its_trainer() -> None:
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    assert isinstance(trainer._accelerator_connector.cluster_environment, LightningEnvironment)
    assert callable(trainer._signal_connector.register_signal_handlers)


def test_a_strategy_still_keeps_its_checkpoint_plugin_in_a_private_attribute() -> None:
    plugin = DurableCheckpointIO()
    assert DDPStrategy(checkpoint_io=plugin)._checkpoint_io is plugin


def cli_with_loggers(tmp_path: Path, logger: Any, continues: bool = False, **trainer: Any) -> Any:
    cli: Any = object.__new__(trainer_verbs.DanubeCLI)
    section = SimpleNamespace(logger=logger, default_root_dir=None, **trainer)
    cli.subcommand, cli.config, cli.run = "fit", {"fit": {"trainer": section}}, tmp_path / "runs" / "tiny" / "version_0"
    cli.place = SimpleNamespace(continues=continues, checkpoint=tmp_path / "step_00000012.ckpt")
    return cli


def test_loggers_are_made_when_the_runs_directory_is_known(tmp_path: Path) -> None:
    one = Namespace(class_path="lightning.pytorch.loggers.CSVLogger", init_args=Namespace(save_dir=tmp_path / "runs"))
    for given, kinds in (
        (None, "TensorBoard"),
        (True, "TensorBoard"),
        (False, ""),
        (one, "CSV"),
        ([one, one], "CSV CSV"),
    ):
        cli = cli_with_loggers(tmp_path, given)
        cli._take_loggers()
        section = cli.config["fit"]["trainer"]
        assert section.logger is False, "the parser makes no logger"
        loggers = cli._make_loggers()
        assert section.logger is given, "config.yaml shows what was given"
        assert [type(logger).__name__ for logger in loggers] == [f"_Kept{kind}Logger" for kind in kinds.split()]
        assert all(logger.log_dir == str(cli.run) for logger in loggers)


def test_other_ranks_have_no_logger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer_verbs, "this_rank", lambda: 1)
    cli = cli_with_loggers(tmp_path, None)
    cli._take_loggers()
    assert cli._make_loggers() == []


def test_the_directory_of_a_run_is_no_option_of_the_trainer(tmp_path: Path) -> None:
    cli = cli_with_loggers(tmp_path, None)
    cli.config["fit"]["trainer"].default_root_dir = "elsewhere"
    with pytest.raises(ValueError, match=r"trainer\.default_root_dir is elsewhere: .* give --runs or --name"):
        cli._take_loggers()


def test_a_run_with_nothing_left_says_so(tmp_path: Path) -> None:
    staged = SimpleNamespace(stages=["one"], total_steps=26, total_tokens=26 * 64)

    def left(done: int, limit: int = -1, changes: tuple[str, ...] = (), on: bool = True, data: Any = staged) -> Any:
        checkpoint = run / "checkpoints" / f"step_{done:08d}.ckpt"
        cli: Any = SimpleNamespace(
            datamodule=data, trainer=SimpleNamespace(max_steps=limit),
            place=SimpleNamespace(continues=on, checkpoint=checkpoint), changes=dict.fromkeys(changes),
        )  # fmt: skip
        said = trainer_verbs.DanubeCLI._nothing_left(cli)
        return said and said.removeprefix(f"{run} ")

    run = tmp_path / "tiny" / "version_0"
    run.mkdir(parents=True)
    assert left(26) is None  # it was killed before its summary
    (run / "summary.json").touch()
    assert left(26) == "is complete: 26 of 26 steps; nothing is left to do"
    assert left(25) is left(27) is None
    assert left(10, limit=10) == "has 10 of 26 steps, and trainer.max_steps is 10; nothing is left to do"
    assert left(10, limit=9) is not None and left(10, limit=11) is None
    assert left(26, on=False) is None
    # Planned data count their steps in `setup`.
    assert left(26, data=ChatData.__new__(ChatData)) is None
    for key in ("data.batch_tokens", "data.context_length"):
        assert left(26, changes=(key,)) is None
    assert left(26, changes=("data.stages",)) is not None


@pytest.mark.parametrize(("rank", "continues", "removed"), [(0, False, True), (1, False, False), (0, True, False)])
def test_only_a_new_version_that_never_trained_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int, continues: bool, removed: bool
) -> None:
    monkeypatch.setattr(trainer_verbs, "this_rank", lambda: rank)
    cli = cli_with_loggers(tmp_path, None, continues)
    cli.run.mkdir(parents=True)
    cli._leave_unused()
    assert cli.run.exists() is not removed


def test_the_history_says_where_a_session_began(tmp_path: Path) -> None:
    trainer: Any = SimpleNamespace(
        is_global_zero=True, logger=None, loggers=[], default_root_dir=str(tmp_path), world_size=2
    )
    task: Any = None
    parser: Any = None
    changes = {"trainer.precision": ("32-true", "bf16-mixed"), "data.seed": (1, None)}
    checkpoint = tmp_path / "checkpoints" / "stage_1_one_step_00000012.ckpt"
    trainer_verbs.RunRecord(parser, parser).save_config(trainer, task, "fit")
    trainer_verbs.RunRecord(parser, parser, resumed_from=checkpoint, changes=changes).save_config(trainer, task, "fit")
    trainer_verbs.RunRecord(parser, parser).save_config(trainer, task, "test")
    first, second = map(json.loads, (tmp_path / "history.jsonl").read_text().splitlines())
    assert (first["step"], first["checkpoint"], first["devices"], first["differences"]) == (0, None, 2, {})
    assert (second["step"], second["checkpoint"]) == (12, str(checkpoint))
    assert second["differences"] == {"trainer.precision": ["32-true", "bf16-mixed"], "data.seed": [1, None]}


def test_ranks_that_compute_differently_are_refused() -> None:
    parser: Any = None
    trainer: Any = SimpleNamespace(
        precision="32-true", global_rank=1, strategy=SimpleNamespace(broadcast=lambda precision: "bf16-mixed")
    )
    with pytest.raises(ValueError, match="rank 1 computes in 32-true, rank 0 in bf16-mixed"):
        trainer_verbs.RunRecord(parser, parser).setup(trainer, parser, "fit")
    trainer.precision = "bf16-mixed"
    trainer_verbs.RunRecord(parser, parser).setup(trainer, parser, "fit")


def test_a_users_checkpoint_plugin_stays_alone() -> None:
    def plugins(given: Any, strategy: Any = "auto", accelerator: str = "cpu") -> list[Any]:
        section = {"plugins": given, "strategy": strategy, "accelerator": accelerator}
        cli: Any = SimpleNamespace(config_init=None, _get=lambda config, key: section)
        return trainer_verbs.DanubeCLI._plugins(cli)

    theirs, precision = AsyncCheckpointIO(), MixedPrecision("bf16-mixed", "cpu")
    assert [type(one) for one in plugins(None)] == [DurableCheckpointIO]
    assert [type(one) for one in plugins(precision)] == [MixedPrecision, DurableCheckpointIO]
    assert plugins([precision, theirs]) == [precision, theirs] and plugins(theirs) == [theirs]
    assert plugins(None, DDPStrategy(checkpoint_io=theirs)) == []
    # On a CPU the copy would take memory and cores from training.
    assert [plugins(None, accelerator=kind)[0].background for kind in ("cpu", "cuda")] == [False, True]


@pytest.mark.medium
@pytest.mark.parametrize(
    ("verb", "option"),
    [
        ("fit", "limit_train_batches"),
        ("fit", "max_steps"),
        ("fit", "max_epochs"),
        ("validate", "limit_val_batches"),
        ("test", "limit_test_batches"),
        ("predict", "limit_predict_batches"),
    ],
)
def test_a_verb_that_would_do_nothing_is_refused(
    verb: str, option: str, tiny_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [verb, "--config", str(tiny_run / "config.yaml"), f"--trainer.{option}", "0"]
    message = f"error: --trainer.{option} is 0, so {verb} would do nothing: leave it out, or raise it"
    assert error_of(capsys, *arguments) == message


@pytest.mark.medium
def test_a_run_that_is_being_trained_is_not_trained_by_a_second_process(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of the run's files stay as they are, and its lock is free again after a refusal and after a run."""
    shutil.copytree(tiny_run, tmp_path / "tiny" / "version_0")
    run = tmp_path / "tiny" / "version_0"
    again = ["fit", "--config", str(run / "config.yaml"), "--runs", str(tmp_path), "--ckpt_path", "last"]
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    with locked(run / LOCK, "another process"):
        assert main(again) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.endswith(
            f"{run} is in use by process {os.getpid()} on {socket.gethostname()}: wait until it ends, or stop it"
        )
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()} == before
    assert main(again) == 0
    assert "nothing is left to do" in capsys.readouterr().out
    assert not (run / LOCK).exists()
