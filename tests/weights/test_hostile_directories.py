"""A Hugging Face directory of others is read, or refused in one line. None of its code runs, and nothing hangs."""

import json
import os
import re
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_danube.__main__ import main
from tests.tiny_models import save_tiny

Change = Callable[[Path], object]
DEEP = "[" * 100_000 + "]" * 100_000
CODE = "open({!r}, 'w').close()\nclass Evil: pass\n"
CONFIG, TOKENIZER, SETTINGS, ENDS = "config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("whole") / "model")


def edit(name: str, **changes: Any) -> Change:
    return lambda place: (place / name).write_text(json.dumps(json.loads((place / name).read_text()) | changes))


def text(name: str, content: str | bytes) -> Change:
    return lambda place: (place / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def in_place_of(name: str, make: Callable[[Path], object]) -> Change:
    def change(place: Path) -> None:
        (place / name).unlink(missing_ok=True)
        make(place / name)

    return change


def fifo(name: str) -> Change:
    return in_place_of(name, os.mkfifo)


def endless(name: str) -> Change:
    return in_place_of(name, lambda path: path.symlink_to("/dev/zero"))


def tokenizer(change: Callable[[Any], object]) -> Change:
    def changed(place: Path) -> None:
        content = json.loads((place / TOKENIZER).read_text())
        change(content)
        (place / TOKENIZER).write_text(json.dumps(content))

    return changed


def header(key: str, value: Any) -> Change:
    """Changes a fact of the first tensor in the header of the weights."""

    def change(place: Path) -> None:
        content = (place / WEIGHTS).read_bytes()
        size = struct.unpack("<Q", content[:8])[0]
        facts = json.loads(content[8 : 8 + size])
        facts[min(facts.keys() - {"__metadata__"})][key] = value
        head = json.dumps(facts).encode()
        (place / WEIGHTS).write_bytes(struct.pack("<Q", len(head)) + head + content[8 + size :])

    return change


def indexed(name: object) -> Change:
    def change(place: Path) -> None:
        (place / WEIGHTS).unlink()
        text(INDEX, json.dumps({"weight_map": {"a": name}}))(place)

    return change


def weights(change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    def changed(place: Path) -> None:
        tensors = load_file(place / WEIGHTS)
        first = min(tensors)
        save_file(tensors | {first: change(tensors[first])}, place / WEIGHTS, metadata={"format": "pt"})

    return changed


def code_beside(place: Path) -> None:
    for name in ("modeling_evil", "configuration_evil", "tokenization_evil"):
        (place / f"{name}.py").write_text(CODE.format(str(place / "was_run")))
    names = {"AutoConfig": "configuration_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil"}
    edit(CONFIG, auto_map=names)(place)
    edit(SETTINGS, auto_map={"AutoTokenizer": ["tokenization_evil.Evil"] * 2}, tokenizer_class="Evil")(place)


REFUSED: dict[str, tuple[Change, str]] = {
    "code": (code_beside, "contains custom code which must be executed"),
    "layers": (
        edit(CONFIG, num_hidden_layers=2**29),
        "num_hidden_layers is 536870912; it may be at most 10,000",
    ),
    "layers without end": (edit(CONFIG, num_hidden_layers=10**18), "has to be a whole number of at most"),
    "a text": (edit(CONFIG, vocab_size="\x1b[31m"), "vocab_size is .* it has to be a whole number"),
    "half a layer": (edit(CONFIG, num_hidden_layers=1.5), "num_hidden_layers is 1.5; it has to be a whole number"),
    "a context without end": (edit(CONFIG, max_position_embeddings=float("inf")), "max_position_embeddings is inf"),
    "an epsilon of nothing": (edit(CONFIG, rms_norm_eps=float("nan")), "rms_norm_eps is nan; it has to be a number"),
    "a list as scaling": (edit(CONFIG, rope_scaling=[1]), r"rope_scaling is '\[1\]', not a mapping"),
    "deep config": (text(CONFIG, DEEP), r"config.json: not JSON \(nested too deep\)"),
    "a pipe as config": (fifo(CONFIG), "neither a Hugging Face directory"),
    "a pipe as weights": (fifo(WEIGHTS), "no model.safetensors and no"),
    "endless weights": (endless(WEIGHTS), "no model.safetensors and no"),
    "a path in the index": (indexed("../whole/model.safetensors"), "a file of its weight_map is .* that is a path"),
    "a code in the index": (indexed("\x1b"), r"is '\\x1b': it has a line end, a control character"),
    "a number in the index": (indexed(5), "no weight_map from tensors to files of this directory"),
    "huge header": (text(WEIGHTS, struct.pack("<Q", 2**63) + b"{}"), "truncated, or no safetensors file"),
    "huge shape": (header("shape", [2**62, 2**62]), "truncated, or no safetensors file"),
    "overlap": (header("data_offsets", [4, 8]), "truncated, or no safetensors file"),
    "a name that is a code": (header("dtype", "\x1b[31m"), "truncated, or no safetensors file"),
    "complex weights": (weights(lambda one: one.to(torch.complex64)), "tensor is quantized or no floats"),
    "weights that are not numbers": (
        weights(lambda one: one.fill_(float("nan"))),
        "lm_head.weight holds NaN or infinity",
    ),
    "a slow pattern": (
        tokenizer(
            lambda one: one.update(
                pre_tokenizer={
                    "type": "Split",
                    "pattern": {"Regex": "(a+)+$"},
                    "behavior": "Isolated",
                    "invert": False,
                }
            )
        ),
        "a file of a model or a tokenizer makes its library fail",
    ),
    "a template that names no token": (
        tokenizer(
            lambda one: one.update(
                post_processor={
                    "type": "TemplateProcessing",
                    "single": [{"SpecialToken": {"id": "[X]", "type_id": 0}}],
                    "pair": [],
                    "special_tokens": {},
                }
            )
        ),
        "cannot encode a text .* its files are damaged",
    ),
    "no unknown token": (
        tokenizer(lambda one: one.update(model={"type": "WordLevel", "vocab": {}, "unk_token": "[UNK]"})),
        "cannot encode a text .* its files are damaged",
    ),
    "an id far away": (
        tokenizer(lambda one: one["model"]["vocab"].update(zz=2**32 - 1)),
        "and the id 4,294,967,295|out of vocabulary",
    ),
    "a length that is a text": (edit(SETTINGS, model_max_length="x"), "cannot encode a text"),
}
READ: dict[str, Change] = {
    "endless facts": endless(ENDS),
    "a pipe of facts": fifo(ENDS),
    "deep facts": text(ENDS, DEEP),
    "ends that are not numbers": edit(ENDS, eos_token_id=["\x1b", 10**30, -5, None]),
    "a name of the class": edit(CONFIG, architectures=["\x1b[2J"]),
    "a truncation": tokenizer(
        lambda one: one.update(
            truncation={"max_length": 1, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
        )
    ),
}


def generated(whole: Path, place: Path, change: Change) -> int:
    shutil.copytree(whole, place)
    change(place)
    began = time.process_time()
    code = main(["generate", "--weights", str(place), "--prompt", f"the {'a' * 36}!", "--max-new-tokens", "2"])
    assert time.process_time() - began < 20, "it does not end"
    assert not (place / "was_run").exists(), "its code was run"
    return code


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_wrong_is_refused_in_one_line(
    name: str, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, message = REFUSED[name]
    assert generated(whole, tmp_path / "model", change) == 2
    error = capsys.readouterr().err
    (line,) = [one for one in error.splitlines() if one.startswith("error: ")]
    assert len(line) < 700 and line.isprintable()
    assert re.search(message, line), line
    assert "Traceback" not in error


@pytest.mark.parametrize("name", READ)
def test_what_does_not_matter_is_no_obstacle(
    name: str, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generated(whole, tmp_path / "model", READ[name]) == 0
    assert capsys.readouterr().out.startswith("the aaa")
