"""`export`: what it writes loads in transformers, llama.cpp and PEFT, says what it is, and is whole or not there."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_danube.__main__ import main
from lightning_danube.generation.token_stream import generate
from lightning_danube.weights.export_places import EXPORTED_FILES, export_folder
from lightning_danube.weights.gguf.files import load_gguf, save_gguf
from lightning_danube.weights.gguf.header import read_gguf_header
from lightning_danube.weights.huggingface import load_hf
from lightning_danube.weights.llama_cpp import ALIASES, check_file_type, file_types, measure, quantize
from lightning_danube.weights.loading import load_decoder, load_model
from lightning_danube.weights.names import SMOLLM2, locate
from tests.forked import Forked
from tests.tiny_models import CONFIG, TEMPLATE, save_tiny, tiny_decoder, tiny_tokenizer
from tests.weights.test_loading import save_tiny_adapter

ROOT = Path(__file__).resolve().parents[3]
IDS = torch.arange(30).view(2, 15)
# Rows of 256: what a block of a K-quant holds. With CONFIG's 64 and 96 every tensor falls back.
WIDE = dataclasses.replace(CONFIG, hidden_size=256, intermediate_size=512, head_dim=None, initializer_range=0.03)


def export(*arguments: str | Path) -> None:
    assert main(["export", *map(str, arguments)]) == 0


def refused(capsys: pytest.CaptureFixture[str], message: str, *arguments: str | Path) -> None:
    capsys.readouterr()
    assert main(["export", *map(str, arguments)]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1, error


def section(card: str, title: str) -> str:
    return re.split(r"^#+ ", card, flags=re.MULTILINE)[
        [part.partition("\n")[0] for part in re.split(r"^#+ ", card, flags=re.MULTILINE)].index(title)
    ]


def test_a_wrong_place_is_refused_before_a_missing_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").touch()
    (tmp_path / "notes.gguf").mkdir()
    missing = ["--weights", "runs/none", "--adapter", "none"]
    for form in ("hf", "peft"):
        refused(capsys, r"^error: full is not empty \(notes\)", *missing, "--format", form, "--out", "full")
        refused(capsys, r"^error: --weights runs/none: there is no ", *missing, "--format", form, "--out", "model")
    refused(capsys, r"notes\.gguf is a directory", *missing, "--format", "gguf", "--out", "notes.gguf")
    refused(capsys, r"^error: --weights runs/none: there is no ", *missing, "--format", "gguf", "--out", "model.gguf")


def test_a_missing_adapter_is_refused_before_the_model_is_read(
    tmp_path: Path, tiny_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lightning_danube.cli.verbs.export.load_decoder", lambda *_, **__: pytest.fail("it is read"))
    message = r"^error: --adapter \./none: there is no such file or directory"
    refused(capsys, message, "--weights", tiny_run, "--adapter", "./none", "--out", "model")


# --- Hugging Face -----------------------------------------------------------------------------------------------------


def test_a_run_loads_in_transformers(tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export("--weights", tiny_run, "--out", tmp_path / "my-model")
    parameters = load_decoder(str(tiny_run)).config.parameters
    assert capsys.readouterr().err == f"{parameters:,} parameters written as float32 to {tmp_path / 'my-model'}\n"
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "my-model")
    reference, ours = theirs(IDS).logits, load_decoder(str(tiny_run))(IDS)
    # See test_parity.py.
    assert (ours - reference).abs().max() <= 1e-5 * reference.abs().max()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "my-model")
    _, here = load_model(str(tiny_run))
    # As training began a document; whoever calls it here adds that token alone.
    assert tokenizer("The river").input_ids == [1, *here("The river").input_ids]
    assert here("The river").input_ids[0] != 1, "the shared tokenizer was changed"
    assert theirs.generation_config.eos_token_id == theirs.config.eos_token_id == 2
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "my-model").iterdir()}
    assert len(set(modes.values())) == 1, modes


def test_the_card_of_a_run_says_what_the_run_knows(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = shutil.copytree(tiny_run, tmp_path / "tiny/version_7")
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("precision: 32-true", "precision: bf16-mixed"))
    export("--weights", run, "--out", tmp_path / "my-model", "--dtype", "bfloat16")
    card = (tmp_path / "my-model/README.md").read_text()
    front, _, body = card.removeprefix("---\n").partition("---\n")
    assert front == "library_name: transformers\npipeline_tag: text-generation\n"
    summary = json.loads((tiny_run / "summary.json").read_text())
    seen = section(body, "Tokens seen")
    for stage in summary["stages"]:
        web, wiki = stage["tokens_by_source"].values()
        shares = (100 * stage["mix"]["web"], 100 * stage["mix"]["wiki"])
        assert (
            f"| {stage['name']} | {stage['tokens']:,} | {web:,} ({shares[0]:.1f} %) | {wiki:,} ({shares[1]:.1f} %) |"
            in seen
        )
    assert f"- web: `{tiny_run.parents[2]}/web.jsonl`" in seen
    losses = section(body, "Held-out loss")
    for name, values in (
        ("unigram baseline", summary["unigram_loss"]),
        *((f"after {stage['name']}", stage["val_loss"]) for stage in summary["stages"]),
    ):
        assert f"| {name} | {values['web']:.3f} | {values['wiki']:.3f} |" in losses
    assert f"| tokens measured on | {summary['val_tokens']['web']:,} |" in losses
    training = section(body, "Training")
    assert f"| tokens | {summary['tokens']:,} |" in training and f"| optimizer steps | {summary['steps']} |" in training
    assert "| precision in training | bf16-mixed |" in training and "torch 2." in training
    assert "| stored as | bfloat16 |" in section(body, "Architecture")
    assert "danube-small, the byte-level pieces" in section(body, "Tokenizer")
    # The command that the card gives is one that works.
    (code,) = re.findall(r"```python\n(.*?)```", body, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["model"].dtype == torch.bfloat16 and len(names["tokenizer"]) == 4096


def test_a_card_has_the_losses_of_the_stages_that_its_checkpoint_has_finished(tiny_run: Path, tmp_path: Path) -> None:
    stages = json.loads((tiny_run / "summary.json").read_text())["stages"]
    checkpoints = sorted((tiny_run / "checkpoints").glob("stage_*.ckpt"))
    assert len(checkpoints) == len(stages) > 1
    for finished, checkpoint in enumerate(checkpoints, start=1):
        export("--weights", checkpoint, "--out", tmp_path / f"stage-{finished}")
        losses = section((tmp_path / f"stage-{finished}" / "README.md").read_text(), "Held-out loss")
        for number, stage in enumerate(stages, start=1):
            row = f"| after {stage['name']} | {stage['val_loss']['web']:.3f} | {stage['val_loss']['wiki']:.3f} |"
            assert (row in losses) == (number <= finished)


def test_a_card_leaves_out_what_is_not_known(tiny_run: Path, tmp_path: Path) -> None:
    checkpoint = torch.load(locate(str(tiny_run)).path, weights_only=True)
    for key in ("token_ledger", "callbacks", "seed", "global_step"):
        del checkpoint[key]
    (tmp_path / "a/b/checkpoints").mkdir(parents=True)
    torch.save(checkpoint, tmp_path / "a/b/checkpoints/step_1.ckpt")
    (tmp_path / "a/b/summary.json").write_text("{")  # of a run that was killed long ago
    export("--weights", tmp_path / "a/b", "--out", tmp_path / "my-model")
    card = (tmp_path / "my-model/README.md").read_text()
    assert "Checkpoint `step_1.ckpt` of the run `a/b`." in card
    for absent in (
        "Tokens seen",
        "Held-out loss",
        "precision",
        "seed",
        "None",
        "null",
        "license:",
        "|  |  |\n| --- | --- |\n\n",
    ):
        assert absent not in card
    assert "Architecture" in card


def test_an_exported_model_is_exported_again_in_another_type(tmp_path: Path) -> None:
    first = save_tiny(tmp_path / "first")
    settings = first / "generation_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"temperature": 0.3, "do_sample": True}))
    (first / "README.md").write_text("---\nlicense: cc-by-4.0\nlibrary_name: x\n---\n\n# What first is\n\nA poem.\n")
    export("--weights", first, "--out", tmp_path / "second", "--dtype", "float16")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "second")
    assert theirs.dtype == torch.float16 and theirs.generation_config.temperature == 0.3
    assert torch.equal(theirs.lm_head.weight, tiny_decoder().half().lm_head.weight)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "second")
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer("the").input_ids == tiny_tokenizer()("the").input_ids, "a tokenizer of others stays as it is"
    card = (tmp_path / "second/README.md").read_text()
    assert f"The weights of `{first}`, a Hugging Face directory." in card
    assert card.startswith("---\nlibrary_name: transformers\npipeline_tag: text-generation\nlicense: cc-by-4.0\n---\n")
    assert "Licence: cc-by-4.0." in card and card.count("# What first is\n\nA poem.\n") == 1
    assert "chat template | yes" in card


def test_every_token_that_ends_an_answer_goes_along(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE.replace("eos_token", "pad_token")
    tokenizer.save_pretrained(tmp_path / "model")
    settings = json.loads((tmp_path / "model/generation_config.json").read_text())
    (tmp_path / "model/generation_config.json").write_text(json.dumps(settings | {"eos_token_id": [3], "top_k": 5}))
    export("--weights", tmp_path / "model", "--out", tmp_path / "again")
    expected = [tokenizer.eos_token_id, tokenizer.pad_token_id, 3]
    written = json.loads((tmp_path / "again/generation_config.json").read_text())
    assert written["eos_token_id"] == expected and written["top_k"] == 5
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "again").generation_config.eos_token_id == expected
    export("--weights", tmp_path / "model", "--format", "gguf", "--type", "F32", "--out", tmp_path / "model.gguf")
    fields = read_gguf_header(tmp_path / "model.gguf").fields
    assert fields["tokenizer.ggml.eot_token_id"] == tokenizer.pad_token_id
    assert fields["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id


def test_an_adapter_is_merged_into_the_export(tmp_path: Path) -> None:
    base, adapter = save_tiny(tmp_path / "base"), save_tiny_adapter(tmp_path / "adapter")
    export("--weights", base, "--adapter", adapter, "--out", tmp_path / "merged")
    reference = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter)).eval()(IDS).logits
    logits = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(IDS).logits
    # See test_parity.py.
    assert (logits - reference).abs().max() <= 1e-5 * reference.abs().max()
    assert f"The LoRA adapter `{adapter}` is merged" in (tmp_path / "merged/README.md").read_text()


def test_an_adapter_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, adapter = save_tiny(tmp_path / "base"), save_tiny_adapter(tmp_path / "adapter")
    export("--weights", base, "--adapter", adapter, "--format", "peft", "--out", tmp_path / "alone")
    assert re.fullmatch(r"adapter with \d,\d{3} parameters written to .*alone\n", capsys.readouterr().err)
    models = [
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(directory)).eval()
        for directory in (adapter, tmp_path / "alone")
    ]
    assert torch.equal(models[0](IDS).logits, models[1](IDS).logits)
    assert models[1].peft_config["default"].base_model_name_or_path == str(base)
    card = (tmp_path / "alone/README.md").read_text()
    assert "library_name: peft" in card and "| rank | 2 |" in card and "| layers | down_proj, q_proj |" in card
    other = save_tiny(tmp_path / "other", WIDE)
    refused(
        capsys,
        "tensors of the adapter .*have another shape than this model's layers",
        *("--weights", other, "--adapter", adapter, "--format", "peft", "--out", tmp_path / "wrong"),
    )
    assert not (tmp_path / "wrong").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "gguf", "--out", "x.gguf", "--dtype", "float16"], "the type of a GGUF file is --type"),
        (["--format", "gguf", "--out", "x"], "--out x: a GGUF file is looked for by its ending, so add .gguf"),
        (["--type", "F16", "--out", "x"], "--type is for --format gguf: the type of --format hf is --dtype"),
        (["--format", "peft", "--adapter", "a", "--dtype", "float16", "--out", "x"], "an adapter is written as it is"),
        (
            ["--format", "gguf", "--out", "x.gguf", "--type", "Q4_K_X"],
            "--type Q4_K_X: did you mean Q4_K_[MS]. there are",
        ),
        (["--dtype", "int8", "--out", "x"], "argument --dtype: invalid choice: 'int8'"),
        (["--out", "."], "--out .: an export replaces the directory, and you are in it"),
        (
            ["--out", str(Path(__file__).parent)],
            "is not empty .*: choose another directory, or replace its files by --overwrite",
        ),
        (
            ["--format", "gguf", "--out", "there.gguf"],
            "there.gguf exists: choose .* --overwrite",
        ),
        (
            ["--format", "gguf", "--overwrite", "--out", "there.gguf"],
            "there.gguf is not a GGUF file; it is not overwritten",
        ),
    ],
)
def test_options_that_do_not_fit(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("there.gguf").write_text("my notes")
    refused(capsys, message, "--weights", "nothing-is-read-before", *arguments)
    assert Path("there.gguf").read_text() == "my notes"


# --- whole or not there -----------------------------------------------------------------------------------------------


def test_leftovers_of_a_killed_export_are_removed(tmp_path: Path) -> None:
    hexadecimal = "0123456789abcdef" * 2
    leftover = tmp_path / f".model.{hexadecimal}.partial"
    leftover.mkdir()
    (leftover / "model.safetensors").write_text("half")
    others = [
        tmp_path / f"model2.{hexadecimal}.partial",
        tmp_path / ".model.partial",
        tmp_path / f".model.{hexadecimal}",
    ]
    for other in others:
        other.write_text("of something else")
    export("--weights", save_tiny(tmp_path / "base"), "--out", tmp_path / "model")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "model", *(other.name for other in others)}


def test_what_was_set_aside_when_the_process_was_killed_comes_back(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model").rename(tmp_path / f".model.{'0' * 32}.replaced")
    with pytest.raises(ValueError, match="model is not empty"), export_folder(tmp_path / "model", [], False):
        pass
    assert torch.equal(load_hf(tmp_path / "model")(IDS), tiny_decoder()(IDS))
    (tmp_path / f".model.{'0' * 32}.replaced").mkdir()  # killed a moment later: the new one is in its place
    with export_folder(tmp_path / "model", EXPORTED_FILES, True) as directory:
        (directory / "config.json").write_text("{}")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


KILLED = """
import importlib, os, signal
from lightning_danube.__main__ import main
# A sound export imports what the forks need, once.
main(["export", "--weights", "empty/base", "--out", "warm"])
for place, moment, arguments in {cases!r}:
    if not os.fork():
        os.chdir(place)
        module, _, name = moment.rpartition(".")
        setattr(importlib.import_module(module), name, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        os._exit(main(["export", "--weights", "base", "--overwrite", *arguments]))
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""
# In the midst of writing, and with all written but the target's name.
MOMENTS = [
    ("lightning_danube.weights.huggingface.write_shards", ["--out", "model"]),
    ("lightning_danube.files.sync", ["--out", "model"]),
    ("lightning_danube.files.sync", ["--format", "gguf", "--out", "model.gguf"]),
]
QUANTIZED = ["--format", "gguf", "--type", "Q8_0", "--out", "model.gguf"]
QUANTIZED_MOMENTS = [
    ("lightning_danube.weights.llama_cpp.import_llama_cpp", QUANTIZED),
    ("lightning_danube.weights.llama_cpp._captured_log", QUANTIZED),
    ("lightning_danube.weights.llama_cpp.measure", QUANTIZED),
]


@pytest.mark.medium
@pytest.mark.parametrize("moments", [MOMENTS, pytest.param(QUANTIZED_MOMENTS, marks=pytest.mark.llama_cpp)])
def test_a_killed_export_leaves_what_was_there(
    moments: list[tuple[str, list[str]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    targets = {arguments[-1]: arguments for _, arguments in moments}
    cases, there = [], {}
    for place in (tmp_path / "empty", tmp_path / "full"):
        save_tiny(place / "base")
        monkeypatch.chdir(place)
        if place.name == "full":
            for arguments in targets.values():
                export("--weights", "base", *arguments)
        there[place] = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
        cases += [(str(place), moment, arguments) for moment, arguments in moments]
    output = tmp_path / "output.txt"
    Forked([], output, tmp_path, program=KILLED.format(cases=cases)).wait(timeout=120)
    assert re.findall(r"^-?\d+$", output.read_text(), flags=re.MULTILINE) == ["-9"] * len(cases), output.read_text()
    for place, files in there.items():
        leftovers = {path for path in place.iterdir() if path.name.startswith(".")}
        assert leftovers, "killed before anything was written"
        now = [path for path in place.rglob("*") if path.is_file() and not leftovers & {path, *path.parents}]
        assert {path: path.read_bytes() for path in now} == files
        monkeypatch.chdir(place)
        for arguments in targets.values():
            export("--weights", "base", *arguments, "--overwrite")
        assert {path.name for path in place.iterdir()} == {"base", *targets}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB; WIDE takes 5 MB as float32."""
    disk = tmp_path / "disk"
    disk.mkdir()
    result = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], capture_output=True, text=True
    )
    if result.returncode:
        pytest.skip(f"needs the right to mount: {result.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--out", "model"],
        ["--format", "gguf", "--type", "F32", "--out", "model.gguf"],
        pytest.param(["--format", "gguf", "--type", "Q8_0", "--out", "model.gguf"], marks=pytest.mark.llama_cpp),
    ],
)
def test_a_full_disk_is_told_in_one_line(
    arguments: list[str], small_disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = save_tiny(tmp_path / "base", WIDE)
    target = small_disk / arguments[-1]
    refused(
        capsys,
        rf"error: {target}: not written: .*([Nn]o space left|disk full)",
        "--weights",
        base,
        *arguments[:-1],
        target,
    )
    assert list(small_disk.iterdir()) == []


@pytest.mark.llama_cpp
def test_a_disk_that_llama_cpp_fills_is_told(
    small_disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_gguf(tiny_decoder(dataclasses.replace(WIDE, num_hidden_layers=6)), tmp_path / "F32.gguf", dtype=torch.float32)
    with pytest.raises(OSError, match=r"not written by llama.cpp"):
        quantize(tmp_path / "F32.gguf", small_disk / "Q8_0.gguf", "Q8_0")
    assert list(small_disk.iterdir()) == []


# --- GGUF -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file_type", "dtype"), [("F32", torch.float32), ("f16", torch.float16), ("BF16", torch.bfloat16)]
)
def test_unquantized_files_need_no_llama_cpp(
    file_type: str,
    dtype: torch.dtype,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    base, file = save_tiny(tmp_path / "base"), tmp_path / "model.gguf"
    export("--weights", base, "--format", "gguf", "--type", file_type, "--out", file)
    said = capsys.readouterr().err
    assert re.fullmatch(
        rf"{file_type.upper()} written to .*model.gguf: [\d,]+ bytes, 96,576 weights at \d+\.\d\d bits: [\w ,]+\n",
        said,
    )
    wanted = tiny_decoder()
    wanted.load_state_dict({name: t.to(dtype) if t.ndim > 1 else t for name, t in wanted.state_dict().items()})
    # Norms stay float32 in the file; the loader takes one type for all, and so rounds them.
    assert torch.equal(load_decoder(str(file), dtype="float32")(IDS), wanted(IDS))


def test_without_llama_cpp_the_command_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    version = torch.__version__.partition("+")[0]
    refused(
        capsys,
        rf"llama.cpp is not installed; type .*: .*python -m pip install -c constraints.txt torch=={version} "
        r"-e '.\[llama-cpp\]'\n",
        *(
            "--weights",
            save_tiny(tmp_path / "base"),
            "--format",
            "gguf",
            "--type",
            "Q4_K_M",
            "--out",
            tmp_path / "x.gguf",
        ),
    )


def test_the_types_are_those_of_llama_cpps_own_program() -> None:
    assert {"F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K", "IQ4_XS"} <= file_types().keys()
    assert file_types()["Q4_K"] == file_types()["Q4_K_M"] == 15
    # The names are read without the package, and are those of the package.
    theirs = {int(kind): kind.name for kind in gguf.LlamaFileType if kind is not gguf.LlamaFileType.GUESSED}
    assert set(file_types().values()) == theirs.keys()
    assert all(theirs[number].endswith(name) for name, number in file_types().items() if name not in ALIASES)
    assert check_file_type("q4_k_m") == "Q4_K_M"


def their_logits(file: Path, ids_BT: Tensor) -> Tensor:
    """llama.cpp's, with keys and values in float32: its usual float16 would be most of the difference."""
    import llama_cpp

    llama = llama_cpp.Llama(
        str(file),
        n_ctx=128,
        logits_all=True,
        verbose=False,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
    )
    rows = []
    for ids in ids_BT.tolist():
        llama.reset()
        llama.eval(ids)
        rows.append(np.array(llama.scores[: len(ids)]))
    llama.close()
    return torch.from_numpy(np.stack(rows))


# Mean square error of the logits over their mean square, which is what the rounding of weights to so few bits leaves:
# 1.5 times what was measured with these weights.
TYPES = {
    "Q8_0": 6e-4,
    "Q6_K": 5e-3,
    "Q5_K_M": 1.2e-2,
    "Q4_K_M": 5e-2,
    "IQ4_XS": 6e-2,
    "Q4_0": 8e-2,
    "Q3_K_M": 0.1,
    "Q2_K": 0.4,
}


@pytest.mark.llama_cpp
@pytest.mark.parametrize("file_type", TYPES)
def test_quantized_files_load_in_llama_cpp(file_type: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    base, file = save_tiny(tmp_path / "base", WIDE), tmp_path / "model.gguf"
    export("--weights", base, "--format", "gguf", "--type", file_type, "--out", file)
    said = capfd.readouterr()
    assert said.out == "" and said.err.count("\n") == 1, "llama.cpp floods the terminal"
    bits = re.search(r" weights at (\d+\.\d\d) bits: ", said.err)
    content = measure(file)
    assert bits and float(bits[1]) == round(content.bits_per_weight, 2)
    assert content.tensor_bytes < content.file_bytes < content.tensor_bytes + 20_000
    assert sum(content.tensors.values()) == len(load_hf(base).state_dict())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "model.gguf"]
    logits, reference = their_logits(file, IDS), load_hf(base)(IDS)
    error = ((logits - reference).square().mean() / reference.square().mean()).item()
    assert 0 < error <= TYPES[file_type]
    # What we read from the file is what llama.cpp computes with, but for its rounding of activations to 8 bits: 4e-4
    # was measured for every type. A permutation gone wrong, or a tensor in another's place, gives about 2.
    assert (load_gguf(file)(IDS) - logits).square().mean() <= 1e-3 * reference.square().mean()


@pytest.mark.llama_cpp
def test_rows_that_do_not_fit_fall_back_and_the_report_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, file = save_tiny(tmp_path / "base"), tmp_path / "model.gguf"
    export("--weights", base, "--format", "gguf", "--type", "Q4_K_M", "--out", file)
    first, second = capsys.readouterr().err.splitlines()
    # Two layers of seven matrices and the embedding, with rows of 64 or 96. For such a head it has Q8_0 from the start.
    assert second.startswith("15 of 21 tensors have rows that the type cannot hold, and fell back to 1")
    content = measure(file)
    assert "Q4_K" not in content.tensors and content.tensors["F32"] == 5
    assert content.bits_per_weight > 5.5
    assert f"at {content.bits_per_weight:.2f} bits: " in first


@pytest.mark.llama_cpp
def test_types_that_need_an_importance_matrix(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, file = save_tiny(tmp_path / "base", WIDE), tmp_path / "model.gguf"
    refused(
        capsys,
        r"error: llama.cpp does not quantize to IQ2_XXS: .* \(importance matrix\), and none was given: take",
        *("--weights", base, "--format", "gguf", "--type", "IQ2_XXS", "--out", file),
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]
    decoder = load_hf(base)
    save_gguf(decoder, tmp_path / "F32.gguf", dtype=torch.float32)
    from lightning_danube.weights.gguf.files import gguf_names

    names = {theirs: decoder.get_parameter(ours) for ours, theirs in gguf_names(WIDE).items()}
    even = {name: np.ones(parameter.shape[-1], np.float32) for name, parameter in names.items() if parameter.ndim > 1}
    content = quantize(tmp_path / "F32.gguf", file, "IQ2_XXS", imatrix=even)
    assert content.tensors["IQ2_XXS"] > 0
    # It steers: the columns that matter are kept better than with equal weights.
    steered = {name: np.where(np.arange(ones.size) < 32, 100, 0.01).astype(np.float32) for name, ones in even.items()}
    name = "model.layers.0.mlp.up_proj.weight"
    errors = []
    for imatrix in (even, steered):
        quantize(tmp_path / "F32.gguf", file, "Q2_K", imatrix=imatrix)
        difference = load_gguf(file, dtype=torch.float32).get_parameter(name) - decoder.get_parameter(name)
        errors.append(difference[:, :32].square().mean().item())
    assert errors[1] < errors[0]


@pytest.mark.llama_cpp
def test_what_llama_cpp_refuses_is_told(tmp_path: Path) -> None:
    (tmp_path / "no.gguf").write_text("no GGUF file")
    with pytest.raises(ValueError, match=r"llama.cpp does not quantize to Q8_0: .*failed to load model"):
        quantize(tmp_path / "no.gguf", tmp_path / "out.gguf", "Q8_0")
    assert [path.name for path in tmp_path.iterdir()] == ["no.gguf"]


def greedy_text(file: Path, prompt_ids: list[int], tokens: int) -> str:
    import llama_cpp

    llama = llama_cpp.Llama(
        str(file), n_ctx=128, verbose=False, type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32
    )
    answer: Any = llama.create_completion(prompt_ids, max_tokens=tokens, temperature=0)
    llama.close()
    return str(answer["choices"][0]["text"])


@pytest.mark.llama_cpp
def test_a_run_says_the_same_in_llama_cpp(tiny_run: Path, tmp_path: Path) -> None:
    export("--weights", tiny_run, "--format", "gguf", "--out", tmp_path / "run.gguf")
    decoder, tokenizer = load_model(str(tiny_run))
    prompt = [1, *tokenizer("river stone", add_special_tokens=False).input_ids]
    (ids,) = generate(decoder, [prompt], 16)
    # F16 moves logits by 1e-3 of their size, and a tie that close would be an accident of the seed.
    assert greedy_text(tmp_path / "run.gguf", prompt, 16).strip() == str(tokenizer.decode(ids)).strip()


# --- real weights -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.llama_cpp
def test_smollm2_says_the_same_everywhere(tmp_path: Path) -> None:
    decoder, tokenizer = load_model(SMOLLM2)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    template = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    prompt = tokenizer(template, add_special_tokens=False).input_ids
    (ids,) = generate(decoder, [prompt], 24, eos_ids=[tokenizer.eos_token_id])
    text = str(tokenizer.decode(ids, skip_special_tokens=True))
    assert "Paris" in text

    export("--weights", SMOLLM2, "--format", "gguf", "--out", tmp_path / "F16.gguf")
    assert greedy_text(tmp_path / "F16.gguf", prompt, 24) == text
    # Below 16 bits the answer's first token is a toss: "The" has 15.2 %, "L" (of L'Étoile) 14.0 %. So distributions are
    # compared, in nats, with three times what docs/export.md has for longer texts.
    with torch.no_grad():
        wanted = decoder.eval()(torch.tensor([prompt])).log_softmax(-1)
    for file_type, most in (("Q8_0", 0.015), ("Q4_K_M", 0.2)):
        file = tmp_path / f"{file_type}.gguf"
        export("--weights", SMOLLM2, "--format", "gguf", "--type", file_type, "--out", file)
        found = their_logits(file, torch.tensor([prompt])).log_softmax(-1)
        assert (wanted.exp() * (wanted - found)).sum(-1).mean() < most

    export("--weights", SMOLLM2, "--out", tmp_path / "hf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    again = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert again.apply_chat_template(question, add_generation_prompt=True, tokenize=False) == template
    assert again(template, add_special_tokens=False).input_ids == prompt
    with torch.no_grad():
        reference, logits = theirs(torch.tensor([prompt])).logits, decoder(torch.tensor([prompt]))
    # 30 layers of float32 instead of the two of test_parity.py.
    assert (logits - reference).abs().max() <= 1e-4 * reference.abs().max()
