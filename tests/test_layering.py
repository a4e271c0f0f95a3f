"""Who may import whom. Imports are read from the source, those inside functions too: nothing has to be importable."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS = (
    "lightning_danube/model",
    "lightning_danube/data",
    "lightning_danube/training",
    "lightning_danube/tasks",
    "lightning_danube/reports",
    "callbacks",
)
# Kept apart from the rules: these folders may be absent.
OTHERS = ("benchmarks", "notebooks")

MODEL_MAY_IMPORT = frozenset({"torch", "lightning_danube.model", "lightning_danube.device"})
# The files that read and write formats of others, and what each needs for it.
FORMATS = {
    "checkpoints.py": frozenset({"safetensors"}),
    "gguf_files.py": frozenset({"gguf", "numpy", "lightning_danube.gguf_header"}),
}
TASKS_MAY_IMPORT_OF_OURS = frozenset(
    {
        f"lightning_danube.{name}"
        for name in (
            "model",
            "device",
            "training",
            "durations",
            "intervals",
            "tasks",
            "weights",
            "adapters",
            "quantization",
            "harness",
        )
    }
)
TRAINING_MAY_IMPORT_OF_OURS = frozenset({f"lightning_danube.{name}" for name in ("model", "durations", "training")})
REPORTS_READ_WITH = (
    "config_errors",
    "durations",
    "extras",
    "invocation",
    "model",
    "quantization.frontier",
    "reports",
    "studies.comparison",
    "studies.scaling",
)
REPORTS_MAY_IMPORT_OF_OURS = frozenset({f"lightning_danube.{name}" for name in REPORTS_READ_WITH})
DATA_MUST_NOT_IMPORT = frozenset(
    {
        f"lightning_danube.{name}"
        for name in ("model", "training", "tasks", "weights", "adapters", "quantization", "harness")
    }
)
# Libraries that one place of the package deals with, for all others. Most come with an extra (tests/test_extras.py).
IN_ONE_FILE: dict[str, str | tuple[str, ...]] = {
    "bitsandbytes": "lightning_danube/quantized_linear.py",
    "gigatoken": "lightning_danube/data/encoding.py",
    "hqq": "lightning_danube/quantization/grouped.py",
    "llama_cpp": "lightning_danube/llama_cpp.py",
    "lm_eval": "lightning_danube/harness.py",
    "matplotlib": (
        "lightning_danube/reports/",
        "lightning_danube/quantization/frontier.py",
        "callbacks/classification_summary.py",
        "callbacks/evaluation_report.py",
    ),
    "optuna": "lightning_danube/studies/",
    "pandas": "lightning_danube/reports/",
    "peft": "lightning_danube/adapters.py",
    "rensa": "lightning_danube/data/quality.py",
    "sqlalchemy": "lightning_danube/studies/",
    "statsmodels": "lightning_danube/studies/",
}
NAMES_THAT_SAY_NOTHING = frozenset({"utils", "util", "common", "helpers", "helper", "misc"})


def imported_names(path: PurePosixPath, source: str) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of all that a file imports; `from a import b` counts as a.b."""
    for node in ast.walk(ast.parse(source, filename=str(path))):
        match node:
            case ast.Import():
                yield from ((node.lineno, alias.name) for alias in node.names)
            case ast.ImportFrom():
                package = list(path.parent.parts)
                package = package[: len(package) - node.level + 1] if node.level else []
                base = ".".join([*package, *([node.module] if node.module else [])])
                yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
            case ast.Call(
                func=ast.Attribute(attr="import_module") | ast.Name(id="import_module" | "__import__"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                yield node.lineno, name


def is_within(name: str, modules: frozenset[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def violations(path: PurePosixPath, source: str) -> list[str]:
    """The layering rules that a file at `path`, relative to the repository, breaks."""
    found = []
    for line, name in imported_names(path, source):
        broken = broken_rule(path, name)
        if broken:
            found.append(f"{path}:{line}: imports {name}: {broken}")
    return found


def broken_rule(path: PurePosixPath, name: str) -> str | None:
    folders = path.parts
    ours = is_within(name, frozenset({"lightning_danube"}))
    if is_within(name, frozenset({"callbacks"})):
        return "the folder callbacks is imported as lightning_danube.callbacks, the name that a wheel has, too"
    if is_within(name, frozenset({"lightning_danube.cli"})):
        allowed = folders[0] == "tests" or folders[:2] in (
            ("lightning_danube", "__main__.py"),
            ("lightning_danube", "cli.py"),
        )
        return None if allowed else "only __main__ and tests import the command line"
    if is_within(name, frozenset({"lightning_danube.reports"})):
        allowed = folders[0] in ("tests", "notebooks") or folders[:2] == ("lightning_danube", "reports")
        return None if allowed else "only notebooks and tests import reports, whose pandas is an extra"
    if folders[:2] == ("lightning_danube", "reports") and ours and not is_within(name, REPORTS_MAY_IMPORT_OF_OURS):
        return f"reports read the files of runs; of ours they import {', '.join(REPORTS_READ_WITH)} only"
    if folders[0] == "lightning_danube" and is_within(name, frozenset({"lightning_danube.callbacks"})):
        return "the package never imports callbacks; YAML names them"
    only = IN_ONE_FILE.get(name.split(".")[0])
    if only is not None and folders[0] in ("lightning_danube", "callbacks") and not str(path).startswith(only):
        return f"only {only} imports {name.split('.')[0]}"
    if folders[:2] == ("lightning_danube", "model"):
        may = MODEL_MAY_IMPORT | FORMATS.get(path.name, frozenset())
        if name.split(".")[0] not in sys.stdlib_module_names and not is_within(name, may):
            return f"the model imports the standard library and {', '.join(sorted(may))} only"
    if folders == ("lightning_danube", "device.py") and not is_within(
        name, frozenset({"torch", *sys.stdlib_module_names})
    ):
        return "what the machine can do is asked with the standard library and torch only"
    if folders[:2] == ("lightning_danube", "data") and is_within(name, DATA_MUST_NOT_IMPORT):
        return "data knows neither models nor what trains them"
    if folders[:2] == ("lightning_danube", "tasks") and ours and not is_within(name, TASKS_MAY_IMPORT_OF_OURS):
        return (
            "of ours, tasks import model, training, device, weights, adapters, quantization, durations, intervals and "
            "harness; facts about data arrive as arguments"
        )
    if folders[:2] == ("lightning_danube", "training") and ours and not is_within(name, TRAINING_MAY_IMPORT_OF_OURS):
        return "of ours, training imports model and durations only: it knows no task"
    return None


def python_files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("layer", LAYERS)
def test_every_layer_has_files(layer: str) -> None:
    assert python_files(layer), f"no Python file under {layer}: the rules about it check nothing"


def test_every_import_keeps_to_the_layers() -> None:
    files = [file for folder in ("lightning_danube", "callbacks", *OTHERS) for file in python_files(folder)]
    assert files, "no Python file found: the rules check nothing"
    found = [
        violation
        for file in files
        for violation in violations(PurePosixPath(file.relative_to(ROOT).as_posix()), file.read_text("utf-8"))
    ]
    assert not found, "\n".join(found)


def test_every_file_is_named_after_what_lives_in_it() -> None:
    files = [file for folder in ("lightning_danube", "callbacks", "tests", *OTHERS) for file in python_files(folder)]
    assert files, "no Python file found: the rule checks nothing"
    found = [
        str(file.relative_to(ROOT))
        for file in files
        if NAMES_THAT_SAY_NOTHING.intersection(file.relative_to(ROOT).with_suffix("").parts)
    ]
    assert not found, f"named after nothing: {', '.join(found)}"


@pytest.mark.parametrize(
    ("path", "source", "rule"),
    [
        ("lightning_danube/model/decoder.py", "import lightning", "standard library and"),
        ("lightning_danube/model/decoder.py", "import numpy as np", "standard library and"),
        (
            "lightning_danube/model/decoder.py",
            "def f():\n    from transformers import AutoModel",
            "standard library and",
        ),
        ("lightning_danube/model/decoder.py", "from ..training.optim import schedule", "standard library and"),
        ("lightning_danube/model/decoder.py", "import torchmetrics", "standard library and"),
        ("lightning_danube/model/deep/er.py", "from ... import data", "standard library and"),
        ("lightning_danube/model/checkpoints.py", "import lightning", "standard library and"),
        ("lightning_danube/model/checkpoints.py", "import gguf", "standard library and"),
        ("lightning_danube/model/gguf_files.py", "import safetensors", "standard library and"),
        ("lightning_danube/model/decoder.py", "import gguf", "standard library and"),
        ("lightning_danube/model/gguf_files.py", "from ..data.gguf_tokenizer import KEY", "standard library and"),
        ("lightning_danube/model/decoder.py", "from ..gguf_header import GGUFHeader", "standard library and"),
        ("lightning_danube/device.py", "import numpy", "what the machine can do"),
        ("lightning_danube/device.py", "from .model import Decoder", "what the machine can do"),
        ("lightning_danube/data/chat.py", "from lightning_danube.model.config import DecoderConfig", "data knows"),
        ("lightning_danube/data/chat.py", "from lightning_danube import tasks", "data knows"),
        (
            "lightning_danube/data/chat.py",
            "import importlib\nimportlib.import_module('lightning_danube.model')",
            "data",
        ),
        ("lightning_danube/tasks/chat.py", "from ..data.chat import Chat", "tasks import"),
        ("lightning_danube/tasks/chat.py", "if TYPE_CHECKING:\n    import lightning_danube.data.chat", "tasks import"),
        ("lightning_danube/data/chat.py", "from lightning_danube.weights import load_model", "data knows"),
        (
            "lightning_danube/training/optim/adamw.py",
            "from lightning_danube import callbacks",
            "never imports callbacks",
        ),
        ("lightning_danube/training/optim/muon.py", "from lightning_danube.tasks import Pretraining", "knows no task"),
        ("lightning_danube/tasks/chat.py", "from peft import LoraConfig", "only lightning_danube/adapters.py"),
        ("lightning_danube/weights.py", "import llama_cpp", "only lightning_danube/llama_cpp.py"),
        ("callbacks/preference_summary.py", "from statsmodels import api", "only lightning_danube/studies/"),
        ("lightning_danube/tasks/chat.py", "from matplotlib.figure import Figure", "callbacks/evaluation_report.py"),
        ("lightning_danube/tasks/evaluation.py", "from lm_eval.api import model", "only lightning_danube/harness.py"),
        ("lightning_danube/data/academic.py", "from lightning_danube.harness import run", "data knows"),
        ("lightning_danube/data/chat.py", "from ..callbacks.curriculum import Curriculum", "never imports"),
        ("lightning_danube/data/chat.py", "from lightning_danube.cli import main", "the command line"),
        ("lightning_danube/tasks/chat.py", "from .. import cli", "the command line"),
        ("callbacks/samples.py", "from lightning_danube.cli import main", "the command line"),
        ("callbacks/samples.py", "from callbacks.progress import say", "imported as lightning_danube.callbacks"),
        ("tests/test_cli.py", "import callbacks", "imported as lightning_danube.callbacks"),
        ("callbacks/samples.py", "from lightning_danube.reports import runs", "only notebooks and tests"),
        ("lightning_danube/tables.py", "from lightning_danube import reports", "only notebooks and tests"),
        ("lightning_danube/reports/runs.py", "from lightning_danube.data import CurriculumData", "reports read"),
    ],
)
def test_a_forbidden_import_is_found(path: str, source: str, rule: str) -> None:
    (found,) = violations(PurePosixPath(path), source)
    assert rule in found


@pytest.mark.parametrize(
    ("path", "source"),
    [
        (
            "lightning_danube/model/decoder.py",
            "import math, torch\nfrom torch import nn\nfrom .config import DecoderConfig",
        ),
        ("lightning_danube/model/packing.py", "from ..device import onednn_packs"),
        ("lightning_danube/device.py", "import os\nimport torch"),
        ("lightning_danube/model/checkpoints.py", "import json, safetensors.torch"),
        (
            "lightning_danube/model/gguf_files.py",
            "import gguf, numpy\nfrom lightning_danube.gguf_header import is_gguf",
        ),
        ("lightning_danube/data/gguf_tokenizer.py", "from lightning_danube.gguf_header import read_gguf_header"),
        ("lightning_danube/data/chat.py", "import datasets\nfrom .tokenizer import Tokenizer"),
        (
            "lightning_danube/tasks/chat.py",
            "import lightning\nfrom lightning_danube import model, training\nfrom . import pretraining",
        ),
        ("lightning_danube/tasks/chat.py", "from ..weights import load_decoder\nfrom ..adapters import load_adapter"),
        ("lightning_danube/training/optim/muon.py", "from lightning_danube.model.decoder import Block"),
        ("lightning_danube/adapters.py", "import peft"),
        ("lightning_danube/llama_cpp.py", "import llama_cpp"),
        ("lightning_danube/harness.py", "import lm_eval"),
        ("lightning_danube/tasks/evaluation.py", "from lightning_danube import harness"),
        ("benchmarks/speed.py", "import llama_cpp"),
        ("lightning_danube/cli.py", "from .data import chat\nfrom .tasks import chat as task"),
        ("lightning_danube/__main__.py", "from lightning_danube.cli import main"),
        ("tests/test_cli.py", "from lightning_danube.cli import main"),
        ("lightning_danube/reports/figures.py", "import matplotlib\nfrom lightning_danube.reports import runs"),
        ("callbacks/samples.py", "import lightning\nfrom lightning_danube.model.generation import generate"),
    ],
)
def test_an_allowed_import_passes(path: str, source: str) -> None:
    assert violations(PurePosixPath(path), source) == []
